"""Files of a checkpoint: damage is noticed, and any number of ranks reads what any other number wrote."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file
from torch import Tensor

from trainer.checkpoint import CheckpointManifest, Damaged, files, in_rows, open_checkpoint, save
from trainer.checkpoint.encode import pieces
from trainer.checkpoint.files import MANIFEST, Checkpoint, in_parts
from trainer.distributed import Group, RowRange
from trainer.storage import Folder

CLASSES, CENTRES = 11, 3


def of_rows(key: str) -> bool:
    return key != "scale"


def state(rows: RowRange, dtype: torch.dtype) -> dict[str, Tensor]:
    """Numbers that tell of which row of which class they are."""
    first = torch.arange(rows.start * CENTRES, rows.stop * CENTRES)
    weight = (first[:, None] * 4 + torch.arange(4)).to(dtype)
    return {"w": weight, "bias": torch.arange(rows.start, rows.stop) + 0.5, "scale": torch.tensor(3.0)}


def written(folder: Path, ranks: int, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """By one process, in the files of so many ranks."""
    tensors: dict[str, dict[str, Tensor]] = {}
    for rank in range(ranks):
        own = RowRange.of(CLASSES, rank, ranks)
        tensors |= in_rows("arcface", own, state(own, dtype), of_rows)
    found = CheckpointManifest(step=1, world_size=ranks, classes=CLASSES, class_digest="d", config={}, files={})
    save(Folder(folder), found, tensors, 2, Group())
    return open_checkpoint(Folder(folder / "step-00000001"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("part", [2**26, 100, 1])
def test_any_number_of_ranks_reads_what_any_other_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, part: int
) -> None:
    monkeypatch.setattr(files, "PART", part)
    for before in (1, 2, 3, 11):
        found = written(tmp_path / str(before), before, dtype)
        count = len(found.manifest.files)
        assert count == CLASSES if part == 1 else before <= count <= CLASSES
        for after in (1, 2, 3, 5, 11):
            for rank in range(after):
                rows = RowRange.of(CLASSES, rank, after)
                read, wanted = found.rows("arcface", rows, of_rows), state(rows, dtype)
                assert read.keys() == wanted.keys()
                assert all(torch.equal(read[key], wanted[key]) for key in wanted)
                assert read["w"].dtype == dtype


def test_only_files_with_own_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PART", 1)
    found = written(tmp_path, 1)
    read: list[str] = []
    whole = Folder.read
    monkeypatch.setattr(Folder, "read", lambda self, name: read.append(name) or whole(self, name))
    found.rows("arcface", RowRange(4, 7), of_rows)
    assert [name[:29] for name in read] == [f"arcface-rows-{c:010d}-{c + 1:05d}"[:29] for c in (4, 5, 6)] or len(
        read
    ) == 3


def test_parts_are_cut_by_what_is_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PART", 40)
    tensors = {"a": torch.ones(5), "b": torch.ones(5), "c": torch.ones(1), "d": torch.ones(100), "e": torch.ones(1)}
    cut = [(number, name, key) for number, name, key, _ in in_parts("net", iter(tensors.items()))]
    assert [number for number, _, _ in cut] == [0, 0, 1, 2, 3]
    by_file = {name: {k: tensors[k] for _, n, k in cut if n == name} for _, name, _ in cut}
    found = CheckpointManifest(step=1, world_size=1, classes=2, class_digest="d", config={}, files={})
    save(Folder(tmp_path), found, by_file, 2, Group())
    read = open_checkpoint(Folder(tmp_path / "step-00000001")).parts("net")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[key], tensors[key]) for key in tensors)


def test_the_bytes_are_those_that_the_library_reads(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, dtype=torch.bfloat16), "byte": torch.tensor([1, -2], dtype=torch.int8),
        "wide": torch.randn(2, 3, dtype=torch.float64), "yes": torch.tensor(True), "none": torch.zeros(0, 4),
        "one": torch.tensor(7), "w": torch.randn(5, 2), "old": torch.ones(2, dtype=torch.float16),
        "i": torch.ones(2, dtype=torch.int32), "u": torch.ones(3, dtype=torch.uint8),
    }  # fmt: skip
    data = b"".join(pieces(tensors))
    read = load(data)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[key], tensors[key]) and read[key].dtype == tensors[key].dtype for key in tensors)
    save_file(tensors, tmp_path / "library")
    assert len(data) == (tmp_path / "library").stat().st_size


def the_file(folder: Folder) -> Path:
    (path,) = [path for path in Path(str(folder)).iterdir() if path.suffix == ".safetensors"]
    return path


def test_a_flipped_byte_is_noticed(tmp_path: Path) -> None:
    found = written(tmp_path, 1)
    path = the_file(found.folder)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(Damaged, match="is damaged: SHA-256"):
        open_checkpoint(found.folder).rows("arcface", RowRange(0, 1), of_rows)


def test_a_short_or_missing_file_is_noticed(tmp_path: Path) -> None:
    found = written(tmp_path, 1)
    path = the_file(found.folder)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Damaged, match=r"has \d+ bytes, written with"):
        open_checkpoint(found.folder)
    path.unlink()
    with pytest.raises(Damaged, match="is missing, written with"):
        open_checkpoint(found.folder)
    with pytest.raises(Damaged, match="cannot be read: No such file"):  # it went while the run began
        found.rows("arcface", RowRange(0, 1), of_rows)


OUTSIDE = """{"step": 1, "world_size": 1, "classes": 2, "class_digest": "", "config": {}, "files":
{"a": {"bytes": 1, "sha256": "", "path": "../../secret"}}}"""


@pytest.mark.parametrize("text", ["", '{"format": 1', "[]", '{"format": 4}', "\x00\xff", OUTSIDE])
def test_a_damaged_manifest_is_noticed(tmp_path: Path, text: str) -> None:
    found = written(tmp_path, 1)
    (Path(str(found.folder)) / MANIFEST).write_text(text)
    with pytest.raises(Damaged, match="damaged"):
        open_checkpoint(found.folder)


def test_a_loss_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Damaged, match="has no rows of cosface, only"):
        written(tmp_path, 1).rows("cosface", RowRange(0, 1), of_rows)


@pytest.mark.parametrize("number", [1, 2])
def test_rows_of_earlier_formats_are_read_by_any_number_of_ranks(number: int) -> None:
    """There one file holds all rows of a rank that wrote."""
    found = open_checkpoint(Folder(Path(__file__).parents[1] / f"checkpoint{number}"))
    loss = {1: "arcface", 2: "sub_center_arcface"}[number]

    def rows(key: str) -> bool:
        return key == "head.weight" or key.startswith("optimizer.rows.")

    whole = found.rows(loss, RowRange(0, 4), rows)
    assert len(whole["head.weight"]) == 4 * number  # K centres a class
    assert ("optimizer.rows.first_scale" in whole) == (number == 2)
    for ranks in (2, 3, 4):
        parts = [found.rows(loss, RowRange.of(4, rank, ranks), rows) for rank in range(ranks)]
        for key, tensor in whole.items():
            again = torch.cat([part[key] for part in parts]) if rows(key) else parts[-1][key]
            assert torch.equal(again, tensor)
    assert any(key.startswith("weight.") for key in found.parts("backbone"))
