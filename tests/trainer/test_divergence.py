"""A loss that is not finite: the batch is skipped, or the run goes back with a lower rate; the samples are recorded."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.ranks import folder_of_shapes, run_on_ranks
from trainer.checkpoint import open_checkpoint
from trainer.config import Config, load
from trainer.data.augment import Augment
from trainer.data.importers import ImportOptions
from trainer.data.importers.run import run_import
from trainer.divergence import RECORD
from trainer.errors import Diverged
from trainer.storage import Folder
from trainer.train import Record, run

NAN_STEPS: set[int] = set()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    run_import("folder", folder_of_shapes(folder / "images", 8), folder / "data", ImportOptions(holdout_share=0.3))
    return folder / "data"


def config(data: Path, out: Path, *overrides: str) -> Config:
    common = ("data.batch_size=14", "run.epochs=9", "run.log_every=1", "run.eval_every=0", "run.checkpoint_every=1")
    small = ("backbone.name=convnet", "backbone.dimension=16", "backbone.width=4", "data.height=24", "data.width=24")
    rest = ("loss.scale=16", "optimizer.lr=0.05", "schedule.kind=constant", "run.keep_checkpoints=9")
    return load(None, [f"data.path={data}", f"run.out={out}", *common, *small, *rest, *overrides])


def records(config: Config, resume: bool = False) -> list[Record]:
    found: list[Record] = []
    run(config, resume=resume, report=found.append)
    return found


def losses(found: list[Record]) -> dict[int, float]:
    return {one.step: one.values["loss"] for one in found if one.kind == "step"}


def entries(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / RECORD).read_text().splitlines()]


def spoil(rank: int) -> None:
    """Make the images of some steps not a number, on one rank alone."""
    whole: Callable[..., tuple[torch.Tensor, torch.Tensor]] = Augment.__call__
    if getattr(Augment, "spoilt", False):
        return

    def spoilt(self: Augment, batch: object, epoch: int, step: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        images_BCHW, labels_B = whole(self, batch, epoch, step, size)
        return images_BCHW * (math.nan if step + 1 in NAN_STEPS and rank == 1 else 1), labels_B

    Augment.__call__ = spoilt  # type: ignore[method-assign, assignment]
    Augment.spoilt = True  # type: ignore[attr-defined]


def state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    found = open_checkpoint(Folder.at(folder / "checkpoints" / f"step-{step:08d}"))
    return {
        f"{name}/{key}": tensor
        for name in found.manifest.files
        for key, tensor in found.read(name).items()
    }  # fmt: skip


def skipped(rank: int, data: Path, folder: Path) -> None:
    spoil(rank)
    NAN_STEPS.update({3})
    chosen = config(data, folder / "run", "run.on_divergence=skip", "run.max_steps=6")
    found = records(chosen)
    NAN_STEPS.clear()
    assert sorted(losses(found)) == [1, 2, 4, 5, 6]
    assert all(map(math.isfinite, losses(found).values()))
    before, after = state(folder / "run", 2), state(folder / "run", 3)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not all(torch.equal(after[name], value) for name, value in state(folder / "run", 4).items())
    assert any("step 3 is skipped: " in one.text for one in found)
    if rank == 0:
        (entry,) = entries(folder / "run")
        assert (entry["step"], entry["action"], entry["rate"]) == (3, "skip", 1.0)
        assert isinstance(entry["keys"], dict)
        assert [(step, len(keys)) for step, keys in entry["keys"].items()] == [("3", 2)]  # the last of the epoch
    NAN_STEPS.update(range(3, 99))
    with pytest.raises(Diverged, match=r"so did the 10 batches before it, which were skipped; lower optimizer\.lr"):
        records(config(data, folder / "bad", "run.on_divergence=skip"))
    NAN_STEPS.clear()


def test_a_batch_is_skipped(data: Path, tmp_path: Path) -> None:
    run_on_ranks(2, skipped, data, tmp_path)


def backs_off(rank: int, data: Path, folder: Path) -> None:
    chosen = ["run.on_divergence=back_off", "run.back_off=1e-9", "optimizer.lr=2e7", "head.optimizer.lr=1e9"]
    found = records(config(data, folder / "run", *chosen, "run.max_steps=6"))
    (back,) = [one for one in found if one.kind == "back"]
    assert back.step == 0
    assert "going on from step 0 with optimizer.lr x 1e-09" in back.text
    after = losses(found[found.index(back) :])
    calm = losses(records(config(data, folder / "calm", "optimizer.lr=0.02", "head.optimizer.lr=1", "run.max_steps=6")))
    assert after == pytest.approx(calm, rel=1e-4)
    if rank == 0:
        (entry,) = entries(folder / "run")
        assert (entry["action"], entry["rate"]) == ("back_off", 1e-9)
        assert isinstance(entry["keys"], dict)
        assert sum(map(len, entry["keys"].values())) >= 14
    on = records(config(data, folder / "run", *chosen, "run.max_steps=8"), resume=True)
    rates = [one.values["learning_rate"] for one in on if one.kind == "step"]
    assert rates == pytest.approx([0.02, 0.02])  # the rate stays low, also for a run that goes on
    with pytest.raises(Diverged, match="lower optimizer"):
        records(config(data, folder / "stop", "optimizer.lr=1e30", "run.max_steps=6"))
    if rank == 0:
        assert [entry["action"] for entry in entries(folder / "stop")] == ["stop"]
    records(config(data, folder / "stop", "optimizer.lr=0.02", "run.max_steps=1"))
    assert not (folder / "stop" / RECORD).exists()  # it was of the run before


def test_a_run_goes_back_with_a_lower_rate(data: Path, tmp_path: Path) -> None:
    run_on_ranks(2, backs_off, data, tmp_path)
