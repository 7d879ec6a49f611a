"""The routes of the HTTP service, and every error in one shape.

The only file that knows FastAPI. A route reads the request on the event loop and hands all computing and all disk work
to a pool of threads.
"""

import asyncio
import contextlib
import functools
import importlib.metadata
import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Header, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import openapi, schemas
from serving.audit import AuditLog
from serving.batching import Closed
from serving.bodies import read, read_bulk
from serving.changes import KeyReused, StoreError, SubjectFull, SubjectUnknown
from serving.errors import ApiError, invalid, stopping
from serving.keyring import Keyring
from serving.parsing import KEY_PATTERN, PATTERN, Sent
from serving.projection import GalleryLoading
from serving.routing import ScopedRoute, refuse_undeclared
from serving.scopes import needs
from serving.security import ASSETS, OPEN_PATHS, Guard, as_response
from serving.service import Service, loading
from serving.settings import Settings
from serving.witness import Witness
from trainer.errors import UserError

log = logging.getLogger("hypersphere.serving")
T = TypeVar("T")
_NAME, _KEY = "1 to 128 characters, without slashes", "the same key and request again: done once, answered alike"
SubjectPath = Annotated[str, Path(description=_NAME, examples=["alice"], json_schema_extra={"pattern": PATTERN})]
Key = Annotated[
    str | None, Header(alias="Idempotency-Key", description=_KEY, json_schema_extra={"pattern": KEY_PATTERN})
]
AT_ONCE_BYTES = 64 * 1024  # of JSON that the event loop reads itself: half a millisecond
SAMPLES = "/v1/subjects/{subject_id}/samples"
# What answers PUT points to its successor in the way of RFC 9745; the date is that of the release that began it.
SUPERSEDED = {"deprecation": "@1795651200", "link": '<{path}>; rel="successor-version"; method="POST"'}
router, open_router = (
    APIRouter(responses=openapi.ERRORS, route_class=ScopedRoute) for _ in range(2)
)  # the second asks for no key


@router.post("/v1/verify", tags=["decide"], openapi_extra=openapi.VERIFY.openapi())
@needs("read")
async def verify(request: Request) -> schemas.VerifyAnswer:
    """Are these the same identity? Two images, an image and an enrolled subject, or the same with embeddings."""
    sent = await _read(request, openapi.VERIFY)
    return await _compute(request, lambda service, request_id: service.verify(sent, request_id))


@router.post(
    "/v1/identify", tags=["decide"], openapi_extra=openapi.IDENTIFY.openapi(), response_model=schemas.IdentifyAnswer
)
@needs("read")
async def identify(request: Request) -> Response:
    """Who is this, or is it nobody we know? `unknown` means that the best candidate stays below the threshold."""
    sent, service = await _read(request, openapi.IDENTIFY), _service(request)
    if sent.document is None or len(sent.document) > AT_ONCE_BYTES:
        probe, below = await _compute(request, lambda service, _: service.probe(sent))
    else:  # sooner read than handed to another thread
        probe, below = service.probe(sent)
    found = await asyncio.wrap_future(service.gallery.submit(probe))
    return _json(service.identified(found, below, request.state.request_id))


@router.post(SAMPLES, status_code=201, tags=["gallery"], openapi_extra=openapi.ENROL.openapi())
@needs("enrol")
async def enrol(request: Request, response: Response, subject_id: SubjectPath, key: Key = None) -> schemas.EnrolAnswer:
    """Add samples to a subject, new or known. Once answered, they are on disk and the next search finds them."""
    sent = await _read(request, openapi.ENROL)
    answer, replayed = await _compute(request, lambda service, name: service.enrol(subject_id, sent, key, name))
    if replayed:
        response.headers["Idempotent-Replayed"] = "true"
    return answer


@router.post("/v1/samples", tags=["gallery"], openapi_extra=openapi.BULK)
@needs("enrol")
async def enrol_many(request: Request, response: Response, key: Key = None) -> schemas.BulkAnswer:
    """Add samples to many subjects, all that can be in one change. An item that is refused leaves the others alone."""
    sent = await read_bulk(request)
    answer, replayed = await _compute(request, lambda service, name: service.enrol_many(sent, key, name))
    if replayed:
        response.headers["Idempotent-Replayed"] = "true"
    return answer


