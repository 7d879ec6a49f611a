import shutil
from pathlib import Path

import pytest

from trainer.data.index import make_index, open_index, write_index
from trainer.data.manifest import Manifest
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
