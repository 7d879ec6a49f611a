"""Requests as raw bytes, as no client library would send them, and what comes back."""

import contextlib
import re
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

Address = tuple[str, int]
REFUSED = frozenset({400, 413, 415, 422})
CLOSED = 0  # in place of a status: the connection ended, or nothing more came, without an answer
PATIENCE_S, QUIET_S = 60.0, 1.0


@dataclass(frozen=True)
class Attack:
    """One request: how its bytes are made, and the statuses that may answer it."""

    request: Callable[[], bytes]
    allowed: frozenset[int] = REFUSED
    hang_up: bool = field(default=False, kw_only=True)  # close our side when all is sent


def address(url: str) -> Address:
    host, port = url.removeprefix("http://").rsplit(":", 1)
    return host, int(port)


def http(method: str, target: str, body: bytes = b"", *headers: str, length: bool = True) -> bytes:
    """A request that asks for the connection to be closed after it."""
    lines = [f"{method} {target} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", *headers]
    if length and (body or method in ("POST", "PUT")):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def json(body: bytes, target: str = "/v1/identify", method: str = "POST") -> bytes:
    return http(method, target, body, "Content-Type: application/json")


def enrolment(body: bytes) -> bytes:
    return json(body, "/v1/subjects/bomb/samples")


def form(body: bytes, target: str = "/v1/identify", parameters: str = "; boundary=b") -> bytes:
    return http("POST", target, body, f"Content-Type: multipart/form-data{parameters}")


def part(content: bytes, name: str = "image", *headers: bytes) -> bytes:
    """A file in a form whose boundary is `b`."""
    disposition = f'Content-Disposition: form-data; name="{name}"; filename="photo"'.encode()
    return b"\r\n".join([b"--b", disposition, *headers, b"", content, b""])


def image_form(content: bytes) -> bytes:
    return form(part(content) + b"--b--\r\n")


def chunked(
    body: bytes, size: int, target: str = "/v1/identify", kind: str = "multipart/form-data; boundary=b"
) -> bytes:
    """The body in chunks of so many bytes."""
    head = http("POST", target, b"", f"Content-Type: {kind}", "Transfer-Encoding: chunked", length=False)
    pieces = (body[start : start + size] for start in range(0, len(body), size))
    return head + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def speak(to: Address, pieces: Iterable[bytes], hang_up: bool = False, source: str = "") -> bytes:
    """All that the server answers until it closes the connection, or falls silent after it has answered."""
    heard = bytearray()
    with socket.create_connection(to, PATIENCE_S, (source, 0) if source else None) as wire:
        sender = threading.Thread(target=_send, args=(wire, pieces, hang_up))
        sender.start()
        with contextlib.suppress(OSError):  # reset, or silent: what was heard before is the answer
            while piece := wire.recv(2**16):
                heard += piece
                wire.settimeout(QUIET_S)
        with contextlib.suppress(OSError):
            wire.shutdown(socket.SHUT_RDWR)
        sender.join()
    return bytes(heard)


def _send(wire: socket.socket, pieces: Iterable[bytes], hang_up: bool) -> None:
    with contextlib.suppress(OSError):  # the server may refuse before it has everything
        for piece in pieces:
            wire.sendall(piece)
        if hang_up:
            wire.shutdown(socket.SHUT_WR)


def statuses(heard: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3}) ", heard)] or [CLOSED]
