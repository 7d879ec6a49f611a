"""What stands before every route: request ids, the key, limits of rate, size, time and number. Plain ASGI.

All of it happens before a body is parsed, and most of it before a body is read.
"""

import asyncio
import hashlib
import hmac
import json
import re
import secrets
import time
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from serving.errors import ApiError
from serving.metrics import Metrics
from serving.settings import Settings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/docs", "/openapi.json"})
ASSETS = "/docs-assets"  # the script and the style sheet of /docs
REQUEST_ID = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
CLIENTS_REMEMBERED = 10_000
HEADERS = ((b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff"))  # answers are about people


class KeyCheck:
    """Compares keys in constant time, as HMAC-SHA-256 under a secret of this process; the key itself is not kept."""

    def __init__(self, key: str) -> None:
        self._secret = secrets.token_bytes(32)
        self._digest = self._hash(key.encode())

    def _hash(self, key: bytes) -> bytes:
        return hmac.digest(self._secret, key, hashlib.sha256)

    def check(self, headers: dict[bytes, bytes]) -> None:
        """Raises ApiError 401 without a key, 403 with a wrong one."""
        scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        key = bearer.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        if not key:
            raise ApiError(
                401,
                "key_missing",
                "this service asks for a key; send 'Authorization: Bearer KEY' or 'X-API-Key: KEY'",
                headers={"www-authenticate": "Bearer"},
            )
        if not hmac.compare_digest(self._hash(key), self._digest):
            raise ApiError(403, "key_wrong", "the key is not one of this service's; ask its operator for one")


class RateLimit:
    """A token bucket per client address: `burst` requests at once, then `rate` a second."""

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, and when they were counted

    def check(self, client: str) -> None:
        """Raises ApiError 429, with the time to wait, when the client's bucket is empty."""
        now = self._clock()
        tokens, then = self._buckets.pop(client, (float(self._burst), now))
        tokens = min(self._burst, tokens + (now - then) * self._rate)
        allowed = tokens >= 1
        self._buckets[client] = (tokens - 1 if allowed else tokens, now)
        if len(self._buckets) > CLIENTS_REMEMBERED:
            self._buckets.popitem(last=False)  # the one that has been quiet for longest
        if not allowed:
            wait = max(1, round((1 - tokens) / self._rate + 0.5))
            raise ApiError(
                429,
                "too_many_requests",
                f"more than {self._rate:g} requests a second came from this address; wait {wait} s",
                {"limit_per_second": self._rate},
                {"retry-after": str(wait)},
            )


class Guard:
    """ASGI middleware: gives each request its id, refuses what is not allowed, and counts what was answered."""

    def __init__(self, app: App, settings: Settings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._key = KeyCheck(settings.api_key.get_secret_value()) if settings.api_key else None
        self._rate = RateLimit(settings.rate_limit, settings.rate_burst) if settings.rate_limit else None
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        sent_id = headers.get(b"x-request-id", b"")
        request_id = sent_id.decode() if REQUEST_ID.fullmatch(sent_id) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        start, status = time.perf_counter(), 500  # of a request that fails without an answer

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = ((b"x-request-id", request_id.encode()), *HEADERS)
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        self._under_way += 1
        try:
            self._admit(scope, headers)
            await self._app(scope, self._limited(receive), answer)
        except ApiError as error:
            await _send(answer, error, request_id)
        finally:
            self._under_way -= 1
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.answered(route, scope["method"], status, time.perf_counter() - start)

    def _admit(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Raises ApiError for a request that is refused without reading its body."""
        if scope["path"] in OPEN_PATHS or scope["path"].startswith(f"{ASSETS}/"):
            return
        if self._rate is not None:
            self._rate.check(scope["client"][0] if scope.get("client") else "")
        if self._key is not None:
            self._key.check(headers)
        if self._under_way > self._settings.max_requests:
            raise ApiError(
                503,
                "overloaded",
                f"{self._settings.max_requests} requests are under way, as many as are allowed; try again",
                headers={"retry-after": "1"},
            )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._settings.max_body_bytes:
            raise self._too_large()

    def _limited(self, receive: Receive) -> Receive:
        """`receive` that counts bytes and time, whatever the client said in its headers."""
        received, complete = 0, False
        deadline = time.monotonic() + self._settings.body_timeout_s

        async def limited() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError as error:
                raise ApiError(
                    408,
                    "body_late",
                    f"the request had not arrived whole after {self._settings.body_timeout_s:g} s; send it again",
                    headers={"connection": "close"},
                ) from error
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > self._settings.max_body_bytes:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> ApiError:
        limit = self._settings.max_body_bytes
        return ApiError(
            413,
            "body_too_large",
            f"the request has more than {limit} bytes; send fewer or smaller images",
            {"max_bytes": limit},
            {"connection": "close"},
        )


async def _send(send: Send, error: ApiError, request_id: str) -> None:
    body = json.dumps(error.body(request_id)).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
