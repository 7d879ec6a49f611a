"""Many clients at once, who keep what they take: connections, memory and time. Each on one event loop of its own."""

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass

from tests.serving.hostile.wire import Address, form, part, statuses

MIB = 2**20
NEVER = float("inf")


@dataclass(frozen=True)
class Met:
    """What a client saw: the last status (0: none), and after how many seconds the server closed the connection."""

    status: int
    seconds: float


async def converse(to: Address, pieces: AsyncIterator[bytes], patience: float) -> Met:
    """Send the pieces as they come, and listen until the server closes the connection."""
    start, heard, seconds = time.monotonic(), b"", NEVER
    try:
        reader, writer = await asyncio.open_connection(*to)
    except OSError:
        return Met(0, 0)
    sender = asyncio.create_task(_send(writer, pieces))
    try:
        async with asyncio.timeout(patience):
            while piece := await reader.read(2**16):
                heard += piece
        seconds = time.monotonic() - start
    except TimeoutError:
        pass
    except OSError:
        seconds = time.monotonic() - start
    sender.cancel()
    writer.transport.abort()
    return Met(statuses(heard)[-1], seconds)


async def _send(writer: asyncio.StreamWriter, pieces: AsyncIterator[bytes]) -> None:
    with contextlib.suppress(OSError):
        async for piece in pieces:
            writer.write(piece)
            await writer.drain()


async def drip(request: bytes, every: float = 1.0) -> AsyncIterator[bytes]:
    """Byte by byte."""
    for byte in request:
        yield bytes([byte])
        await asyncio.sleep(every)


async def hold_back(request: bytes, seconds: float) -> AsyncIterator[bytes]:
    """All but the last byte, evenly over the time."""
    step = MIB
    steps = max(1, len(request) // step)
    for start in range(0, len(request) - 1, step):
        yield request[start : min(start + step, len(request) - 1)]
        await asyncio.sleep(seconds / steps)
    yield request[-1:]


async def nothing() -> AsyncIterator[bytes]:
    """A connection, and not a byte."""
    for never in ():
        yield never


async def at_once(request: bytes) -> AsyncIterator[bytes]:
    yield request


async def after_head(request: bytes, every: float = 1.0) -> AsyncIterator[bytes]:
    """The head at once, the body byte by byte."""
    head, _, body = request.partition(b"\r\n\r\n")
    yield head + b"\r\n\r\n"
    async for byte in drip(body, every):
        yield byte


def crowd(to: Address, members: Iterable[AsyncIterator[bytes]], patience: float) -> list[Met]:
    """All at the same time."""

    async def meet() -> list[Met]:
        return list(await asyncio.gather(*(converse(to, member, patience) for member in members)))

    return asyncio.run(meet())


def large_form(size: int) -> bytes:
    return form(part(b"x" * size, "images") + b"--b--\r\n", "/v1/embed")


@contextlib.contextmanager
def deaf(to: Address, clients: int, request: bytes) -> Iterator[None]:
    """Clients that ask, and never read the answers."""
    with contextlib.ExitStack() as stack:
        for _ in range(clients):
            wire = stack.enter_context(socket.socket())
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            wire.connect(to)
            wire.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                wire.sendall(request)
        yield


def hang_up_midway(to: Address, request: bytes) -> None:
    """Send all but the end, and reset the connection."""
    with socket.create_connection(to) as wire, contextlib.suppress(OSError):
        wire.sendall(request[:-100])
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