@router.put(SAMPLES, status_code=201, tags=["gallery"], openapi_extra=openapi.ENROL.openapi(), deprecated=True)
@needs("enrol")
async def enrol_by_put(
    request: Request, response: Response, subject_id: SubjectPath, key: Key = None
) -> schemas.EnrolAnswer:
    """The same as POST, which replaces it: PUT must not append. Goes with the next release."""
    path = request.url.path.encode("ascii", "ignore").decode()
    response.headers.update({name: value.format(path=path) for name, value in SUPERSEDED.items()})
    return await enrol(request, response, subject_id, key)


@router.delete("/v1/subjects/{subject_id}", status_code=204, tags=["gallery"])
@needs("enrol")
async def delete(request: Request, response: Response, subject_id: SubjectPath, key: Key = None) -> None:
    """Erase a subject and all its samples. Once answered, they are off the disk and no search finds them."""
    if await _compute(request, lambda service, _: service.delete(subject_id, key)):
        response.headers["Idempotent-Replayed"] = "true"


@router.get("/v1/subjects", tags=["gallery"])
@needs("read")
async def subjects(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=1000, description="subjects a page")] = 100,
    cursor: Annotated[str | None, Query(max_length=64, description="next_cursor of the page before")] = None,
) -> schemas.SubjectsAnswer:
    """The enrolled subjects, in order of enrolment, in pages."""
    return await _compute(request, lambda service, request_id: service.subjects(cursor, limit, request_id))


@router.post("/v1/embed", tags=["decide"], openapi_extra=openapi.EMBED.openapi())
@needs("read")
async def embed(request: Request) -> schemas.EmbedAnswer:
    """Unit vectors of images, to be kept by the client or sent to the other routes. Nothing is stored."""
    sent = await _read(request, openapi.EMBED)
    return await _compute(request, lambda service, request_id: service.embed(sent, request_id))


@open_router.get("/healthz", tags=["operate"])
@needs(None)
async def healthz() -> schemas.HealthAnswer:
    """The process is alive. Touches nothing else."""
    return schemas.HealthAnswer()


@open_router.get("/readyz", tags=["operate"], response_model_exclude_none=True)
@needs(None)
async def readyz(request: Request) -> schemas.ReadyAnswer:
    """The store answers and the index is in step with it; 503 otherwise. Without the key it says no more than that."""
    return _service(request).ready(request.state.trusted, request.state.request_id)


