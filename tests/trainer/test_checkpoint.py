"""Checkpoints appear whole or not at all, damage is noticed, and a divergence spoils none."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tests.disk import small_disk
from tests.ranks import run_on_ranks
from trainer import checkpoint
from trainer.atomic import sync
from trainer.checkpoint import (
    MANIFEST,
    CheckpointManifest,
    agreed,
    latest,
    open_checkpoint,
    rows_file,
    save,
    set_aside,
)
from trainer.distributed import Group, RowRange
from trainer.errors import Diverged, UserError

checkpoint_write = checkpoint._write


def manifest(step: int, world_size: int = 1) -> CheckpointManifest:
    return CheckpointManifest(step=step, world_size=world_size, classes=3, class_digest="d", config={"a": 1}, files={})


def write(parent: Path, step: int, keep: int = 10) -> Path:
    tensors = {"w": torch.arange(6.0).view(2, 3) + step, "half": torch.ones(4, dtype=torch.bfloat16)}
    return save(parent, manifest(step), {"head.safetensors": tensors}, keep, Group())


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path, 5)
    found = latest(tmp_path)
    assert found is not None
    assert found.step == 5
    tensors = found.read("head.safetensors")
    assert torch.equal(tensors["w"], torch.arange(6.0).view(2, 3) + 5)
    assert tensors["half"].dtype == torch.bfloat16


def names(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir())


def steps(parent: Path) -> list[int]:
    return [int(name.removeprefix("step-")) for name in names(parent)]


def test_the_newest_is_chosen_and_old_ones_go(tmp_path: Path) -> None:
    for step in (1000, 2000, 10_000):
        write(tmp_path, step, keep=2)
    assert steps(tmp_path) == [2000, 10_000]
    found = latest(tmp_path)
    assert found is not None
    assert found.step == 10_000


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
    assert set_aside(tmp_path, 320, Group()) == 200
    assert names(tmp_path) == ["step-00000100", "step-00000200", "step-00000300.diverged"]
    found = latest(tmp_path)
    assert found is not None
    assert found.step == 200
    assert open_checkpoint(tmp_path / "step-00000300.diverged").step == 300  # who wants to look at it can
    assert set_aside(tmp_path, 210, Group()) == 200  # it diverges again, soon: what was trusted stays
    for step in (250, 300, 350, 400):
        write(tmp_path, step, keep=9)
    assert steps(tmp_path) == [100, 200, 250, 300, 350, 400]  # it is past the place where it went wrong


def test_after_a_divergence_in_the_first_steps_nothing_is_left_to_go_on_from(tmp_path: Path) -> None:
    write(tmp_path, 1)
    assert set_aside(tmp_path, 2, Group()) == 0
    assert latest(tmp_path) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_not_saved(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    write(tmp_path, 1)
    tensors = {"count": torch.tensor(3), "none": torch.zeros(0), "w": torch.tensor([1.0, value, 2.0], dtype=dtype)}
    with pytest.raises(Diverged, match=r"'w' of a\.safetensors is not finite after step 2"):
        save(tmp_path, manifest(2), {"a.safetensors": tensors}, 2, Group())
    assert names(tmp_path) == ["step-00000001"]


def rows(rank: int, size: int = 2, start: float = 0.0) -> dict[str, dict[str, torch.Tensor]]:
    return {rows_file("arcface", RowRange.of(3, rank, size)): {"w": torch.full((2,), start + rank)}}


def all_raise_what_one_has(rank: int, parent: Path) -> None:
    group = Group.current()
    save(parent, manifest(1, 2), rows(rank), 2, group)
    with pytest.raises(Diverged, match="0000000002-0000000003"):  # on rank 1 alone
        save(parent, manifest(2, 2), rows(rank, start=float("nan") if rank else 0.0), 2, group)
    with pytest.raises(UserError, match=r"no worker wrote 'arcface-rows-0000000002-0000000003\.safetensors'"):
        save(parent, manifest(2, 2), {} if rank else rows(rank), 2, group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "sync", full if rank else sync)
        with pytest.raises(UserError, match=r"is full, so that 'step-00000002' was not written.*worker 1"):
            save(parent, manifest(2, 2), rows(rank), 2, group)
        patch.undo()
        patch.setattr(checkpoint, "_write", elsewhere if rank else checkpoint_write)
        patch.setattr(checkpoint, "_PATIENCE_S", 0)
        with pytest.raises(UserError, match=r"rows-0000000002-0000000003.*is not there for the first one.*shared by"):
            save(parent, manifest(2, 2), rows(rank), 2, group)
    if rank == 0:
        assert names(parent) == ["step-00000001"]


def elsewhere(partial: Path, files: Mapping[str, Mapping[str, torch.Tensor]]) -> str:
    """As if the folder of this name were on a disk of this rank's own."""
    own = partial.parent.with_name("own") / partial.name
    own.mkdir(parents=True)
    return checkpoint_write(own, files)


