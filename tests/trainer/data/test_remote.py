"""Transfers against a real web server with faults, and what is said when they fail for good."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fsspec.registry import known_implementations

from tests.web import Web, serving
from trainer.data import remote
from trainer.data.manifest import Manifest
from trainer.data.remote import checked, fetch, fetch_small, is_remote, join, shown, text_of
from trainer.errors import UserError

DATA = bytes(range(256)) * 40


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(remote, "_FIRST_DELAY", 0.01)
    (tmp_path / "a.bin").write_bytes(DATA)
    with serving(Web(tmp_path)) as site:
        yield site


def test_whole_files_and_ranges(web: Web):
    address = f"{web.address}/a.bin"
    assert fetch(address) == DATA
    assert fetch(address, 100, 5000) == DATA[100:5000]
    assert web.sent["a.bin"] == len(DATA) + 4900


def test_a_server_that_falls_silent_is_not_waited_for(web: Web, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote, "_SILENCE", 0.2)
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    web.fault, web.faults["a.bin"] = "hang", 1
    assert fetch(f"{web.address}/a.bin", 0, 5000) == DATA[:5000]
    web.faults["a.bin"] = 2
    with pytest.raises(UserError, match=r"a.bin' cannot be read: the server is silent or too slow, 2 times; try"):
        fetch(f"{web.address}/a.bin", 0, 5000)


@pytest.mark.parametrize(
    "read", [lambda address: fetch(address, 0, 5000), lambda address: fetch_small(address, len(DATA))]
)
def test_a_server_that_trickles_is_not_waited_for(
    web: Web, monkeypatch: pytest.MonkeyPatch, read: Callable[[str], bytes]
):
    monkeypatch.setattr(remote, "_SILENCE", 0.5)
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    web.fault, web.faults["a.bin"] = "trickle", 1
    assert DATA.startswith(read(f"{web.address}/a.bin"))
    web.faults["a.bin"] = 99
    with pytest.raises(UserError, match=r"a.bin' cannot be read: the server is silent or too slow, [25] times; try"):
        read(f"{web.address}/a.bin")


@pytest.mark.parametrize("fault", ["cut", "busy", "silent"])
def test_a_broken_transfer_is_tried_again(web: Web, fault: str):
    web.fault, web.faults["a.bin"] = fault, 3
    assert fetch(f"{web.address}/a.bin", 0, 5000) == DATA[:5000]
    assert web.requests["a.bin"] == 4


@pytest.mark.parametrize(
    ("fault", "words"), [("busy", "the server answers 503, 5 times"), ("cut", "5 times"), ("silent", "5 times")]
)
def test_a_transfer_that_breaks_always_is_one_sentence(web: Web, fault: str, words: str):
    web.fault, web.faults["a.bin"] = fault, 99
    with pytest.raises(
        UserError, match=rf"^'{web.address}/a.bin' cannot be read: .*{words}; try again later"
    ) as caught:
        fetch(f"{web.address}/a.bin", 0, 5000)
    assert "\n" not in str(caught.value)
    assert web.requests["a.bin"] in (5, 10)  # the client asks again itself where a kept connection is lost


def test_what_is_not_there_is_asked_for_once(web: Web):
    with pytest.raises(UserError, match=r"b.bin' cannot be read: it is not there; check the address"):
        fetch(f"{web.address}/b.bin")
    assert web.requests["b.bin"] == 1


def test_a_server_that_stopped(web: Web):
    port = web.port
    with serving(Web(web.folder)) as other:
        port = other.port
    with pytest.raises(UserError, match=r"cannot be read: .*, 5 times; try again later"):
        fetch(f"http://127.0.0.1:{port}/a.bin")


def test_a_file_that_is_shorter_than_it_was(web: Web):
    with pytest.raises(UserError, match=r"a.bin' cannot be read: it ended 10 bytes early, 5 times"):
        fetch(f"{web.address}/a.bin", 100, len(DATA) + 10)


def test_a_server_without_ranges_is_named_as_that(web: Web):
    web.ranges = False
    with pytest.raises(UserError, match="the server sends whole files where ranges are asked for"):
        fetch(f"{web.address}/a.bin", 0, 10)
    assert web.requests["a.bin"] == 1


def test_passwords_and_tokens_are_used_and_never_shown(web: Web, caplog: pytest.LogCaptureFixture):
    caplog.set_level("DEBUG", "trainer")
    web.password, web.token = "annie:s3cret", "t0ken"
    with_both = f"http://annie:s3cret@127.0.0.1:{web.port}/"
    assert fetch(join(with_both + "?key=t0ken", "a.bin")) == DATA
    for address in (join(with_both + "?key=t0ken", "b.bin"), with_both.replace("s3cret", "wr0ng") + "a.bin?key=t0ken"):
        with pytest.raises(UserError) as caught:
            fetch(address)
        chain = [caught.value, caught.value.__cause__ or "", caught.value.__suppress_context__]
        assert not any(secret in f"{chain}{caplog.text}" for secret in ("s3cret", "wr0ng", "t0ken", "annie"))
        assert f"http://127.0.0.1:{web.port}/" in str(caught.value)
    assert "the server answers 401; give credentials" in str(caught.value)


def test_addresses():
    assert shown("https://ann:pw@host:1/a/b.tar?sig=x#y") == "https://host:1/a/b.tar"
    assert shown("s3://bucket/faces") == "s3://bucket/faces"
    assert shown(Path("/data/faces?")) == "/data/faces?"
    assert join("s3://bucket/faces/", "train.tar") == "s3://bucket/faces/train.tar"
    assert join("https://h/a/b?sig=1", "../c/x.tar") == "https://h/a/c/x.tar?sig=1"
    assert is_remote("gs://b/c")
    assert not is_remote(Path("data/c"))
    assert text_of(Path("s3://bucket/faces")) == "s3://bucket/faces"
    assert text_of(Path("/a/b")) == "/a/b"


def test_an_unknown_kind_of_address():
    with pytest.raises(UserError, match=r"'foo://x/y' cannot be read: no such kind of address is known"):
        fetch("foo://x/y")


KNOWN = [
    "/data/a::b",
    "faces",
    "s3://b/c",
    "gs://b/c",
    "gcs://b",
    "az://b/c",
    "abfs://c@a/d",
    "http://h:8/a",
    "file:///a",
]
REFUSED = {
    "zip://x::file:///etc/passwd": "no such kind",
    "simplecache::s3://b/c": "no such kind",
    "local:///etc/passwd": "no such kind",
    "filecache://b/c": "no such kind",
    "reference://x": "no such kind",
    "s3://b/c::file:///etc/passwd": "it has '::'",
    "http://[bad/x": "it is malformed",
    "http://h:port/x": "it is malformed",
    "https:///x": "it is malformed",
    "s3:///x": "it is malformed",
    "http://h/a\nb": "it is malformed",
    "a\0b": "is not a path: it has a zero byte",
    f"http://{'a' * 300}/x": "the address is malformed",
}


@pytest.mark.parametrize("address", KNOWN)
def test_known_kinds_of_addresses_are_taken_as_they_are(address: str):
    assert checked(address) == address


@pytest.mark.parametrize("address", REFUSED)
def test_other_kinds_and_malformed_addresses_are_one_sentence(address: str):
    with pytest.raises(UserError, match=REFUSED[address]) as caught:
        Manifest.read(address)
    assert str(caught.value).isprintable()


def test_a_password_in_a_malformed_address_is_not_shown():
    for address in ("http://ann:s3/cret@h/x", "zip://x::http://ann:s3cret@h/x", "http://ann:s3#cret@h/x"):
        with pytest.raises(UserError) as caught:
            fetch(address)
        assert "s3" not in str(caught.value).partition(";")[0]


@pytest.mark.parametrize(("scheme", "package"), [("gcs", r"'hypersphere\[remote\]'"), ("az", "adlfs")])
def test_a_kind_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch, scheme: str, package: str):
    monkeypatch.setitem(known_implementations, scheme, {"class": "no_such_package.File", "err": "Install it"})
    with pytest.raises(UserError, match=rf"'{scheme}://x/y' .*not installed.*pip install {package}"):
        fetch(f"{scheme}://x/y")
