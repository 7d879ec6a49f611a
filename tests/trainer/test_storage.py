"""A folder on a disk, in memory and in a bucket: the same files by the same names."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from tests.s3 import s3_bucket
from trainer.data import remote
from trainer.errors import UserError
from trainer.storage import Folder, written_here


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket("runs") as address:
        yield address


@pytest.fixture(params=["disk", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "s3":
        return Folder.at(f"{request.getfixturevalue('bucket')}/{uuid.uuid4().hex}/run")
    return Folder.at(f"memory://{uuid.uuid4().hex}/run" if request.param == "memory" else tmp_path / "run")


def test_what_is_written_is_there(folder: Folder) -> None:
    assert folder.sizes() == {}
    folder.write("a.txt", "é")
    folder.write("a.txt", "text")
    (folder / "deep").write("er/b.bin", [b"12", memoryview(b"345")])
    assert folder.sizes() == {"a.txt": 4, "deep/er/b.bin": 5}
    assert (folder / "deep").sizes() == {"er/b.bin": 5}
    assert folder.read("deep/er/b.bin") == b"12345"
    with pytest.raises(FileNotFoundError):
        folder.read("b.bin")
    folder.remove(["nothing", "deep/er/b.bin"])
    assert folder.sizes() == {"a.txt": 4}
    assert (folder / "deep").name == "deep"


def test_others_writing_is_seen(folder: Folder) -> None:
    """A listing is never an old one."""
    folder.write("a", "1")
    assert folder.sizes() == {"a": 1}
    address = str(folder.address)
    with fsspec.open(address + "/b", "wb", **({"skip_instance_cache": True} if "://" in address else {})) as file:
        file.write(b"22")
    assert folder.sizes() == {"a": 1, "b": 2}


def test_a_folder_written_here_and_put_there(folder: Folder) -> None:
    folder.write("old", "x")
    with written_here(folder, "last") as here:
        here.mkdir(exist_ok=True)
        (here / "a").write_text("1")
        (here / "last").write_text("2")
    kept = {"old": 1} if isinstance(folder.address, Path) else {}
    assert folder.sizes() == {"a": 1, "last": 1} | kept


def test_what_is_not_finished_here_is_not_put_there(bucket: str) -> None:
    folder = Folder.at(f"{bucket}/{uuid.uuid4().hex}/run")

    def fail() -> None:
        with written_here(folder, "last") as here:
            Folder(here).write("a", "1")
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fail()
    assert folder.sizes() == {}


def test_addresses() -> None:
    assert Folder.at("file:///runs/a%20b").address == Path("/runs/a b")
    assert Folder.at(Path("s3:/bucket/run")).address == "s3://bucket/run"
    assert Folder.at("s3://bucket/run/").address == "s3://bucket/run"
    assert str(Folder.at("s3://key:s3cret@bucket/run") / "checkpoints") == "s3://bucket/run/checkpoints"


def test_what_cannot_be_written_says_why_without_secrets(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"'s3://nowhere/run/a' cannot be written: the bucket is not there; check the"):
        Folder.at("s3://nowhere/run").write("a", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(remote, "PATIENCE_S", 0)
    monkeypatch.setattr(remote, "_FIRST_DELAY", 0.01)
    fsspec.filesystem("s3").clear_instance_cache()
    try:
        with pytest.raises(UserError, match=r"cannot be written: .*, 5 times; try again later$") as raised:
            Folder.at(f"{bucket}/run").write("a", "1")
        assert not any(secret in str(raised.value) for secret in (os.environ["AWS_SECRET_ACCESS_KEY"], "annie"))
    finally:
        fsspec.filesystem("s3").clear_instance_cache()


def test_a_bucket_that_is_away_for_a_while_is_waited_for(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_DELAY", 0.01)
    real, calls = fsspec.filesystem("s3").pipe_file, [0]

    def away(*arguments: object, **options: object) -> object:
        calls[0] += 1
        if calls[0] < 12:
            raise TimeoutError
        return real(*arguments, **options)

    monkeypatch.setattr(fsspec.filesystem("s3"), "pipe_file", away)
    folder = Folder.at(f"{bucket}/{uuid.uuid4().hex}")
    folder.write("a", "1")
    assert folder.sizes() == {"a": 1}
    assert calls == [12]
