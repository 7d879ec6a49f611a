"""TLS with certificates that openssl made, and a real client: service, reload, and the limits below HTTP."""

import contextlib
import shutil
import signal
import socket
import ssl
import subprocess
import time

import pytest

from serving.server.tls import Certificate
from serving.settings import from_values
from tests.serving.asking import enrol, identify, refused
from trainer.errors import UserError


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Makes a certificate for 127.0.0.1; its files."""

    def make(name, *options):
        folder = tmp_path_factory.mktemp(name)
        cert, key = folder / "cert.pem", folder / "key.pem"
        made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-days", "2"]
        named = ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert]
        subprocess.run([*made, *named, *(options or ["-nodes"])], check=True, capture_output=True)
        return cert, key

    return make


@pytest.fixture(scope="module")
def first(make):
    return make("first")


@pytest.fixture
def https(serve, first, tmp_path):
    """Starts servers with the first certificate, in files that may be replaced."""
    cert, key = (shutil.copy(file, tmp_path / file.name) for file in first)

    def start(**settings):
        return serve(tls_cert=cert, tls_key=key, **settings)

    return start


def address(server):
    return "127.0.0.1", int(server.url.rpartition(":")[2])


def subject(server):
    """The common name of the certificate that a new connection is shown."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(address(server), 10) as raw, context.wrap_socket(raw) as secure:
        shown = secure.getpeercert(binary_form=True)
    decoded = ["openssl", "x509", "-inform", "DER", "-noout", "-subject"]
    return subprocess.run(decoded, input=shown, check=True, capture_output=True).stdout.decode()


def closed(connection, seconds):
    """Whether the server ends the connection within that time."""
    connection.settimeout(seconds)
    try:
        while connection.recv(4096):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def test_the_service_over_tls(https, photos):
    server = https(max_body_bytes=20_000)
    assert server.url.startswith("https://")
    assert enrol(server, "alice", photos(1)).status_code == 201
    assert identify(server, photos(1, 1)).json()["decision"] == "match"
    refused(server.http.post("/v1/identify", content=bytes(3_000_000)), 413, "body_too_large")
    with socket.create_connection(address(server), 10) as plain:  # no TLS, and nothing told
        plain.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        plain.settimeout(10)
        assert b"HTTP" not in plain.recv(4096)
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection(address(server), 10) as raw, pytest.raises((ssl.SSLError, OSError)):
        old.wrap_socket(raw)
    assert server.end() == 0
    assert "Traceback" not in "".join(server.output)


def test_sighup_takes_the_new_certificate_and_keeps_connections(https, make, tmp_path):
    server = https()
    assert "first" in subject(server)
    assert server.http.get("/healthz").status_code == 200
    for file in make("second"):
        shutil.copy(file, tmp_path / file.name)
    server.process.send_signal(signal.SIGHUP)
    end = time.monotonic() + 10
    while "second" not in subject(server):
        assert time.monotonic() < end
    assert server.http.get("/healthz").status_code == 200  # on the connection of before
    (tmp_path / "key.pem").write_text("no key")
    server.process.send_signal(signal.SIGHUP)
    end = time.monotonic() + 10
    while "stays in use" not in "".join(server.output):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert "second" in subject(server)
    assert server.end() == 0


def test_connections_without_a_handshake_make_room_and_end(https):
    server = https(max_connections=8, head_timeout_s=1)
    server.http.close()
    with contextlib.ExitStack() as opened:
        silent = [opened.enter_context(socket.create_connection(address(server), 10)) for _ in range(30)]
        with server.client() as client:
            assert client.get("/healthz").status_code == 200
        assert [closed(connection, 10) for connection in silent] == [True] * 30
    with socket.create_connection(address(server), 10) as half:
        half.sendall(b"\x16\x03\x01\x02\x00\x01")  # a ClientHello that stops
        assert closed(half, 10)
    with (
        socket.create_connection(address(server), 10) as raw,
        server.trust.wrap_socket(raw, server_hostname="127.0.0.1") as secure,
    ):
        secure.sendall(b"GET /healthz HTTP/1.1\r\n")  # a head that stops
        assert closed(secure, 10)
    server.http = server.client()
    assert server.http.get("/healthz").status_code == 200
    assert server.end() == 0


def test_a_stop_does_not_wait_for_handshakes(https):
    server = https(shutdown_s=20)
    with socket.create_connection(address(server), 10):
        start = time.monotonic()
        assert server.end() == 0
        assert time.monotonic() - start < 15


def test_certificates_that_cannot_be_used(make, first, tmp_path):
    other = make("other")
    locked = make("locked", "-passout", "pass:secret")
    for cert, key, told in (
        (first[0], other[1], "belong together"),
        (locked[0], locked[1], "without a passphrase"),
        (tmp_path / "none", first[1], "No such file"),
        (first[1], None, "cannot be used"),
        (None, first[1], "--tls-cert"),
    ):
        with pytest.raises(UserError, match=told):
            Certificate(cert, key)
    both = tmp_path / "both.pem"
    both.write_bytes(first[0].read_bytes() + first[1].read_bytes())
    Certificate(both, None)
    assert from_values({"embedder": "e", "store": "s", "tls_cert": both}).tls_key is None
