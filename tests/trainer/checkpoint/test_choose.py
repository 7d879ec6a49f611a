"""All ranks go on from one checkpoint, the newest that all of them can read, and say which they passed over."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.ranks import run_on_ranks
from trainer.checkpoint import Checkpoint, CheckpointManifest, go_on, in_rows, save
from trainer.checkpoint.files import MANIFEST
from trainer.distributed import Group, RowRange
from trainer.errors import UserError
from trainer.storage import Folder


def fill(parent: Path, group: Group, *steps: int) -> None:
    rows = RowRange.of(3, group.rank, group.size)
    for step in steps:
        files = in_rows("arcface", rows, {"w": torch.full((len(rows),), float(step))}, lambda key: True)
        manifest = CheckpointManifest(
            step=step, world_size=group.size, classes=3, class_digest="d", config={}, files={}
        )
        save(Folder(parent), manifest, files, 9, group)


def chosen(parent: Path, group: Group) -> tuple[int | None, list[str]]:
    """Which one, and what was told of the others."""
    rows, told = RowRange.of(3, group.rank, group.size), []

    def load(found: Checkpoint) -> None:
        state = found.rows("arcface", rows, lambda key: True)
        assert state["w"].tolist() == [found.step] * len(rows)

    found = go_on(Folder(parent), group, load, told.append)
    return None if found is None else found.step, told


def file_of(folder: Path, classes: str) -> Path:
    (path,) = folder.glob(f"arcface-rows-{classes}-*.safetensors")
    return path


def flip(folder: Path) -> None:
    path = file_of(folder, "0000000002-0000000003")  # the second rank's
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(folder: Path) -> None:
    path = file_of(folder, "0000000002-0000000003")
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "SHA-256": flip,
    "written with": cut,
    "is missing": lambda folder: file_of(folder, "0000000000-0000000002").unlink(),
    f"{MANIFEST}' is damaged": lambda folder: (folder / MANIFEST).write_text("{") and None,
    "lacks the rows of the classes 3 to 8": lambda folder: (
        (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace('"classes": 3', '"classes": 9')) and None
    ),
}


def damaged_and_passed_over(rank: int, parent: Path) -> None:
    group = Group.current()
    assert chosen(parent, group) == (None, [])
    for number, (words, damage) in enumerate(DAMAGES.items()):
        own = parent / str(number)
        fill(own, group, 1, 2)
        assert chosen(own, group) == (2, [])
        group.barrier()
        if rank == 0:
            damage(own / "step-00000002")
        group.barrier()
        step, (told,) = chosen(own, group)
        assert step == 1
        assert words in told
        assert told.endswith(f"'{own}/step-00000002' is passed over")
        assert group.gather_text(told) == [told, told]
        group.barrier()
        if rank == 0:
            flip(own / "step-00000001")
        group.barrier()
        with pytest.raises(UserError, match=r"no checkpoint in '.*' can be read: .*; start a new run in another"):
            chosen(own, group)


def test_a_damaged_one_is_passed_over_on_all_ranks_alike(tmp_path: Path) -> None:
    run_on_ranks(2, damaged_and_passed_over, tmp_path / "run")


def one_view_each(rank: int, parent: Path) -> None:
    group = Group.current()
    fill(parent, group, 1, 2)
    own = parent.with_name(f"{parent.name}-{rank}")  # as if each machine had a disk of its own
    shutil.copytree(parent, own)
    if rank:
        (own / "step-00000002" / MANIFEST).write_bytes((own / "step-00000002" / MANIFEST).read_bytes() + b" ")
    with pytest.raises(UserError, match="the 2 workers see different checkpoints"):
        chosen(own, group)
    if rank:
        shutil.rmtree(own / "step-00000002")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.checkpoint.choose._PATIENCE_S", 0.2)
        step, (told,) = chosen(own, group)
    assert step == 1
    assert "is not a checkpoint" in told
    assert "(worker 1)" in told


def test_ranks_that_see_other_folders(tmp_path: Path) -> None:
    run_on_ranks(2, one_view_each, tmp_path / "run")


def refused_by_one(rank: int, parent: Path) -> None:
    group, tried = Group.current(), []
    fill(parent, group, 1, 2)

    def load(found: Checkpoint) -> None:
        tried.append(found.step)
        if rank:
            raise UserError("the backbone is another one")

    with pytest.raises(UserError, match=r"the backbone is another one \(worker 1\)"):
        go_on(Folder(parent), group, load, lambda text: None)
    assert tried == [2]  # what does not fit is no damage: the one before it would not fit either


def test_one_that_does_not_fit_is_not_passed_over(tmp_path: Path) -> None:
    run_on_ranks(2, refused_by_one, tmp_path / "run")
