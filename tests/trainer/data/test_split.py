"""A split's tables and indexes: what is read as it lies, what is made once, and what is refused."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest

from trainer.data.index import make_index, open_index, write_index
from trainer.data.manifest import Manifest
from trainer.data.split import ShardEntry, Split, index_shard, write_split
from trainer.data.stream import DataConfig, Stream
from trainer.data.tar import samples_of
from trainer.errors import UserError

FORMAT_1 = Path(__file__).parent / "format1"


@pytest.fixture
def copy(tmp_path: Path, data_set: Path) -> Path:
    return Path(shutil.copytree(data_set, tmp_path / "copy"))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A data set of format 1: shards and a manifest with all names, as earlier versions wrote it."""
    return Path(shutil.copytree(FORMAT_1, tmp_path / "old"))


def listing(split: Split) -> list[tuple[str, int, int, int]]:
    """Key, offset, size and label of every sample."""
    indexes = [split.index(shard) for shard in range(len(split.shards))]
    return [(index.key(row), *record[:3]) for index in indexes for row, record in enumerate(index.records.tolist())]


def test_an_import_writes_the_indexes_of_its_shards(data_set: Path, manifest: Manifest):
    split = manifest.split("train")
    found = []
    for entry in split.shards:
        with (data_set / entry.name).open("rb") as file:
            found += [(one.key, one.offset, len(one.payload), one.label) for one in samples_of(file, entry.name)]
    assert listing(split) == found
    assert sorted(path.name for path in data_set.glob("*.idx")) == [f"train-00000{shard}.idx" for shard in range(5)]


def test_by_class_positions_are_those_of_the_labels(data_set: Path, manifest: Manifest):
    split = manifest.split("train")
    labels = [label for *_, label in listing(split)]
    assert split.by_class.tolist() == sorted(range(47), key=lambda position: (labels[position], position))
    assert split.by_class.filename == data_set / "train.by_class.npy"


def test_what_format_1_lacks_is_made_once(old: Path, monkeypatch: pytest.MonkeyPatch):
    first = Manifest.read(old).split("train")
    assert first.classes.names() == ["bob", "cy", "dot", "eve"]
    assert first.classes.counts().tolist() == [5, 4, 5, 4]
    made = listing(first), first.by_class.tolist()
    assert [key for key, *_ in made[0]] == [f"{number:09d}" for number in range(18)]
    monkeypatch.setattr("trainer.data.split.samples_of", None)  # nobody reads a shard again
    again = Manifest.read(old).split("train")
    assert (listing(again), again.by_class.tolist()) == made


def test_without_a_place_to_write_it_is_made_in_memory(old: Path):
    names = sorted(path.name for path in old.iterdir())
    split = Manifest.read(old).split("train")
    split.store.scratch = None
    made = listing(split), split.by_class.tolist()
    assert sorted(path.name for path in old.iterdir()) == names
    assert split.index(0) is split.index(0)
    written = Manifest.read(old).split("train")
    assert (listing(written), written.by_class.tolist()) == made
    assert sorted(path.name for path in old.iterdir()) != names


def test_a_damaged_shard_gets_no_index(old: Path):
    path = old / "train-000001.tar"
    data = bytearray(path.read_bytes())
    data[1700] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"train-000001\.tar' has SHA-256 .*, but the manifest says"):
        Manifest.read(old).split("train").index(1)
    assert not (old / "train-000001.idx").exists()


def test_a_changed_index_is_refused(copy: Path):
    path = copy / "train-000002.idx"
    data = bytearray(path.read_bytes())
    data[64 + 12] ^= 1  # the label of the first sample
    path.write_bytes(data)
    split = Manifest.read(copy).split("train")
    split.index(1)
    with pytest.raises(UserError, match=r"train-000002\.idx' has SHA-256 .*, but the manifest says"):
        split.index(2)


