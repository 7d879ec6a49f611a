"""What stands before every route: request ids, the key, limits of rate, size, time and number. Plain ASGI.

All of it happens before a body is parsed, and most of it before a body is read.
"""

import asyncio
import re
import time
import uuid

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.access.keyring import Keyring, sent_key
from serving.access.limits import RateLimit
from serving.access.scopes import ANONYMOUS, Caller
from serving.errors import ApiError, stopping
from serving.settings import Settings
from serving.telemetry.logs import REQUEST
from serving.telemetry.metrics import Metrics
from serving.wire.openapi import OPEN_PATHS

ASSETS = "/docs-assets"  # the script and the style sheet of /docs
REQUEST_ID = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
UNANSWERED: int = 0  # in place of a status
HEADERS = ((b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff"))  # answers are about people


class Guard:
    """ASGI middleware: gives each request its id, refuses what is not allowed, and counts what was answered."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, keyring: Keyring) -> None:
        self._app, self._settings, self._metrics, self._keyring = app, settings, metrics, keyring
        self._rate = RateLimit(settings.rate_limit, settings.rate_burst) if settings.rate_limit else None
        self._under_way, self._buffered = 0, 0  # requests; bytes of their bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        sent_id = headers.get(b"x-request-id", b"")
        request_id = sent_id.decode() if REQUEST_ID.fullmatch(sent_id) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        REQUEST.set(request_id)
        start, status = time.perf_counter(), UNANSWERED

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = ((b"x-request-id", request_id.encode()), *HEADERS)
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        body = _Body(receive, self._settings.body_timeout_s)
        # Whoever has no key must not be able to fill the room of those who have.
        counts = not _is_open(scope["path"])
        self._under_way += counts
        try:
            caller = self._admit(scope, headers)
            scope["state"]["caller"] = caller or ANONYMOUS
            scope["state"]["trusted"] = caller is not None and caller.collections is None
            await self._app(scope, lambda: self._receive(body), answer)
        except ApiError as error:
            await as_response(error, request_id)(scope, receive, answer)
        except asyncio.CancelledError:  # the time for finishing after SIGTERM is over
            if status == UNANSWERED:
                await as_response(stopping(), request_id)(scope, receive, answer)
        finally:
            self._under_way -= counts
            self._buffered -= body.received
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.answered(route, scope["method"], status or 500, time.perf_counter() - start)

    def _admit(self, scope: Scope, headers: dict[bytes, bytes]) -> Caller | None:
        """Who is asking; None for nobody known. Raises ApiError where a request is refused unread."""
        client, asked = scope["client"][0] if scope.get("client") else "", self._keyring.asked
        if _is_open(scope["path"]):
            if asked and scope["path"] == "/readyz" and sent_key(headers):
                return self._keyring.check(headers, client)
            return None if asked else ANONYMOUS
        if self._rate is not None:
            self._rate.check(client)
        if asked:
            caller = self._keyring.check(headers, client)
        else:
            caller = ANONYMOUS
            _refuse_other_sites(headers)
        if self._under_way > self._settings.max_requests:
            message = f"{self._settings.max_requests} requests are under way, as many as are allowed; try again"
            raise ApiError(503, "overloaded", message, headers={"retry-after": "1"})
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._settings.max_body_bytes:
            raise self._too_large()
        return caller

    async def _receive(self, body: "_Body") -> Message:
        """The next piece of a body, counted, whatever the client said in its headers."""
        message = await body.next()
        size = len(message.get("body", b""))
        body.received += size
        self._buffered += size
        if body.received > self._settings.max_body_bytes:
            raise self._too_large()
        if self._buffered > self._settings.max_buffered_bytes:
            most = self._settings.max_buffered_bytes
            told = f"requests under way hold {most} bytes, as many as are allowed; try again"
            raise ApiError(503, "overloaded", told, headers={"retry-after": "1", "connection": "close"})
        return message

    def _too_large(self) -> ApiError:
        limit = self._settings.max_body_bytes
        message = f"the request has more than {limit} bytes; send fewer or smaller images"
        return ApiError(413, "body_too_large", message, {"max_bytes": limit}, {"connection": "close"})


class _Body:
    """One request's body: how much has come, and until when it has to be here."""

    def __init__(self, receive: Receive, seconds: float) -> None:
        self._receive, self._seconds = receive, seconds
        self._deadline = time.monotonic() + seconds
        self._complete = False
        self.received = 0

    async def next(self) -> Message:
        """The next message. Raises ApiError 408 when the body is late."""
        if self._complete:
            return await self._receive()  # waits for the client to go
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                message = await self._receive()
        except TimeoutError as error:
            told = f"the request had not arrived whole after {self._seconds:g} s; send it again"
            raise ApiError(408, "body_late", told, headers={"connection": "close"}) from error
        self._complete = not message.get("more_body", False)
        return message


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(f"{ASSETS}/")


def _refuse_other_sites(headers: dict[bytes, bytes]) -> None:
    """Without a key, refuse what a web page of another site sends.

    A browser lets any page post a form to this machine, under this machine's own Host, though the page cannot read the
    answer; it says in Origin where the page is from (Fetch standard, "HTTP extensions"). Other clients send no Origin.
    """
    origin = headers.get(b"origin")
    if origin is not None and _host_name(origin) != _host_name(headers.get(b"host", b"")):
        told = "a web page of another site sent this, and without a key only pages of this service may; "
        raise ApiError(403, "other_site", f"{told}open /docs here, or have the operator set a key")


def _host_name(origin: bytes) -> bytes:
    return re.sub(rb":\d+$", b"", origin.rpartition(b"//")[2]).lower()


def as_response(error: ApiError, request_id: str) -> JSONResponse:
    """The answer to what was refused."""
    return JSONResponse(error.body(request_id), error.status, error.headers)
