import contextlib
import hashlib
import io
import json
import tarfile
from pathlib import Path

import webdataset
from webdataset.tariterators import group_by_keys, tar_file_expander

from trainer.data.importers import Sample
from trainer.data.importers.run import write_shards
from trainer.data.manifest import Manifest


def write(folder: Path, samples: int, per_shard: int = 4) -> list:
    folder.mkdir()
    made = (
        (b"pixels %d" % i, "jpg" if i % 2 else "png", i % 3, Sample(f"who {i % 3}", f"ä/{i}.png"))
        for i in range(samples)
    )
    return write_shards(folder, "train", made, per_shard)


def test_same_samples_give_the_same_bytes(tmp_path: Path):
    first, second = write(tmp_path / "a", 10), write(tmp_path / "b", 10)
    assert first == second
    for entry in first:
        data = (tmp_path / "a" / entry.name).read_bytes()
        assert data == (tmp_path / "b" / entry.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.bytes, entry.sha256)


def test_shards_are_numbered_and_full_to_the_count(tmp_path: Path):
    entries = write(tmp_path / "a", 10)
    assert [(entry.name, entry.samples) for entry in entries] == [
        ("train-000000.tar", 4),
        ("train-000001.tar", 4),
        ("train-000002.tar", 2),
    ]


def test_exact_multiple_leaves_no_empty_shard(tmp_path: Path):
    assert [entry.samples for entry in write(tmp_path / "a", 8)] == [4, 4]


def test_members_tell_nothing_of_the_machine(tmp_path: Path):
    write(tmp_path / "a", 2)
    with tarfile.open(tmp_path / "a" / "train-000000.tar") as tar:
        members = tar.getmembers()
        described = json.load(tar.extractfile("000000001.json"))
    assert [member.name for member in members] == [
        "000000000.cls", "000000000.json", "000000000.png", "000000001.cls", "000000001.jpg", "000000001.json",
    ]  # fmt: skip
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    assert described == {"identity": "who 1", "name": "ä/1.png"}


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
