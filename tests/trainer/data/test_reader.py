"""Shards, their indexes, and work that runs ahead of its use; reading samples is tested with the stream."""

import contextlib
import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from trainer.data.manifest import Manifest, ShardEntry
from trainer.data.reader import ahead, check_sizes, read_bytes, read_index, verify
from trainer.errors import UserError


@pytest.fixture
def copy(tmp_path: Path, data_set: Path) -> Path:
    return Path(shutil.copytree(data_set, tmp_path / "copy"))


def tar_of(path: Path, members: dict[str, bytes]) -> ShardEntry:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    samples = len({name.split(".")[0] for name in members})
    return ShardEntry(name=path.name, samples=samples, bytes=path.stat().st_size, sha256="0" * 64)


def test_index_agrees_with_tarfile(data_set: Path, manifest: Manifest):
    entry = manifest.splits["train"].shards[1]
    path = data_set / entry.name
    index = read_index(path, entry, 7)
    with tarfile.open(path) as tar, path.open("rb") as file:
        for row, key in enumerate(index.keys):
            name = key.decode()
            assert int(tar.extractfile(f"{name}.cls").read()) == index.labels[row]
            assert tar.extractfile(f"{name}.png").read() == read_bytes(file, index, row)
    assert len(index.keys) == entry.samples == len(np.unique(index.keys))


def test_verify_is_silent_on_whole_shards_and_tells_progress(data_set: Path, manifest: Manifest):
    told: list[tuple[str, int, int]] = []
    verify(data_set, manifest, lambda *step: told.append(step))
    total = sum(entry.bytes for entry in manifest.splits["train"].shards)
    assert told[-1] == ("verify", total, total)


def test_one_changed_bit_is_found(copy: Path, manifest: Manifest):
    path = copy / "train-000002.tar"
    data = bytearray(path.read_bytes())
    data[1600] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"train-000002\.tar' has SHA-256"):
        verify(copy, manifest)


def test_every_damaged_shard_is_named(copy: Path, manifest: Manifest):
    (copy / "train-000000.tar").unlink()
    with (copy / "train-000003.tar").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"(?s)train-000000\.tar' cannot be read.*train-000003\.tar' has \d+ bytes"):
        verify(copy, manifest)


def test_size_check_names_the_shard(copy: Path, manifest: Manifest):
    split = manifest.splits["train"]
    check_sizes(copy, split.shards)
    path = copy / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(UserError, match=r"train-000001\.tar' has \d+ bytes, but the manifest says \d+; .*import"):
        check_sizes(copy, split.shards)
    path.unlink()
    with pytest.raises(UserError, match=r"train-000001\.tar' cannot be read: No such file"):
        check_sizes(copy, split.shards)


GOOD = {"a.cls": b"0", "a.png": b"x", "b.cls": b"1", "b.jpg": b"y"}


def test_any_plain_webdataset_shard_is_read(tmp_path: Path):
    members = {
        "x/a.png": b"1",
        "x/a.json": b"{}",
        "x/a.cls": b"1\n",
        "x/b.txt": b"?",
        "x/b.JPG": b"23",
        "x/b.cls": b"0",
    }
    index = read_index(tmp_path / "s.tar", tar_of(tmp_path / "s.tar", members), 2)
    assert index.keys.tolist() == [b"x/a", b"x/b"]
    assert (index.labels.tolist(), index.sizes.tolist()) == ([1, 0], [1, 2])


@pytest.mark.parametrize("label", [b"2", b"-1", b"99999999999", b"one", b""])
def test_label_outside_the_classes_names_sample_and_shard(tmp_path: Path, label: bytes):
    entry = tar_of(tmp_path / "s.tar", {**GOOD, "b.cls": label})
    with pytest.raises(UserError, match=r"sample 'b(\.cls)?' of shard '.*s\.tar'"):
        read_index(tmp_path / "s.tar", entry, 2)


@pytest.mark.parametrize(("gone", "words"), [("b.cls", "lacks a label"), ("b.jpg", "lacks an image")])
def test_incomplete_sample_is_named(tmp_path: Path, gone: str, words: str):
    entry = tar_of(tmp_path / "s.tar", {name: data for name, data in GOOD.items() if name != gone})
    with pytest.raises(UserError, match=f"sample 'b' of shard .* {words}"):
        read_index(tmp_path / "s.tar", entry, 2)


def test_number_of_samples_is_compared(tmp_path: Path):
    entry = tar_of(tmp_path / "s.tar", GOOD).model_copy(update={"samples": 3})
    with pytest.raises(UserError, match="has 2 samples, but the manifest says 3"):
        read_index(tmp_path / "s.tar", entry, 2)


@pytest.mark.parametrize("keep", [0, 100, 600, 1536, 1800])
def test_cut_off_shard_is_named(tmp_path: Path, keep: int):
    path = tmp_path / "s.tar"
    entry = tar_of(path, GOOD)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"shard '.*s\.tar' is cut off"):
        read_index(path, entry, 2)


def test_garbage_is_no_shard(tmp_path: Path):
    path = tmp_path / "s.tar"
    entry = tar_of(path, GOOD)
    rng = np.random.default_rng(0)
    for _ in range(200):
        data = bytearray(path.read_bytes())
        for place in rng.integers(0, 4096, 8):
            data[place] = rng.integers(256)
        (tmp_path / "t.tar").write_bytes(data)
        with contextlib.suppress(UserError):  # and nothing else
            assert len(read_index(tmp_path / "t.tar", entry, 2).keys) == 2
    (tmp_path / "t.tar").write_bytes(b"PK\3\4" * 1000)
    with pytest.raises(UserError, match="damaged at byte 0"):
        read_index(tmp_path / "t.tar", entry, 2)


def test_shard_cut_off_after_it_was_indexed_is_named(tmp_path: Path):
    path = tmp_path / "s.tar"
    index = read_index(path, tar_of(path, GOOD), 2)
    path.write_bytes(path.read_bytes()[:512])
    with path.open("rb") as file, pytest.raises(UserError, match="cut off inside sample 'a'"):
        read_bytes(file, index, 0)


def test_results_come_in_order_and_only_so_many_ahead():
    begun: list[int] = []
    asked = 0

    def work(number: int) -> int:
        begun.append(number)
        assert number <= asked + 3  # the one that is waited for, and two results that wait to be fetched
        return number * number

    found = []
    for result in ahead(work, range(20), threads=4, most=2):
        found.append(result)
        asked += 1
    assert found == [number * number for number in range(20)]
    assert sorted(begun) == list(range(20))


def test_an_error_comes_at_its_item():
    def work(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number

    results = ahead(work, range(100), threads=2, most=50)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
