"""A web server with a long way to it and with faults, for what is read from far away. Serves ranges of files."""

import base64
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

_CHUNK = 2**17


@dataclass
class Web:
    """A served folder, and what goes wrong with it. Files are read anew at each request.

    Attributes:
        folder: what is served.
        latency: seconds before each answer.
        rate: bytes a second of each connection; None: as fast as it goes.
        faults: how many answers of a file are spoilt, by its name, in the way `fault` says: "cut" ends in the middle,
            "busy" is a 503, "silent" closes without a word, "hang" does so after 3 s, "flip" changes its middle byte,
            "trickle" sends twenty bytes a second, for ten seconds.
        password: "user:password" that is asked for.
        token: that the query has to carry.
        ranges: False: answers whole files always.
        requests: answers begun, by file.
        sent: bytes of bodies, by file.
    """

    folder: Path
    latency: float = 0
    rate: float | None = None
    fault: str = "cut"
    faults: Counter[str] = field(default_factory=Counter)
    password: str = ""
    token: str = ""
    ranges: bool = True
    requests: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)
    port: int = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def serving(web: Web, port: int = 0) -> Iterator[Web]:
    """Serve on a free port (or the one given) until the block ends."""

    class Handler(_Handler):
        site = web

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    web.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    site: Web
    protocol_version = "HTTP/1.1"
    wbufsize = _CHUNK  # headers and a small body in one packet

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        site, url = self.site, urlsplit(self.path)
        name = url.path.lstrip("/")
        with site.lock:
            site.requests[name] += 1
            fault = site.fault if site.faults[name] > 0 else ""
            site.faults[name] -= bool(fault)
        time.sleep(site.latency)
        wanted = "Basic " + base64.b64encode(site.password.encode()).decode()
        if (site.password and self.headers["Authorization"] != wanted) or (site.token and site.token not in url.query):
            self._say(401)
        elif not (site.folder / name).is_file():
            self._say(404)
        elif fault == "busy":
            self._say(503)
        elif fault in ("silent", "hang"):
            time.sleep(3 * (fault == "hang"))
            self.close_connection = True
        else:
            self._send(name, fault)

    def _send(self, name: str, fault: str) -> None:
        path = self.site.folder / name
        total = path.stat().st_size
        start, stop = 0, total
        asked = self.headers["Range"] if self.site.ranges else None
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1, total) if last else total
            if start >= total:
                self._say(416)
                return
        with path.open("rb") as file:
            file.seek(start)
            body = bytearray(file.read(stop - start))
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{total}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "flip":
            body[len(body) // 2] ^= 1
        if fault == "trickle":
            self.close_connection = True
            for byte in body[:200]:
                time.sleep(0.05)
                self._write(name, bytes([byte]))
            return
        if fault == "cut":
            body = body[: len(body) // 2]
            self.close_connection = True
        self._write(name, bytes(body))

    def _write(self, name: str, body: bytes) -> None:
        begun = time.monotonic()
        try:
            for start in range(0, len(body), _CHUNK):
                with self.site.lock:
                    self.site.sent[name] += len(body[start : start + _CHUNK])
                self.wfile.write(body[start : start + _CHUNK])
                self.wfile.flush()
                if self.site.rate:
                    due = begun + min(start + _CHUNK, len(body)) / self.site.rate
                    time.sleep(max(0.0, due - time.monotonic()))
        except ConnectionError:  # the client was killed
            self.close_connection = True

    def _say(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()
