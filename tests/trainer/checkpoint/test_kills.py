"""Killed at any moment while it writes behind the training, a run has its newest whole checkpoint, and no half one."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.s3 import environment, s3_bucket
from trainer.checkpoint import CheckpointManifest, Shelf, in_rows, latest, open_checkpoint, save
from trainer.checkpoint.files import MANIFEST
from trainer.distributed import Group, RowRange
from trainer.storage import Folder

KILLS = 12
# A process that has imported everything, and forks writers: they start at once.
NURSERY = """
import os, sys
import torch
from trainer.checkpoint import CheckpointManifest, Saver, files
from trainer.distributed import Group, RowRange
from trainer.storage import Folder

files.PART = 2**16
def write(address, step):
    saver, weight = Saver(Folder.at(address), 2, Group()), torch.zeros(30, 10_000)
    while True:
        step += 1
        weight.fill_(step)
        state = files.in_rows("head", RowRange(0, 30), {"w": weight}, lambda key: True)
        manifest = CheckpointManifest(step=step, world_size=1, classes=30, class_digest="", config={}, files={})
        saver.save(manifest, state, iter([("a", weight[:9]), ("b", weight[:3])]))
        weight.fill_(-1)
        saver.finish()
        os.write(1, f"{step}\\n".encode())

for line in sys.stdin:
    address, step = line.split()
    if (pid := os.fork()) == 0:
        write(address, int(step))
    os.write(1, f"pid {pid}\\n".encode())
    os.waitpid(pid, 0)
    os.write(1, b"gone\\n")
"""


@pytest.fixture(scope="module")
def nursery() -> Iterator["Nursery"]:
    with s3_bucket("runs") as address, started(address) as found:
        yield found


class Nursery:
    def __init__(self, process: "subprocess.Popen[str]", bucket: str) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.to, self.told, self.bucket = process.stdin, process.stdout, bucket

    def killed(self, address: str, step: int, delay_s: float) -> int:
        """Write from this step on, and kill so long after the first checkpoint; the last that was acknowledged."""
        self.to.write(f"{address} {step}\n")
        self.to.flush()
        pid, last = int(self.told.readline().split()[1]), step
        while last == step:
            last = int(self.told.readline())
        time.sleep(delay_s)
        os.kill(pid, signal.SIGKILL)
        while (line := self.told.readline().strip()) != "gone":
            last = int(line)
        return last


@contextmanager
def started(bucket: str) -> Iterator[Nursery]:
    process = subprocess.Popen(
        [sys.executable, "-c", NURSERY], env=environment(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        yield Nursery(process, bucket)


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_killed_at_any_moment_the_newest_is_whole(where: str, nursery: Nursery, tmp_path: Path) -> None:
    address = f"{nursery.bucket}/run" if where == "s3" else str(tmp_path / "run")
    folder, step, generator = Folder.at(address), 0, random.Random(7)
    half = 0
    for _ in range(KILLS):
        acknowledged = nursery.killed(address, step, generator.uniform(0, 0.1 if where == "disk" else 0.5))
        found = latest(folder)
        assert found is not None
        assert found.step >= acknowledged
        state = found.rows("head", RowRange(0, 30), lambda key: True) | found.parts("backbone")
        assert all(bool((tensor == found.step).all()) for tensor in state.values())
        assert state.keys() == {"w", "a", "b"}
        half += bool(left(folder))
        step = found.step
    assert half > KILLS // 4  # it was killed while it wrote
    files = in_rows("head", RowRange(0, 30), {"w": torch.ones(30, 2)}, lambda key: True)
    last = CheckpointManifest(step=step + 1, world_size=1, classes=30, class_digest="", config={}, files={})
    save(folder, last, files, 2, Group())
    assert left(folder) == set()


def left(folder: Folder) -> set[str]:
    """Files that belong to no checkpoint."""
    known = set()
    for step in Shelf.of(folder).whole:
        inside = folder / f"step-{step:08d}"
        paths = [entry.path for entry in open_checkpoint(inside).manifest.files.values()]
        known |= {f"{inside.name}/{name}" for name in [MANIFEST, "trusted", *paths]}
    return set(folder.sizes()) - known
