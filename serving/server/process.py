"""The process around the app: who is served, the listening socket, connections and their limits, logs, signals."""

import asyncio
import contextlib
import functools
import logging
import logging.config
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn

from serving.access.keyring import asks_for_keys
from serving.api import create_app
from serving.server.connections import Connection, Room
from serving.server.tls import Certificate, Handshake
from serving.service import Service
from serving.settings import Settings
from serving.telemetry import logs, tracing
from trainer.errors import UserError

log = logging.getLogger("hypersphere.serving")
LOOPBACK = ("127.0.0.1", "::1", "localhost")
SPARE_FILES = 64  # descriptors for all but connections, decoders and further collections: store, logs, libraries
FILES_A_WORKER = 4  # its decoder's pipes: three, and one while it is started
FILES_A_COLLECTION = 10  # its store's: the file, its log and their index thrice, the mark
SECONDS_TO_CLOSE = 2  # of `shutdown_s`, kept for closing the store after the last answer


def run(settings: Settings, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT, then finish the requests under way and close the store. Port 0: a free one.

    Raises:
        UserError: as `create_app`; the address may not be served or cannot be listened on; the store is damaged.
    """
    allowed, certificate = host_names(settings, host), None
    if settings.tls_cert or settings.tls_key:
        certificate = Certificate(settings.tls_cert, settings.tls_key)
    listener = _listen(host, port)
    with listener, contextlib.ExitStack() as opened:
        faults: list[UserError] = []

        def on_fault(error: UserError) -> None:
            faults.append(error)
            server.should_exit = True

        if settings.traces:
            opened.enter_context(tracing.start(settings.traces))
        logging.config.dictConfig(logs.config(settings.log_format))
        app = create_app(settings, allowed, on_fault)
        service: Service = app.state.service
        opened.callback(service.close)
        server = _Server(_config(app, settings, certificate), service)
        scheme, named = "https" if certificate else "http", f"[{host}]" if ":" in host else host
        address = f"{scheme}://{named}:{listener.getsockname()[1]}"
        for collection in service.collections.all():
            state = collection.gallery.enrolled()
            if settings.restored:
                told = "the store is taken as it is, at change %d; the next start goes without --restored"
                log.warning(told, state.revision)
            held = f"{state.subjects} subjects with {state.samples} samples in {collection.gallery.path}"
            print(f"Model {collection.model.model_id}: {held}")
        print(f"Serving on {address}; documentation: {address}/docs", flush=True)
        with _signals_taken(server, certificate):
            server.run(sockets=[listener])
    if faults:
        raise faults[0]


def host_names(settings: Settings, host: str) -> list[str]:
    """The Host headers that are answered at `host`. Without a key only this machine is served, unless it is said.

    A proxy on this machine serves others, so where one is trusted the loopback needs a key as well.

    A web page that a user opens can send requests to this machine under a name of its own (DNS rebinding), but neither
    a Host of this machine nor a key: that is what the Host header is checked for.

    Raises:
        UserError: `host` reaches beyond this machine and there is neither a key nor `anonymous`.
    """
    named = [name.strip() for name in settings.allowed_hosts.split(",") if name.strip()]
    alone, keys = host in LOOPBACK and not settings.trusted_proxies, asks_for_keys(settings)
    if host in LOOPBACK and (alone or keys):
        return named or [*LOOPBACK, "[::1]"]
    if keys:
        return named or ["*"]
    if not settings.anonymous:
        at = f"{host} behind a proxy" if settings.trusted_proxies else host
        raise UserError(
            f"serving at {at} without a key would let whoever reaches it search and erase the gallery; make one with "
            "`hypersphere keys create` or set HYPERSPHERE_API_KEY, serve at 127.0.0.1, or add --anonymous to serve "
            "everybody"
        )
    if not named:
        raise UserError(
            f"serving everybody at {host} needs the host names that clients use, so that no web page can pass itself "
            "off as one: add --allowed-hosts NAME,NAME, or '*' for any"
        )
    return named


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # IPPROTO_TCP spelled out: asyncio turns Nagle's algorithm off only on sockets that say they are TCP, and with it
    # on, every answer on a kept-alive connection waits some 40 ms for the client's delayed acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1024)
    except (OSError, UnicodeError) as error:  # the second: a name that cannot be one
        listener.close()
        reason = error.strerror if isinstance(error, OSError) else "this is not a host name"
        raise UserError(f"cannot listen on {host}:{port}: {reason}; choose another --host or --port") from error
    return listener


def _config(app: Any, settings: Settings, certificate: Certificate | None) -> uvicorn.Config:
    room = Room(_connections(settings), settings.head_timeout_s, settings.body_timeout_s)

    def connection(**named: Any) -> asyncio.Protocol:  # uvicorn calls it as it would the class
        make = functools.partial(Connection, room=room, **named)
        return Handshake(certificate, room, make, named["server_state"].connections) if certificate else make()

    return uvicorn.Config(
        app,
        http=connection,  # type: ignore[arg-type]
        access_log=False,  # paths name subjects
        server_header=False,
        ws="none",
        lifespan="on",
        log_config=logs.config(settings.log_format),
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=max(1, settings.shutdown_s - settings.drain_seconds - SECONDS_TO_CLOSE),
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=settings.trusted_proxies or None,
    )


def _connections(settings: Settings) -> int:
    """As many connections as asked for, or as the process may have descriptors for; the soft limit is raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    collections = settings.max_collections if settings.store.is_dir() else 0
    spare = SPARE_FILES + FILES_A_WORKER * settings.workers * len(settings.embedder) + FILES_A_COLLECTION * collections
    most = settings.max_connections
    wanted = most + spare
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        return max(8, min(most, soft - spare))
    return most


class _Server(uvicorn.Server):
    """Before it stops, /readyz says for a while that it will, so that no load balancer sends more; a second signal
    stops it at once."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        seconds = self._service.settings.drain_seconds
        if not seconds or self._service.draining:
            super().handle_exit(sig, frame)
            return
        self._service.draining = True
        log.info("/readyz says 503 from now on; connections are closed in %d s", seconds)
        timer = threading.Timer(seconds, super().handle_exit, (sig, frame))
        timer.daemon = True
        timer.start()


@contextlib.contextmanager
def _signals_taken(server: uvicorn.Server, certificate: Certificate | None = None) -> Iterator[None]:
    """uvicorn raises the signal that stopped it once more when it is done; here it has been obeyed by then.

    A signal that comes before uvicorn listens to signals stops it, too.
    """

    def stop(*_: object) -> None:
        server.should_exit = True

    taken: dict[signal.Signals, Callable[..., object]] = {signal.SIGINT: stop, signal.SIGTERM: stop}
    if certificate is not None:
        taken[signal.SIGHUP] = lambda *_: certificate.reload()
    before = {number: signal.signal(number, handler) for number, handler in taken.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
