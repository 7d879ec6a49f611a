import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from trainer.data.index import make_index, open_index, write_index
from trainer.data.manifest import Manifest
from trainer.data.tables import TableFile
from trainer.data.verify import verify
from trainer.errors import UserError


@pytest.fixture
def copy(tmp_path: Path, data_set: Path) -> Path:
    return Path(shutil.copytree(data_set, tmp_path / "copy"))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_whole_set_is_silent_and_tells_progress(manifest: Manifest):
    told: list[tuple[str, int, int]] = []
    verify(manifest, lambda *step: told.append(step))
    total = sum(entry.bytes for entry in manifest.splits["train"].shards)
    assert told[-1] == ("verify", total, total)


@pytest.mark.parametrize("name", ["train-000002.tar", "train-000002.idx", "train.classes.arrow", "train.by_class.npy"])
def test_one_changed_bit_is_found_in_every_file(copy: Path, name: str):
    flip(copy / name, -200)
    with pytest.raises(UserError, match=rf"{name}' has SHA-256"):
        verify(Manifest.read(copy))


def test_every_damaged_file_is_named(copy: Path):
    (copy / "train-000000.tar").unlink()
    (copy / "train-000001.idx").unlink()
    with (copy / "train-000003.tar").open("ab") as file:
        file.write(b"x")
    flip(copy / "train.by_class.npy", -1)
    with pytest.raises(UserError) as caught:
        verify(Manifest.read(copy))
    found = str(caught.value).split("\n")
    assert len(found) == 4
    for line, words in zip(
        found,
        ["000.tar' cannot be read", "001.idx' cannot be read", "003.tar' has ", "by_class.npy' has SHA"],
        strict=True,
    ):
        assert words in line


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("crc", 0, "sample '000000010' of shard .*train-000001.tar' is damaged"),
        ("offset", 2**40, "train-000001.idx' has .* bytes at 1099511627776 for sample '000000010'"),
        ("offset", 2**64 - 1, "train-000001.idx' has .* bytes at 18446744073709551615 for sample '000000010'"),
        ("size", 2**32 - 1, "train-000001.idx' has 4294967295 bytes at .* for sample '000000010'"),
        ("label", 7, "has label 7, but the manifest has 7 classes"),
        ("label", None, r"the shards hold \d+ samples of class '\w+', but the manifest says \d+"),
    ],
)
def test_an_index_that_disagrees_with_its_shard_is_found(copy: Path, field: str, value: int | None, words: str):
    manifest = Manifest.read(copy)
    path = copy / "train-000001.idx"
    index = open_index(path)
    records = index.records.copy()
    records[field][0] = (records[field][0] + 1) % 7 if value is None else value
    digest = write_index(path, make_index(records, index.first, index.tar_bytes))
    shards = manifest.splits["train"].shards
    shards[1] = shards[1].model_copy(update={"index_sha256": digest})
    with pytest.raises(UserError, match=words):
        verify(manifest)


def test_a_set_of_format_1_is_compared_too(tmp_path: Path):
    old = Path(shutil.copytree(Path(__file__).parent / "format1", tmp_path / "old"))
    verify(Manifest.read(old))
    flip(old / "val-000001.tar", 600)
    with pytest.raises(UserError, match=r"val-000001\.tar' has SHA-256"):
        verify(Manifest.read(old))


def rewritten(folder: Path, table: str, path: Path, **changes: object) -> Manifest:
    """The manifest of `folder` that names the file as it is now."""
    manifest = Manifest.read(folder)
    old = getattr(manifest.splits["train"], table)
    new = old.model_copy(update={**TableFile.of(path).model_dump(), **changes})
    manifest.splits["train"] = manifest.splits["train"].model_copy(update={table: new})
    return manifest


def swapped(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values[1:2], values[:1], values[2:]])


@pytest.mark.parametrize("change", [swapped, lambda values: np.full_like(values, 3), lambda values: values + 1])
def test_by_class_positions_that_are_not_those_of_the_labels_are_found(copy: Path, change: Callable[..., np.ndarray]):
    path = copy / "train.by_class.npy"
    np.save(path, change(np.load(path)))
    manifest = rewritten(copy, "by_class", path)
    with pytest.raises(UserError, match=r"^'train.by_class.npy' has position \d+ in place \d+, where the samples' "):
        verify(manifest)


@pytest.mark.parametrize(
    ("column", "change", "words"),
    [
        ("samples", lambda values: [values[0] - 1, *values[1:]], "counts that are not those of 47 samples"),
        ("samples", lambda values: [-1, values[0] + values[1] + 1, *values[2:]], "counts that are not those"),
        ("end", lambda values: [values[0] + 1, *values[1:]], "ends that are not the sums of its counts"),
        ("by_size", lambda values: [values[1], values[0], *values[2:]], "an order by size that is not that"),
        ("by_size", lambda values: [values[0]] * len(values), "an order by size that is not that"),
        ("name", lambda values: [None, *values[1:]], "large_string with 1 gaps, not text"),
        ("name", lambda values: list(range(7)), "int64 with 0 gaps, not text"),
        ("name", lambda values: ["eve", *values[1:]], "other names than the manifest's names_sha256 says"),
    ],
)
def test_a_classes_table_that_disagrees_with_itself_is_found(
    copy: Path, column: str, change: Callable[[list[object]], list[object]], words: str
):
    path = copy / "train.classes.arrow"
    with pa.OSFile(str(path)) as file:
        table = pa.ipc.open_file(file).read_all()
    changed = change(table[column].to_pylist())
    kind = pa.int64() if isinstance(changed[-1], int) else table[column].type
    table = table.set_column(table.schema.get_field_index(column), column, pa.array(changed, kind))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    manifest = rewritten(copy, "classes", path)
    with pytest.raises(UserError, match=words):
        verify(manifest)


@pytest.mark.parametrize("ends", [[3, 2], [1, 200]])
def test_keys_that_reach_beyond_their_bytes_are_found(copy: Path, ends: list[int]):
    manifest = Manifest.read(copy)
    path = copy / "train-000001.idx"
    index = open_index(path)
    with_keys = make_index(index.records.copy(), [f"k{i}" for i in range(index.samples)], index.tar_bytes)
    with_keys.records["key_end"][-2:] = ends
    shards = manifest.splits["train"].shards
    shards[1] = shards[1].model_copy(update={"index_sha256": write_index(path, with_keys)})
    with pytest.raises(UserError, match=r"train-000001\.tar' has keys whose ends do not rise to their last byte"):
        verify(manifest)


def test_no_room_is_made_for_classes_that_only_the_manifest_claims(copy: Path):
    path = copy / "manifest.json"
    tree = json.loads(path.read_text())
    tree["splits"]["train"]["identities"] = 2**32
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"has 7 classes, but the manifest says 4294967296"):
        verify(Manifest.read(copy))
