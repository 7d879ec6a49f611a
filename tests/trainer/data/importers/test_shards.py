import contextlib
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import pytest
import webdataset
from webdataset.tariterators import group_by_keys, tar_file_expander

from trainer.data.importers.shards import Sample, read_shard, write_shard
from trainer.data.index import open_index
from trainer.data.manifest import Manifest
from trainer.data.split import ShardEntry


def sample(number: int, **attributes: object) -> Sample:
    suffix = "jpg" if number % 2 else "png"
    who = number % 3
    return Sample(number, who, f"who {who}", f"ä/{number}.png", attributes, suffix, b"pixels %d" % number)


def write(folder: Path, numbers: Iterable[int]) -> ShardEntry | None:
    folder.mkdir(exist_ok=True)
    return write_shard(folder, "train-000000.tar", map(sample, numbers))


def test_same_samples_give_the_same_bytes(tmp_path: Path):
    first, second = write(tmp_path / "a", range(10)), write(tmp_path / "b", range(10))
    assert first == second
    data = (tmp_path / "a" / first.name).read_bytes()
    assert data == (tmp_path / "b" / first.name).read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (first.bytes, first.sha256)


@pytest.mark.parametrize("samples", [1, 7, 200])
def test_archive_is_the_one_that_webdataset_would_write(tmp_path: Path, samples: int):
    write(tmp_path, range(samples))
    expected = io.BytesIO()
    with webdataset.TarWriter(expected, user="", group="", mode=0o644, mtime=0, encoder=False) as tar:
        for one in map(sample, range(samples)):
            text = json.dumps({"identity": one.identity, "name": one.name}, sort_keys=True, separators=(",", ":"))
            files = {"cls": b"%d" % one.label, "json": text.encode(), one.suffix: one.payload}
            tar.write({"__key__": f"{one.number:09d}", **files})
    assert (tmp_path / "train-000000.tar").read_bytes() == expected.getvalue()


def test_no_samples_leave_no_file(tmp_path: Path):
    assert write(tmp_path, []) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("numbers", "key_bytes"), [([40, 41, 42], 0), ([40, 42, 43], 27)])
def test_index_says_where_payloads_lie_and_names_keys_that_have_gaps(
    tmp_path: Path, numbers: list[int], key_bytes: int
):
    entry = write(tmp_path, numbers)
    index = open_index(tmp_path / entry.index_file)
    assert (index.samples, index.tar_bytes, len(index.keys)) == (3, entry.bytes, key_bytes)
    data = (tmp_path / entry.name).read_bytes()
    for row, number in enumerate(numbers):
        offset, size, label, crc, _ = index.records[row].tolist()
        assert data[offset : offset + size] == b"pixels %d" % number
        assert (label, crc) == (number % 3, zlib.crc32(b"pixels %d" % number))
        assert index.key(row) == f"{number:09d}"
    assert hashlib.sha256((tmp_path / entry.index_file).read_bytes()).hexdigest() == entry.index_sha256


def test_what_is_read_back_is_what_was_written(tmp_path: Path):
    entry = write(tmp_path, [3, 4, 8])
    assert [tuple(kept) for kept in read_shard(tmp_path, entry)] == [
        (3, 0, "jpg", b"pixels 3"),
        (4, 1, "png", b"pixels 4"),
        (8, 2, "png", b"pixels 8"),
    ]


def test_attributes_are_told_with_the_sample(tmp_path: Path):
    entry = write_shard(tmp_path, "train-000000.tar", [sample(0, age=31, light=None)])
    with tarfile.open(tmp_path / entry.name) as tar:
        described = json.load(tar.extractfile("000000000.json"))
    assert described == {"identity": "who 0", "name": "ä/0.png", "attributes": {"age": 31, "light": None}}


def test_members_tell_nothing_of_the_machine(tmp_path: Path):
    write(tmp_path, range(2))
    with tarfile.open(tmp_path / "train-000000.tar") as tar:
        members = tar.getmembers()
        described = json.load(tar.extractfile("000000001.json"))
    assert [member.name for member in members] == [
        "000000000.cls", "000000000.json", "000000000.png", "000000001.cls", "000000001.jpg", "000000001.json",
    ]  # fmt: skip
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    assert described == {"identity": "who 1", "name": "ä/1.png"}


def test_the_loop_in_the_documentation_reads_them(data_set: Path, manifest: Manifest):
    page = Path(__file__).parents[4] / "docs" / "data_format.md"
    loop = page.read_text().split("```python\n")[1].split("```")[0].replace("data/faces", str(data_set))
    found = subprocess.run([sys.executable, "-c", loop], capture_output=True, text=True, check=True)
    rows = [line.rsplit(") ", 1)[1].split() for line in found.stdout.splitlines()]
    assert len(rows) == manifest.splits["train"].shards[0].samples
    assert all(manifest.split("train").classes[int(label)] == identity for label, identity in rows)


def test_webdataset_reads_them(data_set: Path, manifest: Manifest):
    # webdataset's own pipeline, but for the opening: it leaves its files open, which is an error in these tests
    with contextlib.ExitStack() as files:
        opened = [
            {"url": entry.name, "stream": files.enter_context((data_set / entry.name).open("rb"))}
            for entry in manifest.splits["train"].shards
        ]
        grouped = group_by_keys(tar_file_expander(opened))
        samples = list(webdataset.DataPipeline(lambda: iter(grouped), webdataset.decode("l8")))
    assert len(samples) == manifest.splits["train"].samples
    classes = manifest.split("train").classes
    for sample in samples:
        assert sample["png"].shape == (12, 12)
        assert classes[sample["cls"]] == sample["json"]["identity"]
    assert [sample["__key__"] for sample in samples] == [f"{i:09d}" for i in range(len(samples))]


def test_train_shards_mix_identities(data_set: Path, manifest: Manifest):
    first = manifest.splits["train"].shards[0]
    with tarfile.open(fileobj=io.BytesIO((data_set / first.name).read_bytes())) as tar:
        labels = [int(tar.extractfile(member).read()) for member in tar if member.name.endswith(".cls")]
    assert len(set(labels)) > 2
    assert labels != sorted(labels)
