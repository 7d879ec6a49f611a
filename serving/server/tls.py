"""TLS: the certificate, which is read anew on SIGHUP, and handshakes, which count and are timed as connections are."""

import asyncio
import contextlib
import logging
import os
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serving.server.connections import LINGER_S, Connection, Room
from trainer.errors import UserError

log = logging.getLogger("hypersphere.serving")


class Certificate:
    """A server's certificate with its key, and the context that new connections get."""

    def __init__(self, cert: Path | None, key: Path | None) -> None:
        """`key`: None where it is in the same file. Raises UserError where they cannot be used."""
        if cert is None:
            raise UserError("--tls-key needs the certificate that it belongs to; give --tls-cert, too")
        self._cert, self._key = cert, key
        self.context = self._read()

    def reload(self) -> None:
        """Take what is in the files now; where it cannot be used, go on with what was before, and log it."""
        try:
            self.context = self._read()
            log.info("the certificate '%s' was read anew", self._cert)
        except UserError as error:
            log.error("%s; the one before stays in use", error)

    def _read(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(self._cert, self._key, password="")  # without one, OpenSSL asks the terminal
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            files = f"'{self._cert}'" + (f" with the key '{self._key}'" if self._key else "")
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            raise UserError(
                f"the certificate {files} cannot be used: {reason}; give PEM files that belong together, the key "
                "without a passphrase"
            ) from error
        return context


class Handshake(asyncio.Protocol):
    """A connection until it is encrypted. It takes room, and makes room, as one does.

    It hands its socket to the event loop, which offers no other way to give a handshake of its own a deadline.
    """

    def __init__(self, certificate: Certificate, room: Room, make: Callable[..., Connection], every: set[Any]) -> None:
        """`make`: the Connection, given what to call when it begins. `every`: uvicorn's set of connections."""
        self._certificate, self._room, self._make, self._every = certificate, room, make, every
        self.transport = self  # what is aborted when others need the room
        self._handed_over = False
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        try:
            taken = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
        except OSError:  # no descriptor is left
            return
        finally:
            transport.abort()  # type: ignore[attr-defined]  # nothing was read yet, and the socket lives on
        taken.setblocking(False)
        self._every.add(self)
        if self._room.enter(self, len(self._every)):
            self._task = asyncio.get_running_loop().create_task(self._shake(taken))
            self._task.add_done_callback(lambda _: self._ended(taken))
        else:
            self._ended(taken)

    def abort(self) -> None:
        if self._task is not None:
            self._task.cancel()

    shutdown = abort  # uvicorn is stopping

    async def _shake(self, taken: socket.socket) -> None:
        self._handed_over = True
        with contextlib.suppress(OSError):  # late, gone, or no TLS that we speak
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: self._make(arrived=self._leave),
                taken,
                ssl=self._certificate.context,
                ssl_handshake_timeout=self._room.head_s,
                ssl_shutdown_timeout=LINGER_S,
            )

    def _ended(self, taken: socket.socket) -> None:
        self._leave()
        if not self._handed_over:  # aborted before it began
            taken.close()

    def _leave(self) -> None:
        self._every.discard(self)
        self._room.idle.pop(self, None)
