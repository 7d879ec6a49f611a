"""Checkpoints appear whole or not at all, and damage is noticed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from trainer.checkpoint import MANIFEST, CheckpointManifest, latest, open_checkpoint, save
from trainer.distributed import Group
from trainer.errors import UserError


def manifest(step: int) -> CheckpointManifest:
    return CheckpointManifest(step=step, world_size=1, classes=3, class_digest="d", config={"a": 1}, files={})


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


def test_the_newest_is_chosen_and_old_ones_go(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        write(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000010"]
    found = latest(tmp_path)
    assert found is not None
    assert found.step == 10


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
