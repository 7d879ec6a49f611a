"""The example of a proxy, with a real nginx in front of the real service."""

import re
import shutil
import socket
import ssl
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from tests.serving.conftest import Server, onnx_model, photo, write_embedder

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed (Debian: apt-get install nginx-light)")
KEY = "a-key-of-this-very-test"


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def proxied(root, tmp_path_factory):
    """An https client of nginx with the example's configuration; only names, ports and paths are put in.

    With the server and the folder, where nginx has its log and its temporary files.
    """
    folder = tmp_path_factory.mktemp("proxy")
    embedder = write_embedder(folder / "embedder", onnx_model())
    hosts = {"allowed_hosts": "gallery.example.org", "trusted_proxies": "127.0.0.1"}
    server = Server(embedder=embedder, store=folder / "gallery.db", api_key=KEY, **hosts)
    port = _free_port()
    text = (root / "deploy/proxy/nginx.conf").read_text()
    for old, new in (
        ("/run/hypersphere-nginx.pid", f"{folder}/pid"),
        ("127.0.0.1:8000", server.url.removeprefix("http://")),
        ("listen 443", f"listen 127.0.0.1:{port}"),
        ("/etc/ssl/hypersphere", str(folder)),
        ("access_log off;", f"access_log off; {_folders(folder)}"),
    ):
        assert old in text
        text = text.replace(old, new)
    (folder / "nginx.conf").write_text(text)
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=gallery.example.org",
         "-keyout", f"{folder}/key.pem", "-out", f"{folder}/certificate.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    command = [NGINX, "-c", f"{folder}/nginx.conf", "-g", "daemon off;", "-p", str(folder)]
    with (folder / "log").open("wb") as log:
        nginx = subprocess.Popen(command, stderr=log)
    with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=False, timeout=30) as client:
        client.headers.update({"host": "gallery.example.org", "x-api-key": KEY})
        try:
            _wait(client, nginx)
            yield client, server, folder
        finally:
            nginx.terminate()
            nginx.wait(30)
            server.kill()


def _folders(folder: Path) -> str:
    """nginx makes its folders for temporary files at the start, by default where only root may write."""
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    return " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)


def _wait(client, nginx):
    end = time.monotonic() + 30
    while time.monotonic() < end and nginx.poll() is None:
        try:
            client.get("/healthz")
        except httpx.TransportError:
            time.sleep(0.05)
        else:
            return
    pytest.fail("nginx did not start")


def test_requests_come_through(proxied):
    client, *_ = proxied
    photos = [("images", ("a.png", photo(1, k), "image/png")) for k in range(2)]
    assert client.post("/v1/subjects/ada/samples", files=photos).status_code == 201
    found = client.post("/v1/identify", files={"image": ("p.png", photo(1, 5), "image/png")}).json()
    assert (found["decision"], found["candidates"][0]["subject_id"]) == ("match", "ada")
    assert client.get("/v1/subjects", headers={"host": "elsewhere.example.org"}).status_code == 400
    assert client.get("/v1/subjects", headers={"x-api-key": ""}).status_code == 401


def test_the_client_is_the_one_that_the_service_sees(proxied):
    """Its address is the proxy's word, whatever it says of itself."""
    client, server, _ = proxied
    client.get("/v1/subjects", headers={"x-api-key": "not-the-right-key-at-all", "x-forwarded-for": "10.9.8.7"})
    end = time.monotonic() + 10
    while not (lines := [line for line in server.output if "wrong key" in line]) and time.monotonic() < end:
        time.sleep(0.01)
    assert re.search(r"from 127\.0\.0\.1\b", lines[0]), lines


def test_the_operator_comes_through(proxied):
    client, *_ = proxied
    for path in ("/healthz", "/readyz", "/metrics"):
        assert client.get(path).status_code == 200, path


def test_large_bodies_end_at_the_proxy(proxied):
    client, *_ = proxied
    answer = client.post("/v1/identify", content=b"x" * (33 << 20), headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert "nginx" in answer.text


def test_a_flood_from_one_address_is_held_back(proxied):
    client, server, _ = proxied
    answers = [client.get("/docs").status_code for _ in range(200)]
    assert 429 in answers
    assert server.http.get("/healthz", headers={"host": "gallery.example.org"}).status_code == 200


def test_nothing_of_a_request_or_an_answer_reaches_the_disk(proxied):
    """Paths and answers name subjects: neither the log nor a temporary file may hold them."""
    client, _, folder = proxied
    client.post("/v1/subjects/too-large/samples", content=b"x" * (33 << 20))
    assert 429 in [client.delete(f"/v1/subjects/nobody-{number}").status_code for number in range(200)]
    time.sleep(2.5)  # until the limit lets requests through again
    spools = folder / "proxy"
    script = re.search(r'src="([^"]+\.js)"', client.get("/docs").text)[1]
    changed = spools.stat().st_mtime_ns
    with socket.socket() as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.connect((client.base_url.host, client.base_url.port))
        with ssl._create_unverified_context().wrap_socket(wire) as tls:
            tls.sendall(f"GET {script} HTTP/1.1\r\nHost: gallery.example.org\r\n\r\n".encode() * 6)
            time.sleep(1)  # taking nothing
            assert tls.recv(12) == b"HTTP/1.1 200"
            assert spools.stat().st_mtime_ns == changed
    assert not re.findall("too-large|nobody|docs", (folder / "log").read_text())