@router.get("/metrics", tags=["operate"], response_class=Response, responses={200: {"content": {"text/plain": {}}}})
@needs("audit", of="service")
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    return Response(_service(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)


def create_app(
    settings: Settings, allowed_hosts: Sequence[str] = ("*",), on_fault: Callable[[UserError], object] = print
) -> FastAPI:
    """Open embedder and store, and put the routes before them. The gallery is loaded when the app starts.

    Args:
        allowed_hosts: what may stand in a request's Host header.
        on_fault: told when the store turns out to be damaged while it is loaded; requests are refused from then on.

    Raises:
        UserError: the embedder, the store or a threshold cannot be used.
    """
    keyring, service = Keyring(settings), Service(settings)
    audit = AuditLog(settings.audit, settings.audit_file_bytes) if settings.audit else None
    app = FastAPIOffline(
        title="Hypersphere",
        summary="Who is this, or is it nobody we know?",
        description=openapi.DESCRIPTION,
        version=importlib.metadata.version("hypersphere"),
        lifespan=functools.partial(_life, service, keyring, audit, on_fault),
        redoc_url=None,
        static_url=ASSETS,
        redirect_slashes=False,
        exception_handlers=HANDLERS,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.service, app.state.audit = service, audit
    app.include_router(open_router)
    app.include_router(router, dependencies=[Depends(docs_key)] if keyring.asked else [])
    refuse_undeclared(app.routes, OPEN_PATHS)
    if audit is not None:
        app.add_middleware(Witness, audit=audit)
    app.add_middleware(host_check, allowed_hosts=allowed_hosts)
    app.add_middleware(Guard, settings=settings, metrics=service.metrics, keyring=keyring)
    return app


docs_key = HTTPBearer(auto_error=False, description="The Guard checks the key; this shows it in the documentation.")


def host_check(app: ASGIApp, allowed_hosts: Sequence[str]) -> ASGIApp:
    """Starlette's check of the Host header, with its refusal in the shape of all errors."""

    async def passed(scope: Scope, receive: Receive, send: Send) -> None:
        pass

    async def refused(message: Message) -> None:
        told = "the Host header does not name this service; its operator sets the names with --allowed-hosts"
        raise ApiError(400, "wrong_host", told)

    check = TrustedHostMiddleware(passed, allowed_hosts, www_redirect=False)

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        await check(scope, receive, refused)
        await app(scope, receive, send)

    return checked


@contextlib.asynccontextmanager
async def _life(
    service: Service, keyring: Keyring, audit: AuditLog | None, on_fault: Callable[[UserError], object], app: FastAPI
) -> AsyncIterator[None]:
    """Threads for the requests, and one that loads the gallery and watches the store; all end with the app."""
    app.state.pool = pool = ThreadPoolExecutor(service.settings.workers, thread_name_prefix="serving")
    keeper = threading.Thread(target=service.keep, args=(on_fault,), name="keeper")
    keeper.start()
    try:
        with keyring.watched(), audit.running() if audit else contextlib.nullcontext():
            yield
    finally:
        service.stop()
        await asyncio.to_thread(pool.shutdown)
        await asyncio.to_thread(keeper.join)
        service.close()


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _read(request: Request, body: openapi.Body) -> Sent:
    service = _service(request)
    return await read(request, body, service.settings.max_images if body.many else 1, service.gallery.dimension)


def _json(answer: schemas.Answer) -> Response:
    """FastAPI would check an answer of its own type once more before writing it."""
    return Response(answer.model_dump_json(), media_type="application/json")


async def _compute(request: Request, work: Callable[[Service, str], T]) -> T:
    """Run `work` in the pool, off the event loop."""
    state = request.app.state
    call = functools.partial(work, state.service, request.state.request_id)
    return await asyncio.get_running_loop().run_in_executor(state.pool, call)


async def _on_error(request: Request, error: Exception) -> Response:
    return as_response(_refusal(request, error), request.state.request_id)


def _refusal(request: Request, error: Exception) -> ApiError:
    """What the client is told of it."""
    request_id = request.state.request_id
    match error:
        case ApiError():
            return error
        case HTTPException():
            return _not_routed(request, error)
        case RequestValidationError():  # path, query and header parameters
            return invalid(*((str(fault["loc"][-1]), fault["msg"]) for fault in error.errors()))
        case Closed():
            return stopping()
        case GalleryLoading():
            return loading(error.done, error.total)
        case KeyReused():
            return ApiError(409, "idempotency_key_reused", str(error))
        case SubjectFull():
            return ApiError(409, "too_many_samples", str(error))
        case SubjectUnknown():
            return ApiError(404, "no_subject", str(error))
        case UserError():
            return ApiError(422, "invalid", str(error))
        case StoreError():
            log.error("request %s: %s", request_id, error)
            message = "the store cannot be read or written just now; what was answered before is safe: try again"
            return ApiError(503, "store_unavailable", message, headers={"retry-after": "5"})
    # A fault of the program. The server logs the traceback right after this line; the client gets none of it.
    log.error("request %s failed: %s", request_id, type(error).__name__)
    message = "the service failed; its log has more under this request id"
    return ApiError(500, "internal", message, headers={"x-request-id": request_id})


def _not_routed(request: Request, error: HTTPException) -> ApiError:
    """The router's own: no such route, method not allowed."""
    code = {404: "no_route", 405: "wrong_method"}.get(error.status_code, f"http_{error.status_code}")
    advice = "see /docs for the routes" if code == "no_route" else "see /docs"
    message = f"{request.method} {request.url.path[:200]}: {error.detail}; {advice}"
    headers = {name.lower(): value for name, value in (error.headers or {}).items()}
    if error.status_code == 405:  # the router knows only the first route of a path
        every = [route for route in (*router.routes, *open_router.routes) if isinstance(route, Route)]
        these = [route.methods or () for route in every if route.matches(request.scope)[0] is not Match.NONE]
        headers["allow"] = ", ".join(sorted(set().union(*these))) or headers.get("allow", "")
    return ApiError(error.status_code, code, message, headers=headers)


_HANDLED = (
    *(ApiError, HTTPException, RequestValidationError, Closed, GalleryLoading),
    *(KeyReused, SubjectFull, SubjectUnknown),
)
HANDLERS: dict[int | type[Exception], Callable[[Request, Any], Any]]
HANDLERS = dict.fromkeys((*_HANDLED, UserError, StoreError, Exception), _on_error)
