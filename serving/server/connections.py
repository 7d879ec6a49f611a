"""Limits on connections, below HTTP: how many, how long they may dawdle, how much they may send unasked.

uvicorn has no time limit for the head of a request, for a body that no route reads or for a client that does not take
its answer, no bound on heads and pipelined requests, and it stops accepting when descriptors run out. A connection here
has at all times either a request being answered or a deadline; when there are too many, the one that has been idle for
longest makes room. Trailers are dropped: nobody reads them, and they must not pass for headers.
"""

import asyncio
import json
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serving.errors import ApiError

MAX_HEAD_BYTES = 64 * 1024
MAX_PIPELINED = 16  # requests that a client sends before it has the answer to the first
# What may come around a body: sizes and extensions of chunks, trailers, empty lines. A chunk counts for more than its
# bytes, since it takes the time of some, and every byte of a body makes up for one byte more than itself.
MAX_AROUND_BYTES = 2**20
CHUNK_BYTES = 32
LINGER_S = 2.0  # to read and drop what a refused client is still sending, so that it can read the refusal
# A body that is late is answered with 408 by the Guard; this closes the connection where nobody was reading the body.
GRACE_S = 5.0


@dataclass(frozen=True)
class Room:
    """The connections of one server. `idle` holds those that wait for their client, the longest idle first.

    They have no request under way, or are answered and the client does not take the answer.

    Attributes:
        most: connections.
        head_s: seconds for the head of a request.
        body_s: seconds for its body, and for a client that has stopped taking its answer.
    """

    most: int
    head_s: float
    body_s: float
    idle: "OrderedDict[Guest, None]" = field(default_factory=OrderedDict)

    def enter(self, guest: "Guest", count: int) -> bool:
        """Whether a new connection may stay, now that there are `count`; the longest idle one goes for it."""
        if count > self.most:
            oldest = next(iter(self.idle), guest)
            oldest.transport.abort()
            if oldest is guest:  # all others are being served
                return False
            self.idle.pop(oldest)
        self.idle[guest] = None
        return True


class Abortable(Protocol):
    def abort(self) -> None: ...


class Guest(Protocol):
    """What takes room: a connection, or the handshake before it."""

    @property
    def transport(self) -> Abortable: ...


class Connection(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 connection, with limits."""

    def __init__(self, *arguments: Any, room: Room, arrived: Callable[[], object] = lambda: None, **named: Any) -> None:
        """`arrived`: called first when the connection is made."""
        super().__init__(*arguments, **named)
        self._room, self._arrived = room, arrived
        self._timer: asyncio.TimerHandle | None = None
        self._drain: asyncio.TimerHandle | None = None
        self._in_head, self._head_bytes = False, 0
        self._around = 0  # bytes that were neither head nor body, of one request
        self.lingers = False

    # The connection's life

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._arrived()
        super().connection_made(transport)
        self.transport = _Lingering(transport, self)  # type: ignore[assignment]
        if self._room.enter(self, len(self.connections)):
            self._start_timer(self._room.head_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._room.idle.pop(self, None)
        self._stop_timer()
        self._writable()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.lingers:
            return
        began_before = self._in_head
        self._around += len(data)
        super().data_received(data)
        if self._timer is None and self.timeout_keep_alive_task is None and self in self._room.idle:
            self._start_timer(self._room.head_s)  # something came that began no request: an empty line
        if self._in_head and began_before:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(431, "head_too_large", f"the request's head has more than {MAX_HEAD_BYTES} bytes")
        elif self._around > MAX_AROUND_BYTES and not self.transport.is_closing():
            self._refuse(400, "bad_request", "the body comes in too small pieces, or with too much around it")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._room.idle[self] = None
        self._drain = self._drain or self.loop.call_later(self._room.body_s, self._abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._writable()
        if self.cycle is not None and not self.cycle.response_complete:
            self._room.idle.pop(self, None)

    # The request's life, as the parser tells it

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes, self._around = True, 0, 0
        if self in self._room.idle:  # not one that was sent ahead
            self._start_timer(self._room.head_s)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:
            super().on_header(name, value)

    def on_chunk_header(self) -> None:
        self._around += CHUNK_BYTES

    def on_body(self, body: bytes) -> None:
        self._around = max(0, self._around - 2 * len(body))
        super().on_body(body)

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            raise httptools.HttpParserError(f"more than {MAX_PIPELINED} requests were sent ahead")
        self._in_head = False
        self._one_host()
        self._room.idle.pop(self, None)
        self._start_timer(self._room.body_s + GRACE_S)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._stop_timer()
        if self.cycle is not None and self.cycle.response_complete and not self.transport.is_closing():
            self._room.idle[self] = None  # answered before the body had come
            self._start_timer(self._room.head_s)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.timeout_keep_alive_task is not None:  # no request is left
            self._room.idle[self] = None
            if self._timer is not None:  # but some of its body, which nobody reads
                self._start_timer(LINGER_S)

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "bad_request", "this is not an HTTP/1.1 request that can be read")

    def linger(self) -> bool:
        """Whether the client is still sending, and is given a moment to read its answer before the connection ends."""
        if self._timer is None:
            return False
        self.lingers = True
        self.flow.resume_reading()
        self._start_timer(LINGER_S)
        return True

    # Means

    def _one_host(self) -> None:
        """A request names one host; one in its target goes before the header (RFC 9112, 3.2)."""
        hosts = [value for name, value in self.headers if name == b"host"]
        if len(hosts) > 1 or (not hosts and self.parser.get_http_version() == "1.1"):
            raise httptools.HttpParserError("a request needs one Host header")
        target = httptools.parse_url(self.url)
        if target.host is not None:
            host = b"[%s]" % target.host if b":" in target.host else target.host
            host += b":%d" % target.port if target.port else b""
            self.headers[:] = [(name, host if name == b"host" else value) for name, value in self.headers]

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer what never became a request, in the shape of all errors, and close."""
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self._abort()  # in the middle of an answer the refusal would pass for a part of it
            return
        body = json.dumps(ApiError(status, code, message).body(uuid.uuid4().hex)).encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _writable(self) -> None:
        if self._drain is not None:
            self._drain.cancel()
            self._drain = None

    def _abort(self) -> None:
        self.transport.abort()


class _Lingering:
    """A transport that closes its own direction first while the client is sending.

    Closed at once, the kernel would answer what still comes with a reset, and a reset takes the answer with it that the
    client has not read yet.
    """

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
        self._transport, self._connection = transport, connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._connection.lingers or self._transport.is_closing()

    def write(self, data: bytes) -> None:
        if not self.is_closing():  # the client may have gone, which uvicorn learns later
            self._transport.write(data)

    def close(self) -> None:
        if not self.is_closing() and self._connection.linger():
            if self._transport.can_write_eof():  # TLS cannot; the client goes by the answer's length
                self._transport.write_eof()
        elif not self._connection.lingers:
            self._transport.close()
