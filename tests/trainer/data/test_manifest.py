import json
from pathlib import Path

import pytest

from trainer.data.manifest import BadSample, Manifest, ShardEntry, Split
from trainer.errors import UserError

SHARD = {"name": "train-000000.tar", "samples": 3, "bytes": 10240, "sha256": "0" * 64}
SPLIT = {"samples": 3, "classes": ["a", "b"], "class_counts": [1, 2], "shards": [SHARD]}
TREE = {"format": 1, "kind": "folder", "image_mode": "L", "splits": {"train": SPLIT}}


def test_written_and_read_back(tmp_path: Path):
    manifest = Manifest(
        kind="folder",
        image_mode="RGB",
        splits={"train": Split(**{**SPLIT, "classes": ["ä", "b c"], "shards": [ShardEntry(**SHARD)]})},
        bad=[BadSample(name="x.png", reason="damaged")],
        provenance={"source": "people"},
    )
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    first = (tmp_path / "manifest.json").read_bytes()
    manifest.write(tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == first


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "format"),
        ({"image_mode": "CMYK"}, "image_mode"),
        ({"extra": 1}, "extra"),
        ({"splits": {}}, "splits"),
        ({"splits": {"train": {**SPLIT, "samples": 4}}}, "sum to 3, but samples is 4"),
        ({"splits": {"train": {**SPLIT, "class_counts": [3]}}}, "2 classes, but 1 class_counts"),
        ({"splits": {"train": {**SPLIT, "class_counts": [3, 0]}}}, "class 'b' has no sample"),
        ({"splits": {"train": {**SPLIT, "classes": ["a"], "class_counts": [3]}}}, "at least 2"),
        ({"splits": {"train": {**SPLIT, "shards": [{**SHARD, "name": "../x.tar"}]}}}, "plain file name"),
        ({"splits": {"train": {**SPLIT, "shards": [{**SHARD, "name": "/etc/passwd"}]}}}, "plain file name"),
        ({"splits": {"train": {**SPLIT, "shards": [{**SHARD, "sha256": "zz"}]}}}, "sha256"),
    ],
)
def test_malformed_manifest_is_refused(tmp_path: Path, change: dict, words: str):
    (tmp_path / "manifest.json").write_text(json.dumps({**TREE, **change}))
    with pytest.raises(UserError, match=words) as caught:
        Manifest.read(tmp_path)
    assert "manifest.json" in str(caught.value)


def test_folder_without_manifest_is_no_data_set(tmp_path: Path):
    with pytest.raises(UserError, match="hypersphere data import"):
        Manifest.read(tmp_path)
    with pytest.raises(UserError, match="is not a data set"):
        Manifest.read(tmp_path / "none")


def test_truncated_manifest_is_refused(tmp_path: Path):
    (tmp_path / "manifest.json").write_text(json.dumps(TREE)[:-9])
    with pytest.raises(UserError, match="not a data set's manifest"):
        Manifest.read(tmp_path)


def test_unknown_split_names_those_there_are():
    manifest = Manifest.model_validate(TREE)
    assert manifest.split("train").samples == 3
    with pytest.raises(UserError, match="no split 'val'; it has train"):
        manifest.split("val")
