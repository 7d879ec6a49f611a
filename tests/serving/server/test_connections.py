"""Limits below HTTP, against the real server: silent and slow clients, too many of them, floods on one connection."""

import contextlib
import json
import re
import socket
import time

import pytest

HEAD = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
SHORT = {"head_timeout_s": 0.5, "body_timeout_s": 0.5, "keep_alive_s": 1, "max_connections": 8}


@pytest.fixture(scope="module")
def hasty(embedder, tmp_path_factory):
    """A server with short times and few connections."""
    from tests.serving.conftest import Server

    server = Server(embedder=embedder, store=tmp_path_factory.mktemp("store") / "gallery.db", **SHORT)
    server.http.close()  # it would be the longest idle
    yield server
    server.kill()


def _address(server):
    host, port = re.fullmatch(r"http://(.*):(\d+)", server.url).groups()
    return host, int(port)


def _connect(server):
    return socket.create_connection(_address(server), timeout=20)


def _until_closed(wire):
    """All that comes until the server closes; reset counts as closed."""
    answer = b""
    with contextlib.suppress(ConnectionError):
        while piece := wire.recv(65536):
            answer += piece
    return answer


def _alive(wire):
    """Whether a request on the connection is answered."""
    wire.sendall(HEAD + b"\r\n")
    answer = b""
    while not answer.endswith(b'{"status":"alive"}') and (piece := wire.recv(65536)):
        answer += piece
    return answer.startswith(b"HTTP/1.1 200")


def _error(answer, status):
    """The body of a refusal that never became a request; it has the shape of all errors."""
    assert answer.startswith(b"HTTP/1.1 %d" % status), answer[:200]
    body = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert set(body) == {"error", "request_id"}
    return body["error"]


@pytest.mark.parametrize(
    "sent",
    [b"", b"\r\n", b"GET", HEAD, HEAD.replace(b"GET", b"POST") + b"Content-Length: 5\r\n\r\n12"],
    ids=["silence", "an empty line", "a word", "half a head", "half a body that no route reads"],
)
def test_whoever_dawdles_is_closed(hasty, sent):
    with _connect(hasty) as wire:
        wire.sendall(sent)
        answer = _until_closed(wire)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 405")


def test_a_byte_now_and_then_is_no_way_around_it(hasty):
    with _connect(hasty) as wire:
        assert _alive(wire)
        start = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for byte in HEAD * 100:
                wire.sendall(bytes([byte]))
                time.sleep(0.1)
                if time.monotonic() - start > 30:
                    pytest.fail("a head that takes 30 s is still read")


def test_an_idle_connection_stays_open_for_the_next_request_and_not_for_ever(hasty):
    with _connect(hasty) as wire:
        for _ in range(3):
            assert _alive(wire)
            time.sleep(0.3)
        assert _until_closed(wire) == b""


def test_the_longest_idle_makes_room_for_a_new_one(hasty):
    with contextlib.ExitStack() as opened:
        silent = [opened.enter_context(_connect(hasty)) for _ in range(30)]
        for wire in (silent[-1], opened.enter_context(_connect(hasty))):
            assert _alive(wire)
        for wire in silent[:20]:
            assert _until_closed(wire) == b""


def test_those_being_served_do_not_make_room(serve, vectors):
    server = serve(max_connections=8, body_timeout_s=20)
    server.http.close()
    with contextlib.ExitStack() as opened:
        for _ in range(8):
            wire = opened.enter_context(_connect(server))
            wire.sendall(
                b"POST /v1/identify HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
            )
        end = time.monotonic() + 10
        while time.monotonic() < end:  # the eight heads have been read as soon as a ninth connection is closed at once
            with _connect(server) as ninth:
                ninth.settimeout(0.5)
                with contextlib.suppress(TimeoutError):
                    if _until_closed(ninth) == b"":
                        break
        else:
            pytest.fail("a ninth connection was let in")
        wire.sendall(b'"a": 1}x')
        assert wire.recv(65536).startswith(b"HTTP/1.1 4")


def test_heads_have_an_end(server):
    for head in (HEAD + b"X-Long: " + b"a" * 200_000, HEAD + b"A: b\r\n" * 40_000, b"GET /" + b"a" * 200_000):
        with _connect(server) as wire:
            with contextlib.suppress(ConnectionError):
                for start in range(0, len(head), 1000):
                    wire.sendall(head[start : start + 1000])
            assert _error(_until_closed(wire), 431)["code"] == "head_too_large"


