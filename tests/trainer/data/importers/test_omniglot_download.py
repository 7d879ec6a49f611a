import hashlib
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from trainer.data.importers.omniglot import fetch
from trainer.errors import UserError

CONTENT = bytes(range(256)) * 4000
MD5 = hashlib.md5(CONTENT).hexdigest()


def cache_folder() -> Path:
    return Path(os.environ["XDG_CACHE_HOME"]) / "hypersphere"


class Handler(BaseHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        type(self).asked.append(self.path)
        if self.path == "/gone":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT if self.path != "/cut" else CONTENT[:5000])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    Handler.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_downloaded_once_and_kept(server: str):
    told: list[tuple[str, int, int]] = []
    path = fetch(f"{server}/x", MD5, lambda *step: told.append(step))
    assert path == cache_folder() / "omniglot-images_background.zip"
    assert path.read_bytes() == CONTENT
    assert told[-1] == ("download", len(CONTENT), len(CONTENT))
    fetch(f"{server}/x", MD5)
    assert Handler.asked == ["/x"]
    assert [file.name for file in cache_folder().iterdir()] == [path.name]


def test_spoilt_copy_is_fetched_again(server: str):
    fetch(f"{server}/x", MD5).write_bytes(b"spoilt")
    assert fetch(f"{server}/x", MD5).read_bytes() == CONTENT


def test_wrong_content_is_not_kept(server: str):
    with pytest.raises(UserError, match=f"has MD5 {MD5}, not the published {'0' * 32}"):
        fetch(f"{server}/x", "0" * 32)
    assert list(cache_folder().iterdir()) == []


@pytest.mark.parametrize("path", ["/cut", "/gone"])
def test_failed_download_leaves_nothing_and_names_the_way_out(server: str, path: str):
    with pytest.raises(UserError, match=r"SOURCE or in OMNIGLOT_ZIP|not the published"):
        fetch(server + path, MD5)
    assert list(cache_folder().iterdir()) == []


def test_no_network(server: str):
    with pytest.raises(UserError, match=r"cannot download 'http://127\.0\.0\.1:1/x' .*SOURCE or in OMNIGLOT_ZIP"):
        fetch("http://127.0.0.1:1/x", MD5)


def test_endless_download_is_stopped(server: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("trainer.data.importers.omniglot._MAX_DOWNLOAD", 1000)
    with pytest.raises(UserError, match="more than 1000 bytes"):
        fetch(f"{server}/x", MD5)
    assert list(cache_folder().iterdir()) == []
