"""Checkpoints in the background: training does not wait, and what goes wrong is known in one step on all ranks."""

import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.s3 import environment
from trainer.checkpoint import CheckpointManifest, Saver, Shelf, files, latest
from trainer.distributed import Group, RowRange
from trainer.errors import UserError
from trainer.storage import Folder

Write = Callable[[Folder, str, Sequence[bytes]], None]
ROWS = 4


def manifest(step: int, size: int) -> CheckpointManifest:
    return CheckpointManifest(step=step, world_size=size, classes=ROWS, class_digest="d", config={}, files={})


def begin(saver: Saver, step: int, group: Group, value: float | None = None) -> torch.Tensor:
    """Save a state that says of which step it is; the tensor that was given."""
    rows = RowRange.of(ROWS, group.rank, group.size)
    weight = torch.full((len(rows), 2), float(step) if value is None else value)
    shared = [("a", torch.full((3,), float(step))), ("b", torch.full((5,), float(step)))]
    saver.save(manifest(step, group.size), files.in_rows("head", rows, {"w": weight}, lambda key: True), iter(shared))
    return weight


def values(parent: Path) -> set[float]:
    found = latest(Folder(parent))
    assert found is not None
    state = found.rows("head", RowRange(0, ROWS), lambda key: True) | found.parts("backbone")
    return {float(value) for tensor in state.values() for value in tensor.flatten()}


def slowly(gate: threading.Event) -> Write:
    write = Folder.write

    def wait(folder: Folder, name: str, content: Sequence[bytes]) -> None:
        assert gate.wait(60)
        write(folder, name, content)

    return wait


def behind_the_training(rank: int, parent: Path) -> None:
    group, gate = Group.current(), threading.Event()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Folder, "write", slowly(gate))
        patch.setattr(files, "PART", 16)  # a part for each tensor of the backbone: one a rank
        saver = Saver(Folder(parent), 2, group)
        weight = begin(saver, 1, group)
        assert latest(Folder(parent)) is None
        for _ in range(5):
            saver.look()
            weight.fill_(99)  # training goes on, in the same memory
        assert latest(Folder(parent)) is None
        gate.set()
        begin(saver, 2, group)  # waits for the first
        assert values(parent) <= {1.0, 2.0}
        while group.all_reduce(torch.tensor(int(saver._job is not None))):
            saver.look()
            time.sleep(0.01)
        assert values(parent) == {2.0}
        saver.mark_best(2, "val/rank1", 0.5)
        begin(saver, 3, group)
        saver.mark_best(3, "val/rank1", 0.75)
        saver.finish()
        saver.finish()
        saver.close()
    assert values(parent) == {3.0}
    assert Shelf.of(Folder(parent)).best() == (3, {"val/rank1": 0.75})


@pytest.mark.parametrize("size", [1, 2])
def test_training_goes_on_while_a_checkpoint_is_written(size: int, tmp_path: Path) -> None:
    run_on_ranks(size, behind_the_training, tmp_path / "run")


def broken(folder: Folder, name: str, content: Sequence[bytes]) -> None:
    time.sleep(0.3)
    raise OSError(5, "Input/output error", f"{folder}/{name}")


def steps_until_told(saver: Saver, group: Group) -> str:
    """How many steps the training has gone on, and what it was told."""
    for step in range(1, 1000):
        try:
            saver.look()
        except UserError as error:
            return f"{step} {type(error).__name__} {error}"
        group.all_reduce(torch.ones(()))  # as a training step keeps the ranks together
        time.sleep(0.01 * (group.rank + 1))
    raise AssertionError("nothing was told")


def known_in_one_step(rank: int, parent: Path) -> None:
    group, last = Group.current(), Group.current().size - 1
    saver = Saver(Folder(parent), 2, group)
    begin(saver, 1, group)
    saver.finish()
    for value, words in ((2.0, "UserError '.*' cannot be used: Input/output error"), (None, "Diverged .* not finite")):
        with pytest.MonkeyPatch.context() as patch:
            if rank == last and value is not None:
                patch.setattr(Folder, "write", broken)
            begin(saver, 2, group, value or (float("nan") if rank == last else 2.0))
            told = steps_until_told(saver, group)
        assert re.search(words, told), told
        assert int(told.partition(" ")[0]) > 1
        assert len(set(group.gather_text(told))) == 1
        assert [path.name for path in parent.iterdir()] == ["step-00000001"]
    begin(saver, 4, group)  # it can go on
    saver.finish()
    saver.close()
    assert values(parent) == {4.0}


@pytest.mark.parametrize("size", [1, 2])
def test_what_goes_wrong_is_raised_in_the_same_step_on_all_ranks(size: int, tmp_path: Path) -> None:
    run_on_ranks(size, known_in_one_step, tmp_path / "run")


def test_host_memory_is_used_again(tmp_path: Path) -> None:
    saver = Saver(Folder(tmp_path), 2, Group())
    begin(saver, 1, Group())
    before = {key: tensor.data_ptr() for key, tensor in saver._copies.items()}
    begin(saver, 2, Group())
    assert {key: tensor.data_ptr() for key, tensor in saver._copies.items()} == before
    saver.finish()


DYING = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
import torch, torch.distributed as dist
from tests.trainer.checkpoint.test_saver import begin
from trainer.checkpoint import Saver
from trainer.distributed import Group
from trainer.storage import Folder
rank = int(sys.argv[2])
store = dist.TCPStore("127.0.0.1", int(sys.argv[3]), 2, rank == 0, timedelta(seconds=60))
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
saver, write = Saver(Folder(Path(sys.argv[1])), 2, group := Group.current()), Folder.write
def dies(folder, name, content):
    os._exit(9) if rank else write(folder, name, content)
begin(saver, 1, group)
saver.finish()
Folder.write = dies
begin(saver, 2, group)
try:
    while True:
        saver.look()
        time.sleep(0.05)
except RuntimeError:
    saver.close()
    print("noticed", flush=True)
"""


def test_a_rank_that_dies_in_the_middle_leaves_nobody_waiting(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [[sys.executable, "-c", DYING, str(tmp_path), str(rank), str(port)] for rank in range(2)]
    ranks = [subprocess.Popen(one, env=environment(), stdout=subprocess.PIPE, text=True) for one in arguments]
    try:
        assert ranks[1].wait(120) == 9
        assert ranks[0].communicate(timeout=60)[0] == "noticed\n"
    finally:
        for one in ranks:
            one.kill()
            one.communicate()
    assert values(tmp_path) == {1.0}
