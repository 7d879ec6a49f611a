"""The HTTP service: routes, one file a noun, and every error in one shape. The only room that knows FastAPI.

A route reads the request on the event loop and hands all computing and all disk work to a pool of threads.
"""

import asyncio
import contextlib
import functools
import importlib.metadata
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi_offline import FastAPIOffline
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.access.audit import AuditLog
from serving.access.keyring import Keyring
from serving.api.collections import collections
from serving.api.decide import decide
from serving.api.enrol import enrolment
from serving.api.jobs import jobs, starting
from serving.api.operating import operating
from serving.api.refusals import HANDLERS
from serving.api.routing import refuse_undeclared
from serving.api.samples import samples
from serving.api.security import ASSETS, Guard
from serving.api.subjects import subjects
from serving.api.witness import Witness
from serving.errors import ApiError
from serving.service import Service
from serving.settings import Settings
from serving.telemetry import tracing
from serving.wire import openapi
from trainer.errors import UserError

WAITING = 14  # threads of requests that wait for a decoder or the model: so many images are embedded in one call
ROUTERS = (decide, enrolment, subjects, samples, operating, collections, starting, jobs)


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
        routes=[route for router in ROUTERS for route in router.routes],
        title="Hypersphere",
        summary="Who is this, or is it nobody we know?",
        description=openapi.DESCRIPTION,
        version=importlib.metadata.version("hypersphere"),
        lifespan=functools.partial(_life, service, keyring, audit, on_fault),
        redoc_url=None,
        static_url=ASSETS,
        redirect_slashes=False,
        exception_handlers=HANDLERS,
    )
    app.state.service, app.state.audit = service, audit
    app.openapi = functools.partial(_document, app, keyring.asked)  # type: ignore[method-assign]
    refuse_undeclared(app.routes, openapi.OPEN_PATHS)
    if audit is not None:
        keyring.on_change = audit.happened
        app.add_middleware(Witness, audit=audit)
    if settings.traces:
        app.add_middleware(tracing.Traced)
    app.add_middleware(host_check, allowed_hosts=allowed_hosts)
    app.add_middleware(Guard, settings=settings, metrics=service.metrics, keyring=keyring)
    return app


def _document(app: FastAPI, keyed: bool) -> dict[str, Any]:
    """The OpenAPI document, made once."""
    if app.openapi_schema is None:
        made = get_openapi(
            title=app.title, version=app.version, summary=app.summary, description=app.description, routes=app.routes
        )
        app.openapi_schema = openapi.completed(made, keyed)
    return app.openapi_schema


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
    # What computes is bounded behind them: decoders, the one that embeds, the one that searches, the store's writer.
    threads = service.settings.workers + WAITING
    app.state.pool = pool = ThreadPoolExecutor(threads, thread_name_prefix="serving")
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
