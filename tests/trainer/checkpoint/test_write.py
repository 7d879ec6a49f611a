"""Checkpoints appear whole or not at all, what fails on one rank fails on all, and a divergence spoils none."""

import errno
import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from tests.disk import small_disk
from tests.ranks import run_on_ranks
from trainer.checkpoint import CheckpointManifest, Shelf, in_rows, latest, open_checkpoint, save, set_aside
from trainer.checkpoint.files import MANIFEST
from trainer.distributed import Group, RowRange
from trainer.errors import Diverged, UserError
from trainer.storage import Folder


def manifest(step: int, world_size: int = 1) -> CheckpointManifest:
    return CheckpointManifest(step=step, world_size=world_size, classes=3, class_digest="d", config={"a": 1}, files={})


def write(parent: Path, step: int, keep: int = 10) -> Path:
    tensors = {"w": torch.arange(6.0).view(2, 3) + step, "half": torch.ones(4, dtype=torch.bfloat16)}
    save(Folder(parent), manifest(step), {"head.safetensors": tensors}, keep, Group())
    return parent / f"step-{step:08d}"


def newest(parent: Path) -> int | None:
    found = latest(Folder(parent))
    return None if found is None else found.step


def names(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir())


def steps(parent: Path) -> list[int]:
    return [int(name.removeprefix("step-")) for name in names(parent)]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path, 5)
    found = latest(Folder(tmp_path))
    assert found is not None
    assert found.step == 5
    tensors = found.read("head.safetensors")
    assert torch.equal(tensors["w"], torch.arange(6.0).view(2, 3) + 5)
    assert tensors["half"].dtype == torch.bfloat16


def test_the_newest_is_chosen_and_old_ones_go(tmp_path: Path) -> None:
    for step in (1000, 2000, 10_000):
        write(tmp_path, step, keep=2)
    assert steps(tmp_path) == [2000, 10_000]
    assert newest(tmp_path) == 10_000


def test_one_from_which_the_run_went_on_long_enough_is_always_kept(tmp_path: Path) -> None:
    course = []
    for step in range(30, 241, 30):
        write(tmp_path, step, keep=1)
        course.append(steps(tmp_path))
    # The newest, the newest trusted one, and the one that will be trusted next.
    assert course[:4] == [[30], [30, 60], [30, 90], [30, 120]]
    assert course[4:] == [[30, 120, 150], [30, 120, 180], [30, 120, 210], [120, 210, 240]]


