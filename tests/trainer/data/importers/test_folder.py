import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from trainer.data.importers import Entry, ImportOptions, Listing, share_held_out
from trainer.data.importers.folder import list_folder, read_folder
from trainer.data.importers.run import run_import
from trainer.errors import UserError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def listed(source: Path | str | None) -> tuple[list[Entry], Listing]:
    listing = list_folder(None if source is None else str(source), ImportOptions(), lambda *_: None)
    return list(listing.entries), listing


def test_folders_are_identities_at_any_depth(tmp_path: Path):
    touch(tmp_path, "b/2.png", "b/10.png", "a/x/1.png", "a/y/1.png", "a/0.png")
    entries, listing = listed(tmp_path)
    assert [(entry.identity, entry.name, entry.size) for entry in entries] == [
        ("a", "a/0.png", 7),
        ("a/x", "a/x/1.png", 9),
        ("a/y", "a/y/1.png", 9),
        ("b", "b/10.png", 8),
        ("b", "b/2.png", 7),
    ]
    assert read_folder(listing.source, ImportOptions())(entries[3].place) == b"b/10.png"


def test_litter_and_empty_folders_are_passed_over(tmp_path: Path):
    touch(tmp_path, "a/1.png", "b/1.png", "a/.DS_Store", "a/Thumbs.db", "__MACOSX/a/1.png", "c/.hidden", ".DS_Store")
    (tmp_path / "empty").mkdir()
    entries, listing = listed(tmp_path)
    assert {entry.name for entry in entries} == {"a/1.png", "b/1.png"}
    assert listing.passed_over == []


def test_what_is_no_file_is_left_out_and_named(tmp_path: Path):
    touch(tmp_path, "a/1.png", "b/1.png", ".git/config")
    os.mkfifo(tmp_path / "a" / "fifo.png")
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "b" / "null.png").symlink_to("/dev/null")
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "b" / "socket"))
        entries, listing = listed(tmp_path)
    assert [entry.name for entry in entries] == ["a/1.png", "b/1.png"]
    assert {one.name: one.reason for one in listing.passed_over} == {
        ".git": "is a hidden folder",
        "a/fifo.png": "is a FIFO, not a file",
        "a/gone.png": "is a link that leads nowhere: No such file or directory",
        "b/null.png": "is a device, not a file",
        "b/up": "is a link to a folder, and only links to files are followed",
        "b/socket": "is a socket, not a file",
    }


@pytest.mark.skipif(os.getuid() == 0, reason="root may read every folder")
def test_folder_that_cannot_be_read_is_named(tmp_path: Path):
    touch(tmp_path, "a/1.png", "b/1.png", "c/1.png")
    (tmp_path / "c").chmod(0)
    entries, listing = listed(tmp_path)
    (tmp_path / "c").chmod(0o700)
    assert [entry.identity for entry in entries] == ["a", "b"]
    assert listing.passed_over == [("c/", "is a folder that cannot be read: Permission denied")]


def test_file_that_became_a_fifo_does_not_hang(tmp_path: Path):
    touch(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "a" / "1.png").unlink()
    os.mkfifo(tmp_path / "a" / "1.png")
    with pytest.raises(UserError, match=r"'a/1\.png' is not a plain file"):
        read_folder(str(tmp_path), ImportOptions())("a/1.png")


def test_links_to_files_are_followed(tmp_path: Path):
    touch(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "b" / "2.png").symlink_to(tmp_path / "a" / "1.png")
    entries, listing = listed(tmp_path)
    assert [entry.name for entry in entries] == ["a/1.png", "b/1.png", "b/2.png"]
    assert read_folder(listing.source, ImportOptions())("b/2.png") == b"a/1.png"


def test_names_of_any_bytes_can_be_told(tmp_path: Path):
    touch(tmp_path, "ä/1.png", "b/1.png")
    (tmp_path / os.fsdecode(b"c\xff")).mkdir()
    (tmp_path / os.fsdecode(b"c\xff") / "1.png").write_text("x")
    entries, listing = listed(tmp_path)
    found = {entry.identity: entry.place for entry in entries}
    assert sorted(found) == ["b", "c\\xff", "ä"]
    assert read_folder(listing.source, ImportOptions())(found["c\\xff"]) == b"x"


@pytest.mark.parametrize(("share", "count"), [(0, 0), (0.01, 2), (0.25, 5), (1, 20)])
def test_share_held_out(share: float, count: int):
    names = [f"{i}" for i in range(20)]
    chosen = list(share_held_out(share, 3)(names))
    assert len(set(chosen)) == len(chosen) == count
    assert chosen == list(share_held_out(share, 3)(names))
    assert set(chosen) <= set(range(20))


