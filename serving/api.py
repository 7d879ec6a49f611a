"""The HTTP service: routes, the parsing of bodies, errors in one shape, and the server around them.

The only file that knows FastAPI. A route reads the request on the event loop and hands all computing and all disk work
to a pool of threads.
"""

import asyncio
import contextlib
import functools
import importlib.metadata
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, TypeVar

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Header, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from serving import docs
from serving.errors import ApiError
from serving.metrics import CONTENT_TYPE
from serving.schemas import (
    EmbedAnswer,
    EnrolAnswer,
    HealthAnswer,
    IdentifyAnswer,
    ReadyAnswer,
    SubjectsAnswer,
    VerifyAnswer,
)
from serving.security import ASSETS, Guard
from serving.service import Form, Sent, Service, invalid_fields
from serving.settings import Settings
from serving.store import KeyReused, StoreError, SubjectFull, SubjectUnknown
from trainer.errors import UserError

log = logging.getLogger("hypersphere.serving")
T = TypeVar("T")
MAX_FIELD_BYTES = 4096
SubjectPath = Annotated[str, Path(description="1 to 128 characters, without slashes", examples=["alice"])]
Key = Annotated[
    str | None,
    Header(alias="Idempotency-Key", description="the same key and request again: done once, answered alike"),
]
router = APIRouter(responses=docs.ERRORS)


class _MemoryParser(MultiPartParser):
    """Keeps files in memory, whose size the Guard bounds: no image of a face ends in a temporary file."""

    spool_max_size = sys.maxsize


@router.post("/v1/verify", tags=["decide"], openapi_extra=docs.VERIFY)
async def verify(request: Request) -> VerifyAnswer:
    """Are these the same identity? Two images, an image and an enrolled subject, or the same with embeddings."""
    sent = await _sent(request, files={"probe": 1, "reference": 1}, needed="probe", fields=("subject_id",))
    return await _compute(request, lambda service, request_id: service.verify(sent, request_id))


@router.post("/v1/identify", tags=["decide"], openapi_extra=docs.IDENTIFY)
async def identify(request: Request) -> IdentifyAnswer:
    """Who is this, or is it nobody we know? `unknown` means that the best candidate stays below the threshold."""
    sent = await _sent(request, files={"image": 1}, needed="image", fields=("top_k",))
    return await _compute(request, lambda service, request_id: service.identify(sent, request_id))


@router.put("/v1/subjects/{subject_id}/samples", status_code=201, tags=["gallery"], openapi_extra=docs.ENROL)
async def enrol(request: Request, response: Response, subject_id: SubjectPath, key: Key = None) -> EnrolAnswer:
    """Add samples to a subject, new or known. Once answered, they are on disk and the next search finds them."""
    sent = await _sent(request, files={"images": _service(request).settings.max_images}, needed="images")
    answer, replayed = await _compute(
        request, lambda service, request_id: service.enrol(subject_id, sent, key, request_id)
    )
    if replayed:
        response.headers["Idempotent-Replayed"] = "true"
    return answer


@router.delete("/v1/subjects/{subject_id}", status_code=204, tags=["gallery"])
async def delete(request: Request, response: Response, subject_id: SubjectPath, key: Key = None) -> None:
    """Erase a subject and all its samples. Once answered, they are off the disk and no search finds them."""
    if await _compute(request, lambda service, _: service.delete(subject_id, key)):
        response.headers["Idempotent-Replayed"] = "true"


@router.get("/v1/subjects", tags=["gallery"])
async def subjects(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=1000, description="subjects a page")] = 100,
    cursor: Annotated[str | None, Query(max_length=64, description="next_cursor of the page before")] = None,
) -> SubjectsAnswer:
    """The enrolled subjects, in order of enrolment, in pages."""
    return await _compute(request, lambda service, request_id: service.subjects(cursor, limit, request_id))


@router.post("/v1/embed", tags=["decide"], openapi_extra=docs.EMBED)
async def embed(request: Request) -> EmbedAnswer:
    """Unit vectors of images, to be kept by the client or sent to the other routes. Nothing is stored."""
    images = _service(request).settings.max_images
    sent = await _sent(request, files={"images": images}, needed="images", json=False)
    if not isinstance(sent, Form):
        raise TypeError("a body that is not a form came through")
    return await _compute(request, lambda service, request_id: service.embed(sent, request_id))