def full(path: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_what_fails_on_one_rank_is_raised_on_all_and_leaves_nothing(tmp_path: Path) -> None:
    run_on_ranks(2, all_raise_what_one_has, tmp_path / "run")


def go_on_together(rank: int, parent: Path) -> None:
    group = Group.current()
    assert agreed(parent, group) is None
    for step in (1, 2):
        save(parent, manifest(step, 2), rows(rank, start=step), 2, group)
    found = agreed(parent, group)
    assert found is not None
    assert found.step == 2
    own = parent.with_name(f"{parent.name}-{rank}")  # as if each machine had a disk of its own
    shutil.copytree(parent, own)
    if rank:
        shutil.rmtree(own / "step-00000002")
    with pytest.raises(UserError, match=r"-1/step-00000002' is not a checkpoint.*\(worker 1\)"):
        agreed(own, group)
    if rank:
        shutil.copytree(own / "step-00000001", own / "step-00000002")
    with pytest.raises(UserError, match="the 2 workers see different checkpoints"):
        agreed(own, group)


def test_all_ranks_go_on_from_the_same_checkpoint(tmp_path: Path) -> None:
    run_on_ranks(2, go_on_together, tmp_path / "run")


def test_one_without_the_rows_of_a_rank_is_not_whole(tmp_path: Path) -> None:
    folder = save(tmp_path, manifest(1), rows(0, 1), 2, Group())
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"world_size": 1', '"world_size": 2'))
    with pytest.raises(UserError, match=r"lacks 'arcface-rows-0000000000-0000000002\.safetensors'"):
        latest(tmp_path)


def test_a_disk_that_ends_in_mid_file_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    """The system refuses the bytes beyond a limit, in the library that writes the tensors."""
    write(tmp_path, 1)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"a\.safetensors' cannot be used: File too large; mend that"):
            save(tmp_path, manifest(2), {"a.safetensors": {"w": torch.ones(100_000)}}, 2, Group())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert names(tmp_path) == ["step-00000001"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        write(disk, 1)
        with pytest.raises(UserError) as raised:
            save(disk, manifest(2), {"a.safetensors": {"w": torch.ones(400_000)}}, 2, Group())
        assert str(raised.value) == (
            f"the disk of '{disk}' is full, so that 'step-00000002' was not written; free some space there and run "
            "the command again"
        )
        assert names(disk) == ["step-00000001"]
        write(disk, 2)
        assert names(disk) == ["step-00000001", "step-00000002"]


def test_what_a_killed_writer_left_goes_with_the_next(tmp_path: Path) -> None:
    (tmp_path / "step-00000001.partial").mkdir()
    write(tmp_path, 2)
    assert names(tmp_path) == ["step-00000002"]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert latest(tmp_path) is None


def test_a_half_written_one_is_never_chosen(tmp_path: Path) -> None:
    write(tmp_path, 1)
    partial = tmp_path / "step-00000002.partial"
    partial.mkdir()
    (partial / "head.safetensors").write_bytes(b"\0" * 100)
    (partial / MANIFEST).write_text("{}")
    (tmp_path / "step-00000003").mkdir()
    found = latest(tmp_path)
    assert found is not None
    assert found.step == 1


def test_the_same_step_can_be_written_again(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / "step-00000001" / "stale").write_text("x")
    write(tmp_path, 1)
    assert not (tmp_path / "step-00000001" / "stale").exists()


def test_a_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path, 1) / "head.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        open_checkpoint(path.parent).read("head.safetensors")


def test_a_short_or_missing_file_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path, 1) / "head.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="bytes"):
        latest(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="None bytes"):
        latest(tmp_path)


def test_a_damaged_manifest_is_noticed(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    (folder / MANIFEST).write_text('{"format": 1')
    with pytest.raises(UserError, match="damaged"):
        latest(tmp_path)


def test_no_pickle_is_in_it(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    assert json.loads((folder / MANIFEST).read_text())["step"] == 1


WRITER = """
import sys
from pathlib import Path
import torch
from trainer.checkpoint import CheckpointManifest, save
from trainer.distributed import Group
for step in range(1, 10_000):
    tensors = {"w": torch.full((400_000,), float(step))}
    manifest = CheckpointManifest(step=step, world_size=1, classes=3, class_digest="d", config={}, files={})
    save(Path(sys.argv[1]), manifest, {"a.safetensors": tensors, "b.safetensors": tensors}, 2, Group())
    print(step, flush=True)
"""


def test_killed_at_any_moment_the_newest_is_whole(tmp_path: Path) -> None:
    for round_number, delay in enumerate((0.0, 0.013, 0.031)):
        parent = tmp_path / str(round_number)
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(parent)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        acknowledged = [process.stdout.readline() for _ in range(3)]
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        acknowledged += process.stdout.readlines()
        process.wait()
        process.stdout.close()
        found = latest(parent)
        assert found is not None
        assert found.step >= int(acknowledged[-1])
        for name in ("a.safetensors", "b.safetensors"):
            assert bool((found.read(name)["w"] == found.step).all())
