"""The process around the app: who is served, the listening socket, connections and their limits, logs, signals."""

import contextlib
import functools
import logging
import resource
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from serving.api import create_app
from serving.connections import Connection, Room
from serving.keyring import asks_for_keys
from serving.service import Service
from serving.settings import Settings
from trainer.errors import UserError

log = logging.getLogger("hypersphere.serving")
LOOPBACK = ("127.0.0.1", "::1", "localhost")
SPARE_FILES = 64  # descriptors for all but connections, decoders and further collections: store, logs, libraries
FILES_A_WORKER = 4  # its decoder's pipes: three, and one while it is started
FILES_A_COLLECTION = 10  # its store's: the file, its log and their index thrice, the mark
LINES_A_MINUTE = 20  # of one kind
SECONDS_TO_CLOSE = 2  # of `shutdown_s`, kept for closing the store after the last answer


def run(settings: Settings, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT, then finish the requests under way and close the store. Port 0: a free one.

    Raises:
        UserError: as `create_app`; the address may not be served or cannot be listened on; the store is damaged.
    """
    allowed = host_names(settings, host)
    listener = _listen(host, port)
    with listener, contextlib.ExitStack() as opened:
        faults: list[UserError] = []

        def on_fault(error: UserError) -> None:
            faults.append(error)
            server.should_exit = True

        app = create_app(settings, allowed, on_fault)
        service: Service = app.state.service
        opened.callback(service.close)
        server = uvicorn.Server(_config(app, settings))
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        for collection in service.collections.all():
            state = collection.gallery.enrolled()
            if settings.restored:
                told = "the store is taken as it is, at change %d; the next start goes without --restored"
                log.warning(told, state.revision)
            held = f"{state.subjects} subjects with {state.samples} samples in {collection.gallery.path}"
            print(f"Model {collection.model.model_id}: {held}")
        print(f"Serving on {address}; documentation: {address}/docs", flush=True)
        with _signals_taken(server):
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


def _config(app: Any, settings: Settings) -> uvicorn.Config:
    room = Room(_connections(settings), settings.head_timeout_s, settings.body_timeout_s)
    connection: Any = functools.partial(Connection, room=room)  # uvicorn calls it as it would the class
    return uvicorn.Config(
        app,
        http=connection,
        access_log=False,  # paths name subjects
        server_header=False,
        ws="none",
        lifespan="on",
        log_config=_logs(),
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=max(1, settings.shutdown_s - SECONDS_TO_CLOSE),
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


class Sparing(logging.Filter):
    """Lets through a few lines of a kind a minute, so that no client fills the disk with them."""

    def __init__(self) -> None:
        super().__init__()
        self._kinds: dict[str, tuple[float, int]] = {}  # since when, how many

    def filter(self, record: logging.LogRecord) -> bool:
        since, count = self._kinds.get(kind := f"{record.name}:{record.msg}"[:200], (record.created, 0))
        if record.created - since >= 60:
            since, count = record.created, 0
        if len(self._kinds) > 1000:
            self._kinds.clear()
        self._kinds[kind] = since, count + 1
        if count == LINES_A_MINUTE:
            until = time.strftime("%H:%M:%S", time.localtime(since + 60))
            record.msg, record.args = f"{record.getMessage()} (more lines like this are left out until {until})", None
        return count <= LINES_A_MINUTE


def _logs() -> dict[str, Any]:
    levels = {"uvicorn": "INFO", "hypersphere": "INFO", "asyncio": "WARNING"}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(message)s"}},
        "filters": {"sparing": {"()": Sparing}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line", "filters": ["sparing"]}},
        "loggers": {
            name: {"handlers": ["stderr"], "level": level, "propagate": False} for name, level in levels.items()
        },
    }


@contextlib.contextmanager
def _signals_taken(server: uvicorn.Server) -> Iterator[None]:
    """uvicorn raises the signal that stopped it once more when it is done; here it has been obeyed by then.

    A signal that comes before uvicorn listens to signals stops it, too.
    """

    def stop(*_: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