def test_after_a_divergence_the_last_trusted_one_is_gone_on_from(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        write(tmp_path, step)
    assert set_aside(Folder(tmp_path), 320, Group()) == 200
    assert Shelf.of(Folder(tmp_path)).diverged == [300]
    assert newest(tmp_path) == 200
    assert open_checkpoint(Folder(tmp_path / "step-00000300")).step == 300  # who wants to look at it can
    assert set_aside(Folder(tmp_path), 210, Group()) == 200  # it diverges again, soon: what was trusted stays
    write(tmp_path, 250, keep=9)
    assert (Shelf.of(Folder(tmp_path)).diverged, newest(tmp_path)) == ([300], 250)
    write(tmp_path, 300, keep=9)  # in its place
    assert (Shelf.of(Folder(tmp_path)).diverged, newest(tmp_path)) == ([], 300)


def test_one_that_diverged_goes_when_the_run_is_past_it(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        write(tmp_path, step)
    set_aside(Folder(tmp_path), 320, Group())
    for step in (250, 350, 450):
        write(tmp_path, step, keep=9)
    assert steps(tmp_path) == [100, 200, 250, 350, 450]


def test_after_a_divergence_in_the_first_steps_nothing_is_left_to_go_on_from(tmp_path: Path) -> None:
    write(tmp_path, 1)
    assert set_aside(Folder(tmp_path), 2, Group()) == 0
    assert newest(tmp_path) is None


def test_later_ones_are_of_a_course_that_was_left(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        write(tmp_path, step)
    write(tmp_path, 250, keep=1)  # 300 was damaged, say, and the run went on from 200
    assert steps(tmp_path) == [200, 250]
    assert newest(tmp_path) == 250


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_not_saved(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    write(tmp_path, 1)
    tensors = {"count": torch.tensor(3), "none": torch.zeros(0), "w": torch.tensor([1.0, value, 2.0], dtype=dtype)}
    with pytest.raises(Diverged, match=r"'w' of a\.safetensors is not finite after step 2"):
        save(Folder(tmp_path), manifest(2), {"a.safetensors": tensors}, 2, Group())
    assert names(tmp_path) == ["step-00000001"]


def rows(rank: int, start: float = 0.0) -> dict[str, dict[str, torch.Tensor]]:
    own = RowRange.of(3, rank, 2)
    return in_rows("arcface", own, {"w": torch.full((len(own),), start + rank)}, lambda key: True)


def full(path: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def all_raise_what_one_has(rank: int, parent: Path) -> None:
    group, folder = Group.current(), Folder(parent)
    save(folder, manifest(1, 2), rows(rank), 2, group)
    with pytest.raises(Diverged, match="0000000002-0000000003"):  # on rank 1 alone
        save(folder, manifest(2, 2), rows(rank, start=float("nan") if rank else 0.0), 2, group)
    with pytest.raises(UserError, match=r"no worker wrote the rows of the classes 2 to 2 of arcface; start"):
        save(folder, manifest(2, 2), {} if rank else rows(rank), 2, group)
    with pytest.raises(UserError, match=r"no worker wrote 'backbone-part-0001\.safetensors'"):
        save(folder, manifest(2, 2), rows(rank), 2, group, ["backbone-part-0001.safetensors"])
    with pytest.MonkeyPatch.context() as patch:
        if rank:
            patch.setattr("trainer.atomic.sync", full)
        with pytest.raises(UserError, match=r"is full, so that 'step-00000002' was not written.*worker 1"):
            save(folder, manifest(2, 2), rows(rank), 2, group)
        patch.undo()
        patch.setattr("trainer.checkpoint.write._PATIENCE_S", 0)
        with pytest.raises(UserError, match=r"rows-0000000002-0000000003-\w+.*is not there for the first one.*shared"):
            save(Folder(parent.with_name("own")) if rank else folder, manifest(2, 2), rows(rank), 2, group)
    if rank == 0:
        assert names(parent) == ["step-00000001"]


def test_what_fails_on_one_rank_is_raised_on_all_and_leaves_nothing(tmp_path: Path) -> None:
    run_on_ranks(2, all_raise_what_one_has, tmp_path / "run")


def test_one_without_the_rows_of_a_class_is_not_whole(tmp_path: Path) -> None:
    tensors = in_rows("arcface", RowRange(0, 3), {"w": torch.ones(3)}, lambda key: True)
    save(Folder(tmp_path), manifest(1), tensors, 2, Group())
    path = tmp_path / "step-00000001" / MANIFEST
    path.write_text(path.read_text().replace('"classes": 3', '"classes": 5'))
    with pytest.raises(UserError, match=r"lacks the rows of the classes 3 to 4 of arcface"):
        newest(tmp_path)


def test_a_disk_that_ends_in_mid_file_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    """The system refuses the bytes beyond a limit."""
    write(tmp_path, 1)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"step-00000002' cannot be used: File too large; mend that"):
            save(Folder(tmp_path), manifest(2), {"a.safetensors": {"w": torch.ones(100_000)}}, 2, Group())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert names(tmp_path) == ["step-00000001"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        write(disk, 1)
        with pytest.raises(UserError) as raised:
            save(Folder(disk), manifest(2), {"a.safetensors": {"w": torch.ones(400_000)}}, 2, Group())
        assert str(raised.value) == (
            f"the disk of '{disk}' is full, so that 'step-00000002' was not written; free some space there and run "
            "the command again"
        )
        assert names(disk) == ["step-00000001"]
        write(disk, 2)
        assert names(disk) == ["step-00000001", "step-00000002"]


def test_what_a_killed_writer_left_goes_with_the_next(tmp_path: Path) -> None:
    kept = write(tmp_path, 1)
    for left in ("step-00000002/a-12.safetensors", "step-00000003.partial/checkpoint.json", "step-00000001/.partial-x"):
        (tmp_path / left).parent.mkdir(exist_ok=True)
        (tmp_path / left).write_text("{}")
    (tmp_path / "step-00000001/trusted").touch()
    (tmp_path / "notes.txt").touch()  # not ours
    assert newest(tmp_path) == 1
    write(tmp_path, 4)
    assert names(tmp_path) == ["notes.txt", "step-00000001", "step-00000004"]
    assert not (kept / ".partial-x").exists()
    assert (kept / "trusted").exists()


def test_a_half_written_one_is_never_chosen(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    write(tmp_path, 1)
    (tmp_path / "step-00000002.partial").mkdir()
    (tmp_path / "step-00000002.partial" / MANIFEST).write_text("{}")
    (tmp_path / "step-00000003").mkdir()
    (tmp_path / "step-00000003" / "head-1.safetensors").write_bytes(b"\0" * 100)
    assert newest(tmp_path) == 1


def test_the_same_step_can_be_written_again(tmp_path: Path) -> None:
    before = names(write(tmp_path, 1))
    after = names(write(tmp_path, 1))
    assert len(set(before) | set(after)) == 3  # the manifest, and the files of both
    assert newest(tmp_path) == 1
    assert len(names(write(tmp_path, 2).with_name("step-00000001"))) == 2


def test_no_pickle_is_in_it(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    assert json.loads((folder / MANIFEST).read_text())["step"] == 1
