"""A disk that is full, and one that is away, while checkpoints are written: one sentence, and the run goes on later."""

import json
from contextlib import suppress
from pathlib import Path

import pytest

from tests.disk import small_disk
from tests.ranks import run_on_ranks
from tests.trainer.faults.command import SETTINGS
from trainer.config import Config, load
from trainer.errors import UserError
from trainer.train import Record, run

pytestmark = pytest.mark.timeout(900)
STEPS = 60


def config(data: Path, out: Path) -> Config:
    often = ("run.checkpoint_every=2", f"run.max_steps={STEPS}", "schedule.kind=constant")
    return load(None, [*SETTINGS, *often, f"data.path={data}", f"run.out={out}"])


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def full_then_free(rank: int, data: Path, disk: Path, losses: dict[int, float]) -> None:
    found: dict[int, float] = {}

    def report(record: Record) -> None:
        if record.kind == "step":
            assert losses[record.step] == record.values["loss"]
            found[record.step] = record.values["loss"]
        if rank == 0 and record.step == 11 and not (disk / "filled").exists():
            (disk / "filled").touch()
            fill(disk / "ballast")

    with pytest.raises(UserError, match=r"^the disk of '.*' is full, so that '.*' was not written; free some space"):
        run(config(data, disk / "run"), resume=False, report=report)
    assert max(found) >= 11
    (disk / "ballast").unlink(missing_ok=True)
    run(config(data, disk / "run"), resume=True, report=report)
    assert sorted(found) == list(range(1, STEPS + 1))
    if rank == 0:
        assert not list(disk.rglob("*partial*"))


def test_a_disk_that_is_full(data: Path, tmp_path: Path, undisturbed: dict[int, float]) -> None:
    with small_disk(tmp_path / "disk") as disk:
        run_on_ranks(2, full_then_free, data, disk, undisturbed)


def away_then_back(rank: int, data: Path, folder: Path, losses: dict[int, float]) -> None:
    """What is mounted at the folder goes, and a file is there instead."""
    found: dict[int, float] = {}

    def report(record: Record) -> None:
        if record.kind == "step":
            assert losses[record.step] == record.values["loss"]
            found[record.step] = record.values["loss"]
        if rank == 0 and record.step == 11 and not (folder / "back").exists():
            folder.rename(folder.with_name("gone"))
            folder.touch()

    with pytest.raises(UserError, match=r"cannot be used: (Not a directory|File exists); mend that, and --resume"):
        run(config(data, folder / "run"), resume=False, report=report)
    if rank == 0:
        folder.unlink()
        folder.with_name("gone").rename(folder)
        (folder / "back").touch()
    while not (folder / "back").exists():
        continue
    run(config(data, folder / "run"), resume=True, report=report)
    assert sorted(found) == list(range(1, STEPS + 1))
    (folder / f"{rank}.json").write_text(json.dumps(found))


def test_a_disk_that_is_away(data: Path, tmp_path: Path, undisturbed: dict[int, float]) -> None:
    (tmp_path / "disk").mkdir()
    run_on_ranks(2, away_then_back, data, tmp_path / "disk", undisturbed)
    assert len(list((tmp_path / "disk").glob("?.json"))) == 2