def test_an_index_of_another_shard_is_refused(copy: Path):
    index = open_index(copy / "train-000002.idx")
    digest = write_index(copy / "train-000002.idx", make_index(index.records[:9].copy(), 20, index.tar_bytes))
    manifest = Manifest.read(copy)
    entry = manifest.splits["train"].shards[2].model_copy(update={"index_sha256": digest})
    manifest.splits["train"].shards[2] = entry
    with pytest.raises(UserError, match=r"train-000002\.idx' has 9 samples .* but the manifest says 10 in"):
        manifest.split("train").index(2)


def test_tables_of_another_size_are_refused(copy: Path):
    manifest = Manifest.read(copy)
    entry = manifest.splits["train"].model_copy(update={"identities": 8})
    split = Split("train", entry, manifest.split("train").store)
    with pytest.raises(UserError, match=r"train\.classes\.arrow' has 7 classes, but the manifest says 8"):
        len(split.classes)


def test_the_digest_of_the_names_is_the_same_in_both_formats(old: Path, data_set: Path):
    split = Manifest.read(data_set).split("train")
    assert split.class_digest == split.classes.digest()
    found = Manifest.read(old).split("train").class_digest
    assert found == "cd4082d70035e4d2f39f64f56e3ffafe5fc9a622057ecdd81ae09af4d3738227"


def test_a_sample_may_be_listed_by_several_splits_under_other_labels(copy: Path, manifest: Manifest):
    """What a filtered or merged set is: an index that lists a part of a shard, which is not written again."""
    whole = open_index(copy / "train-000000.idx")
    records = whole.records[[7, 2]].copy()
    records["label"] = [1, 0]
    index = make_index(records, [whole.key(7), whole.key(2)], whole.tar_bytes)
    (copy / "part").mkdir()
    shard = (
        manifest.splits["train"]
        .shards[0]
        .model_copy(
            update={
                "url": "../train-000000.tar",
                "samples": 2,
                "index_sha256": write_index(copy / "part" / "train-000000.idx", index),
            }
        )
    )
    split = write_split(copy / "part", "train", ["x", "y"], np.array([1, 1]), [shard])
    Manifest(kind="part", image_mode="L", splits={"train": split}).write(copy / "part")
    found = Manifest.read(copy / "part").split("train")
    assert found.path(0).samefile(copy / "train-000000.tar")
    assert [found.index(0).key(row) for row in range(2)] == ["000000007", "000000002"]
    assert found.by_class.tolist() == [1, 0]


def test_format_1_gives_the_batches_that_it_always_gave(old: Path):
    """A run that was begun on such a set, with the version that wrote it, goes on with the same batches."""
    manifest, digest = Manifest.read(old), hashlib.sha256()
    for split, identities, shuffle in (("train", None, True), ("train", 2, True), ("val", None, False)):
        config = DataConfig(height=12, width=12, batch_size=6, shuffle_window=7, identities_per_batch=identities)
        stream = Stream(manifest, split, config, seed=5, shuffle=shuffle)
        for batch in (batch for epoch in range(2) for batch in stream.batches(epoch)):
            digest.update(batch.images_BCHW.numpy().tobytes() + batch.labels_B.numpy().tobytes())
            digest.update(" ".join(batch.keys).encode())
    assert digest.hexdigest() == "37efce522e40f7acdb03ac19baa782f5dd93ae9da12f0fcdd3bd74a3a1a46f77"


@pytest.mark.parametrize(("label", "words"), [(b"7", "has label 7"), (None, r"has no label \(\.cls\)")])
def test_a_label_that_format_1_does_not_know_is_named(old: Path, label: bytes | None, words: str):
    path = old / "train-000002.tar"
    data = path.read_bytes()
    at = data.index(b"000000017.cls")
    wrong = (
        data[: at + 512] + label + data[at + 513 :] if label else data.replace(b"000000017.cls", b"000000017.scl")
    )  # of the same checksum
    path.write_bytes(wrong)
    entry = ShardEntry(name=path.name, samples=2, bytes=len(wrong), sha256=hashlib.sha256(wrong).hexdigest())
    with pytest.raises(UserError, match=rf"sample '000000017' of shard '.*' {words}, but the manifest has 4 classes"):
        index_shard(path, entry, 4)