@pytest.mark.parametrize(("identities", "count"), [(2, 0), (3, 0), (4, 2), (5, 3)])
def test_neither_split_is_left_with_one_identity(identities: int, count: int):
    assert len(list(share_held_out(0.9, 3)([str(i) for i in range(identities)]))) == count


def test_sources_that_cannot_be_used(tmp_path: Path):
    for wrong in (None, tmp_path / "none"):
        with pytest.raises(UserError, match="is not a folder"):
            listed(wrong)
    touch(tmp_path, "a/1.png", "loose.png")
    with pytest.raises(UserError, match=r"loose\.png' lies directly in SOURCE"):
        listed(tmp_path)


def test_folder_at_an_address_gives_the_bytes_of_a_local_one(tmp_path: Path, image_folder: Path):
    options = ImportOptions(holdout_share=0.3, samples_per_shard=10)
    here = run_import("folder", image_folder, tmp_path / "here", options)
    there = run_import("folder", f"file://{image_folder}", tmp_path / "there", options)
    assert there.model_dump() == here.model_dump()
    (image_folder / ".hidden").mkdir()
    entries, listing = listed(f"file://{image_folder}")
    (image_folder / ".hidden").rmdir()
    assert entries == [
        entry._replace(stamp=at.stamp) for entry, at in zip(listed(image_folder)[0], entries, strict=True)
    ]
    assert all(entry.stamp for entry in entries)
    assert listing.passed_over == [(".hidden", "is a hidden folder")]


def test_loose_file_at_an_address(tmp_path: Path):
    touch(tmp_path, "a/1.png", "loose.png")
    with pytest.raises(UserError, match=r"file://.*/loose\.png' lies directly in SOURCE"):
        listed(f"file://{tmp_path}")


PAGES = {
    "/faces": [
        "?C=N;O=D",
        "../",
        "./",
        "/",
        "/faces/",
        "/elsewhere/",
        "Ada%20L/",
        "bob/",
        "#top",
        "http://127.0.0.1/x/",
    ],
    "/faces/Ada%20L": ["../", ".", "1.png", "/faces/Ada%20L/2.png", "../bob/1.png"],
    "/faces/bob": ["./1.png", "1.png", "in/", "%2e%2e/"],
    "/faces/bob/in": ["%231.png"],
}


@contextmanager
def pages(listing: Callable[[str], list[str]]) -> Iterator[str]:
    """A web server whose folders are pages of links; its address."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            links = listing(self.path.partition("?")[0].rstrip("/"))
            body = "".join(f'<a href="{link}">x</a>' for link in links).encode()
            self.send_response(200 if links else 404)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with serving(Handler) as address:
        yield f"{address}/faces"


@contextmanager
def serving(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("behind", ["", "/"])
def test_links_of_a_web_page_are_followed_downwards_alone(behind: str):
    with pages(lambda path: PAGES.get(path, [])) as address:
        entries, _ = listed(address + behind)
    assert [(entry.identity, entry.name) for entry in entries] == [
        ("Ada L", "Ada L/1.png"),
        ("Ada L", "Ada L/2.png"),
        ("bob", "bob/1.png"),
        ("bob/in", "bob/in/#1.png"),
    ]
    assert entries[-1].place == "bob/in/%231.png"


def test_web_pages_behind_a_token():
    found = {"/faces": ["ada/"], "/faces/ada": ["./", "1.png"]}
    with pages(lambda path: found.get(path, [])) as address:
        entries, _ = listed(f"{address}?token=secret")
    assert [(entry.identity, entry.place) for entry in entries] == [("ada", "ada/1.png")]


def test_a_listing_that_leads_back_to_itself_ends():
    with (
        pages(lambda path: ["up/", "x/"]) as address,
        pytest.raises(UserError, match="more than 32 folders below SOURCE"),
    ):
        listed(address)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_folder_of_a_web_server_gives_the_samples_of_a_local_one(tmp_path: Path, image_folder: Path):
    here = tmp_path / "faces"
    for number, folder in enumerate(sorted(image_folder.iterdir())):
        shutil.copytree(folder, here / f"{folder.name} {number}%20#")
    options = ImportOptions(holdout_share=0.3, samples_per_shard=10)
    with serving(partial(Quiet, directory=str(tmp_path))) as address:
        there = run_import("folder", f"{address}/faces", tmp_path / "there", options)
    assert there.model_dump() == run_import("folder", here, tmp_path / "here", options).model_dump()


def test_a_data_set_below_the_source_is_no_identity(image_folder: Path, tmp_path: Path):
    source = Path(shutil.copytree(image_folder, tmp_path / "people"))
    first = run_import("folder", source, source / "set", ImportOptions(holdout_share=0))
    again = run_import("folder", source, tmp_path / "again", ImportOptions(holdout_share=0))
    assert again.splits["train"].samples == first.splits["train"].samples
    assert ("set", "is a data set, not an identity") in [(bad.name, bad.reason) for bad in again.bad]
