import json
import os
from pathlib import Path

import pytest

from tests.disk import small_disk
from trainer.data.manifest import BadSample, Manifest
from trainer.data.split import SplitEntry
from trainer.errors import UserError

SHARD = {"name": "train-000000.tar", "samples": 3, "bytes": 10240, "sha256": "0" * 64, "index_sha256": "1" * 64}
TABLE = {"file": "train.classes.arrow", "bytes": 100, "sha256": "2" * 64, "names_sha256": "3" * 64}
SPLIT = {"samples": 3, "identities": 2, "classes": TABLE, "shards": [SHARD]}
TREE = {"format": 2, "kind": "folder", "image_mode": "L", "splits": {"train": SPLIT}}


def test_written_and_read_back(tmp_path: Path):
    manifest = Manifest(
        kind="folder",
        image_mode="RGB",
        splits={"train": SplitEntry.model_validate(SPLIT)},
        bad=[BadSample(name="ä.png", reason="damaged")],
        provenance={"source": "people"},
    )
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    first = (tmp_path / "manifest.json").read_bytes()
    manifest.write(tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == first


def test_a_full_disk_is_one_sentence_and_the_old_one_stays(tmp_path: Path):
    with small_disk(tmp_path / "disk") as disk:
        Manifest.model_validate(TREE).write(disk)
        provenance = {"source": "x" * 2**21}
        with pytest.raises(UserError, match=f"the disk of '{disk}' is full, so that 'manifest.json' was not written"):
            Manifest.model_validate(TREE | {"provenance": provenance}).write(disk)
        assert [path.name for path in disk.iterdir()] == ["manifest.json"]
        assert Manifest.read(disk) == Manifest.model_validate(TREE)


def split_with(**changes: object) -> dict:
    return {"splits": {"train": {**SPLIT, **changes}}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 3}, "its format is 3, and 1 and 2 are read"),
        ({"image_mode": "CMYK"}, "image_mode"),
        ({"image_mode": None}, "image_mode is null, but content is image"),
        ({"content": "vector", "image_mode": None}, r"a sample of shape \(\) is neither a vector"),
        ({"content": "vector", "image_mode": "L", "shape": [8]}, "image_mode is L, but content is vector"),
        ({"extra": 1}, "extra"),
        ({"splits": {}}, "splits"),
        ({"splits": {"../x": SPLIT}}, "'../x' must be a plain file name"),
        ({"splits": {"a\0b": SPLIT}}, "must be a plain file name"),
        ({"splits": {"x" * 65: SPLIT}}, "is longer than 64 letters"),
        (
            split_with(shards=[{**SHARD, "bytes": 2**62}]),
            "less than or equal to 4398046511104 at splits.train.shards.0.b",
        ),
        (split_with(samples=21, shards=[{**SHARD, "samples": 21}]), "a tar of 10240 bytes cannot hold 21 samples"),
        (split_with(samples=4), "the shards sum to 3, but samples is 4"),
        (split_with(identities=1), "identities"),
        (split_with(classes={**TABLE, "file": "../x"}), "plain file name"),
        (split_with(shards=[{**SHARD, "name": "../x.tar"}]), "plain file name"),
        (split_with(shards=[{**SHARD, "name": "/etc/passwd"}]), "plain file name"),
        (split_with(shards=[{**SHARD, "sha256": "zz"}]), "sha256"),
        (split_with(shards=[{**SHARD, "url": "zip://x::file:///etc/passwd"}]), "no such kind of address is known"),
        (split_with(shards=[{**SHARD, "url": "a\0b"}]), "it has a zero byte"),
    ],
)
def test_malformed_manifest_is_refused(tmp_path: Path, change: dict, words: str):
    (tmp_path / "manifest.json").write_text(json.dumps({**TREE, **change}))
    with pytest.raises(UserError, match=words) as caught:
        Manifest.read(tmp_path)
    assert "manifest.json" in str(caught.value)


SPLIT_1 = {"samples": 3, "classes": ["a", "b"], "class_counts": [1, 2], "shards": [{**SHARD, "index_sha256": None}]}
TREE_1 = {"format": 1, "kind": "folder", "image_mode": "L", "splits": {"train": SPLIT_1}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"extra": 1}, "extra"),
        ({"splits": {"train": {**SPLIT_1, "samples": 4}}}, "sum to 3, but samples is 4"),
        ({"splits": {"train": {**SPLIT_1, "class_counts": [3]}}}, "2 classes, but 1 class_counts"),
        ({"splits": {"train": {**SPLIT_1, "class_counts": [3, 0]}}}, "class 'b' has no sample"),
        ({"splits": {"train": {**SPLIT_1, "classes": ["a"], "class_counts": [3]}}}, "at least 2"),
    ],
)
def test_malformed_manifest_of_format_1_is_refused(tmp_path: Path, change: dict, words: str):
    (tmp_path / "manifest.json").write_text(json.dumps({**TREE_1, **change}))
    with pytest.raises(UserError, match=words):
        Manifest.read(tmp_path)


def test_folder_without_manifest_is_no_data_set(tmp_path: Path):
    with pytest.raises(UserError, match="hypersphere data import"):
        Manifest.read(tmp_path)
    with pytest.raises(UserError, match="is not a data set"):
        Manifest.read(tmp_path / "none")


@pytest.mark.parametrize("content", [json.dumps(TREE)[:-9].encode(), b"[]", b"\xff\xfe", b""])
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match="not a data set's manifest"):
        Manifest.read(tmp_path)


def test_a_manifest_that_is_a_fifo_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(UserError, match=r"manifest\.json' is not a plain file"):
        Manifest.read(tmp_path)


def test_a_transfer_that_fails_is_no_bad_manifest():
    with pytest.raises(UserError) as caught:
        Manifest.read("memory://nothing/here")
    assert str(caught.value) == (
        "'memory://nothing/here/manifest.json' cannot be read: it is not there; check the address"
    )


def test_unknown_split_names_those_there_are(tmp_path: Path):
    Manifest.model_validate(TREE).write(tmp_path)
    manifest = Manifest.read(tmp_path)
    assert manifest.split("train").samples == 3
    with pytest.raises(UserError, match="no split 'val'; it has train"):
        manifest.split("val")