@router.get("/healthz", tags=["operate"])
async def healthz() -> HealthAnswer:
    """The process is alive. Touches nothing else."""
    return HealthAnswer()


@router.get("/readyz", tags=["operate"])
async def readyz(request: Request) -> ReadyAnswer:
    """The store answers and the index is in step with it; 503 otherwise."""
    return await _compute(request, lambda service, request_id: service.ready(request_id))


@router.get("/metrics", tags=["operate"], response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    return Response(_service(request).metrics.text(), media_type=CONTENT_TYPE)


def create_app(settings: Settings) -> FastAPI:
    """Open embedder and store, build the index, and put the routes before them. Closing the app closes the store.

    Raises:
        UserError: the embedder, the store or a threshold cannot be used.
    """
    service = Service(settings)
    pool = ThreadPoolExecutor(settings.workers, thread_name_prefix="serving")

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            pool.shutdown()
            service.close()

    app = FastAPIOffline(
        title="Hypersphere",
        summary="Who is this, or is it nobody we know?",
        description=docs.DESCRIPTION,
        version=importlib.metadata.version("hypersphere"),
        lifespan=lifespan,
        redoc_url=None,
        static_url=ASSETS,
        redirect_slashes=False,
        exception_handlers={
            ApiError: _on_api_error,
            HTTPException: _on_http_error,
            RequestValidationError: _on_invalid,
            UserError: _on_user_error,
            KeyReused: _on_user_error,
            SubjectFull: _on_user_error,
            SubjectUnknown: _on_user_error,
            StoreError: _on_store_error,
            Exception: _on_fault,
        },
    )
    app.state.service, app.state.pool = service, pool
    app.include_router(router, dependencies=[Depends(docs_key)] if settings.api_key else [])
    app.add_middleware(Guard, settings=settings, metrics=service.metrics)
    return app


docs_key = HTTPBearer(auto_error=False, description="The Guard checks the key; this shows it in the documentation.")


def run(settings: Settings, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT, then finish the requests under way and close the store. Port 0: a free one.

    Raises:
        UserError: as `create_app`, or the address cannot be listened on.
    """
    app = create_app(settings)
    service: Service = app.state.service
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        service.close()
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --host or --port") from error
    config = uvicorn.Config(
        app,
        access_log=False,  # paths name subjects
        server_header=False,
        ws="none",
        lifespan="on",
        log_level="info",
        timeout_graceful_shutdown=settings.shutdown_s,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=settings.trusted_proxies or None,
    )
    address = f"http://[{host}]" if ":" in host else f"http://{host}"
    address += f":{listener.getsockname()[1]}"
    gallery = service.gallery
    print(f"Model {gallery.model_id}: {gallery.size} subjects with {gallery.samples} samples in {settings.store}")
    print(f"Serving on {address}; documentation: {address}/docs", flush=True)
    if settings.api_key is None and host not in ("127.0.0.1", "::1", "localhost"):
        print(
            "Warning: no API key is set, so whoever reaches this address can search and erase the gallery; "
            "set HYPERSPHERE_API_KEY",
            file=sys.stderr,
        )
    with listener, _signals_taken():
        uvicorn.Server(config).run(sockets=[listener])


@contextlib.contextmanager
def _signals_taken() -> Iterator[None]:
    """uvicorn raises the signal that stopped it once more when it is done; here it has been obeyed by then."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _compute(request: Request, work: Callable[[Service, str], T]) -> T:
    """Run `work` in the pool, off the event loop."""
    state = request.app.state
    call = functools.partial(work, state.service, request.state.request_id)
    return await asyncio.get_running_loop().run_in_executor(state.pool, call)


async def _sent(
    request: Request, files: dict[str, int], needed: str, fields: tuple[str, ...] = (), json: bool = True
) -> Sent:
    """The body: a multipart form with the files and fields named, or a JSON document, unparsed."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "compressed_body", "compressed bodies are not read; send it without Content-Encoding")
    try:
        if kind == "application/json" and json:
            return await request.body()
        if kind == "multipart/form-data":
            return await _form(request, files, needed, fields)
    except ClientDisconnect as error:
        raise ApiError(400, "body_incomplete", "the connection ended before the body did") from error
    allowed = ["multipart/form-data", "application/json"] if json else ["multipart/form-data"]
    raise ApiError(
        415,
        "unsupported_type",
        f"content type '{kind[:80]}' is not read here; allowed: {' (images), '.join(allowed)}"
        + (" (embeddings)" if json else " (images)"),
        {"sent": kind[:80], "allowed": allowed},
    )


async def _form(request: Request, files: dict[str, int], needed: str, fields: tuple[str, ...]) -> Form:
    most = sum(files.values())
    parser = _MemoryParser(
        request.headers,
        request.stream(),
        max_files=most,
        max_fields=len(fields) + 1,  # one more, to name one that does not belong here
        max_part_size=MAX_FIELD_BYTES,
    )
    try:
        data = await parser.parse()
    except MultiPartException as error:
        raise ApiError(
            400, "bad_form", f"the form cannot be read: {error.message} At most {most} files fit one request"
        ) from error
    form = Form({}, {})
    for name, value in data.multi_items():
        if isinstance(value, UploadFile):
            if name not in files:
                raise invalid_fields([(name, f"no file of this name belongs here; allowed: {', '.join(files)}")])
            form.files.setdefault(name, []).append(await value.read())
            await value.close()
        elif name in files:
            raise invalid_fields([(name, "this must be a file with a file name, as curl -F name=@file sends it")])
        elif name not in fields or name in form.fields:
            allowed = ", ".join(fields) or "no fields"
            raise invalid_fields([(name, f"no field of this name, or a second one; allowed once: {allowed}")])
        else:
            form.fields[name] = value
    for name, number in files.items():
        found = len(form.files.get(name, []))
        if found > number or (name == needed and not found):
            raise invalid_fields([(name, f"{found} files were sent; allowed: 1" + (f" to {number}" * (number > 1)))])
    return form


def _answer(request: Request, error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(request.state.request_id), error.status, error.headers)


async def _on_api_error(request: Request, error: Any) -> JSONResponse:
    return _answer(request, error)


async def _on_http_error(request: Request, error: Any) -> JSONResponse:
    """The router's own: no such route, method not allowed."""
    code, advice = {404: ("no_route", "see /docs for the routes"), 405: ("wrong_method", "see /docs")}.get(
        error.status_code, (f"http_{error.status_code}", "see /docs")
    )
    message = f"{request.method} {request.url.path[:200]}: {error.detail}; {advice}"
    return _answer(request, ApiError(error.status_code, code, message, headers=dict(error.headers or {})))


async def _on_invalid(request: Request, error: Any) -> JSONResponse:
    """Path, query and header parameters that FastAPI checked."""
    return _answer(request, invalid_fields([(str(fault["loc"][-1]), fault["msg"]) for fault in error.errors()]))


async def _on_user_error(request: Request, error: Any) -> JSONResponse:
    status, code = {
        KeyReused: (409, "idempotency_key_reused"),
        SubjectFull: (409, "too_many_samples"),
        SubjectUnknown: (404, "no_subject"),
    }.get(type(error), (422, "invalid"))
    return _answer(request, ApiError(status, code, error.args[0]))


async def _on_store_error(request: Request, error: Any) -> JSONResponse:
    log.error("request %s: %s", request.state.request_id, error)
    message = "the store cannot be read or written just now; what was answered before is safe: try again"
    return _answer(request, ApiError(503, "store_unavailable", message, headers={"retry-after": "5"}))


async def _on_fault(request: Request, error: Any) -> JSONResponse:
    """A fault of the program. The server logs the traceback right after this line; the client gets none of it."""
    request_id = request.state.request_id
    log.error("request %s failed: %s", request_id, type(error).__name__)
    message = "the service failed; its log has more under this request id"
    return _answer(request, ApiError(500, "internal", message, headers={"x-request-id": request_id}))