def test_what_is_not_http_is_told_so(server):
    for sent in (b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\nHost x\r\n\r\n"):
        with _connect(server) as wire:
            wire.sendall(sent + b"\r\n" * 10)
            assert _error(_until_closed(wire), 400)["code"] == "bad_request"


def test_requests_sent_ahead_are_answered_in_order_and_bounded(server):
    few, many = HEAD.replace(b"healthz", b"readyz") + b"\r\n", HEAD + b"\r\n"
    with _connect(server) as wire:
        wire.sendall(few + many * 8 + few.replace(b"t\r\n\r\n", b"t\r\nConnection: close\r\n\r\n"))
        answers = _until_closed(wire)
    assert answers.count(b"HTTP/1.1 200") == 10
    assert answers.index(b'"ready"') < answers.index(b'"alive"') < answers.rindex(b'"ready"')
    with _connect(server) as wire:
        with contextlib.suppress(ConnectionError):
            wire.sendall(many * 100_000)
        assert _until_closed(wire).count(b"HTTP/1.1 200") < 1000
    assert server.http.get("/healthz").status_code == 200


def test_a_client_that_takes_no_answer_is_closed(hasty):
    """It asks for more than the buffers of both kernels hold, and reads none of it until the server has given up."""
    with hasty.client() as http, socket.socket() as wire:
        script = re.search(r'src="([^"]+\.js)"', http.get("/docs").text)[1]
        size = len(http.get(script).content)
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.settimeout(20)
        wire.connect(_address(hasty))
        wire.sendall(f"GET {script} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() * 8)
        time.sleep(2)  # four times as long as the server waits
        assert len(_until_closed(wire)) < 8 * size


def test_the_refusal_of_a_large_body_can_be_read(server):
    """The whole body is sent before anything is read; a connection closed at once would answer it with a reset."""
    for head in (b"Content-Length: 50000000", b"Transfer-Encoding: chunked"):
        with _connect(server) as wire:
            wire.sendall(b"POST /v1/identify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
            wire.sendall(head + b"\r\n\r\n")
            with contextlib.suppress(ConnectionError):  # in the end it is
                for _ in range(400):
                    wire.sendall(b"2710\r\n" + b" " * 10_000 + b"\r\n")
            assert wire.recv(65536).startswith(b"HTTP/1.1 413")


UNREAD = b"POST /v1/identify HTTP/1.1\r\nHost: localhost\r\n"


def test_whoever_is_answered_makes_room_though_the_body_is_not_here(serve):
    server = serve(max_connections=8, api_key="a-key-of-this-very-test")
    server.http.close()
    with contextlib.ExitStack() as opened:
        for _ in range(8):
            wire = opened.enter_context(_connect(server))
            wire.sendall(UNREAD + b"Content-Length: 100000\r\n\r\n")
            assert wire.recv(65536).startswith(b"HTTP/1.1 401")
        assert _alive(opened.enter_context(_connect(server)))


def test_whoever_takes_no_answer_makes_room(serve):
    """And does not count as a request under way where no key is needed."""
    server = serve(max_connections=8, max_requests=2)
    script = re.search(r'src="([^"]+\.js)"', server.http.get("/docs").text)[1]
    ask = f"GET {script} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() * 8
    server.http.close()
    with contextlib.ExitStack() as opened:
        for _ in range(8):
            wire = opened.enter_context(socket.socket())
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            wire.settimeout(20)
            wire.connect(_address(server))
            wire.sendall(ask)
        time.sleep(1)  # until both kernels' buffers are full
        assert _alive(opened.enter_context(_connect(server)))
        with server.client() as http:
            assert http.get("/v1/subjects").status_code == 200


@pytest.mark.parametrize(
    "around",
    [b"0\r\n" + b"a:b\r\n" * 500_000, b"1\r\nx\r\n" * 500_000, b"1;" + b"a" * 2**21],
    ids=["trailers", "chunks of one byte", "an endless extension"],
)
def test_what_comes_around_a_body_is_bounded(server, around):
    part = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    with _connect(server) as wire:
        wire.sendall(UNREAD + b"Content-Type: multipart/form-data; boundary=b\r\nTransfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            wire.sendall(b"%x\r\n%s\r\n" % (len(part), part) + around)
        assert "too small pieces" in _error(wire.recv(65536), 400)["message"]


def test_trailers_are_no_headers(strict):
    key = b"Transfer-Encoding: chunked\r\nContent-Type: application/json\r\nX-Request-ID: sent-as-a-header\r\n\r\n"
    with _connect(strict) as wire:
        wire.sendall(UNREAD + key + b"0\r\nX-Request-ID: sent-as-a-trailer\r\n\r\n")
        assert b"sent-as-a-header" in wire.recv(65536)


def test_a_target_names_its_host_as_a_header_does(server):
    for host, status in ((b"[::1]:8000", b"200"), (b"localhost:8000", b"200"), (b"[::2]", b"400")):
        with _connect(server) as wire:
            wire.sendall(b"GET http://%s/healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % host)
            assert _until_closed(wire).startswith(b"HTTP/1.1 " + status), host
