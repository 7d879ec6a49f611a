"""Every error in one shape: what a client is told of an exception."""

import logging
from collections.abc import Callable
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match

from serving.api.requests import collection_of, etag
from serving.api.security import as_response
from serving.batching import Closed
from serving.errors import ApiError, invalid, stopping
from serving.search.projection import GalleryLoading
from serving.service import loading
from serving.storage.changes import (
    KeyReused,
    LastSample,
    RevisionConflict,
    SampleUnknown,
    StoreError,
    SubjectFull,
    SubjectUnknown,
)
from serving.storage.metadata import MetadataRefused
from trainer.errors import UserError

log = logging.getLogger("hypersphere.serving")


async def on_error(request: Request, error: Exception) -> Response:
    return as_response(_refusal(request, error), request.state.request_id)


def _refusal(request: Request, error: Exception) -> ApiError:
    """What the client is told of it."""
    request_id = request.state.request_id
    if isinstance(error, Closed | StoreError):
        try:
            collection_of(request)
        except ApiError as dropped:  # while the request was under way
            return dropped
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
        case RevisionConflict():
            return _conflict(request, error)
        case MetadataRefused():
            return invalid(("metadata", str(error)))
        case StoreError():
            log.error("request %s: %s", request_id, error)
            message = "the store cannot be read or written just now; what was answered before is safe: try again"
            return ApiError(503, "store_unavailable", message, headers={"retry-after": "5"})
    for kind, (status, code) in _SAID.items():
        if isinstance(error, kind):
            return ApiError(status, code, str(error))
    # A fault of the program. The server logs the traceback right after this line; the client gets none of it.
    log.error("request %s failed: %s", request_id, type(error).__name__)
    message = "the service failed; its log has more under this request id"
    return ApiError(500, "internal", message, headers={"x-request-id": request_id})


def _conflict(request: Request, error: RevisionConflict) -> ApiError:
    """412, with the ETag that would have fitted."""
    try:
        headers = {"etag": etag(collection_of(request), error.revision)}
    except ApiError as dropped:  # while the request was under way
        return dropped
    return ApiError(412, "revision_conflict", str(error), {"revision": error.revision}, headers)


def _not_routed(request: Request, error: HTTPException) -> ApiError:
    """The router's own: no such route, method not allowed."""
    code = {404: "no_route", 405: "wrong_method"}.get(error.status_code, f"http_{error.status_code}")
    advice = "see /docs for the routes" if code == "no_route" else "see /docs"
    message = f"{request.method} {request.url.path[:200]}: {error.detail}; {advice}"
    headers = {name.lower(): value for name, value in (error.headers or {}).items()}
    if error.status_code == 405:  # the router knows only the first route of a path
        headers["allow"] = ", ".join(sorted(_methods(request))) or headers.get("allow", "")
    return ApiError(error.status_code, code, message, headers=headers)


def _methods(request: Request) -> set[str]:
    """What the request's path could be asked with."""
    every: list[BaseRoute] = request.app.routes
    these = [route for route in every if route.matches(request.scope)[0] is not Match.NONE]
    return set().union(*(getattr(route, "methods", None) or () for route in these))


# What says itself what was wrong.
_SAID: dict[type[Exception], tuple[int, str]] = {
    KeyReused: (409, "idempotency_key_reused"),
    SubjectFull: (409, "too_many_samples"),
    LastSample: (409, "last_sample"),
    SubjectUnknown: (404, "no_subject"),
    SampleUnknown: (404, "no_sample"),
    UserError: (422, "invalid"),
}
_HANDLED = (ApiError, HTTPException, RequestValidationError, Closed, GalleryLoading, RevisionConflict, MetadataRefused)
HANDLERS: dict[int | type[Exception], Callable[[Request, Any], Any]]
HANDLERS = dict.fromkeys((*_HANDLED, *_SAID, StoreError, Exception), on_error)
