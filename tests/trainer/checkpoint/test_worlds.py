"""A run goes on at any number of ranks in mid-epoch: 1 -> 2 -> 3 -> 1 gives the losses of the undisturbed run."""

import json
from pathlib import Path

import pytest
from torch import nn

from tests.ranks import folder_of_shapes, run_on_ranks
from trainer.checkpoint import Shelf
from trainer.config import BackboneConfig, Config, load
from trainer.data.importers import ImportOptions
from trainer.data.importers.run import run_import
from trainer.storage import Folder
from trainer.train import Record, run

COMMON = (
    *("data.batch_size=12", "data.height=16", "data.width=16", "data.shuffle_window=20", "run.log_every=1"),
    *("backbone.name=mlp", "backbone.dimension=8", "schedule.kind=constant", "run.eval_every=0", "run.epochs=9"),
    *("run.checkpoint_every=2", "optimizer.lr=0.01"),
)
CASES = {
    "zero 0": [
        "loss=arcface",
        "loss.scale=8",
        "auxiliary=[{name: center, weight: 0.1}, {name: normface, weight: 0.5}]",
    ],
    "zero 1": [
        *("engine.zero_stage=1", "loss=sub_center_arcface", "loss.scale=8", "head.optimizer.state_dtype=int8"),
        *("auxiliary=[{name: tpe, weight: 0.5, dimension: 3}]", "optimizer.name=adamw", "optimizer.lr=0.001"),
    ],
    "zero 2": [
        *("engine.zero_stage=2", "loss=softmax", "head.optimizer.name=adamw", "head.optimizer.state_dtype=bf16"),
        *("head.optimizer.lr=0.01", "auxiliary=[{name: l2_softmax, weight: 0.5, learnable: true}]"),
    ],
}
# Sums in another order; a number that is stored in few bits may then be rounded to its neighbour.
TOLERANCE = {"zero 0": 1e-4, "zero 1": 2e-3, "zero 2": 2e-3}
COURSE = [(1, 4), (2, 7), (3, 8), (1, 10)]  # ranks, and the step that they train to; an epoch has 3 steps


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    source = folder_of_shapes(folder / "images", identities=7, samples=5)
    run_import("folder", source, folder / "data", ImportOptions(holdout_share=0.0))
    return folder / "data"


def config(data: Path, out: Path, case: str, ranks: int, steps: int) -> Config:
    own = [f"data.path={data}", f"run.out={out}", f"scaling.workers={ranks}", f"run.max_steps={steps}"]
    return load(None, [*COMMON, *CASES[case], *own])


def network(config: BackboneConfig, channels: int, height: int, width: int) -> nn.Module:
    """Without batch norm: nothing but the order of sums depends on the number of ranks."""
    hidden = nn.Linear(channels * height * width, 32)
    return nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(32, config.dimension))


def part(rank: int, data: Path, folder: Path, ranks: int, steps: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.train.build", network)
        train(rank, data, folder, ranks, steps)


def train(rank: int, data: Path, folder: Path, ranks: int, steps: int) -> None:
    for case in CASES:
        out = folder / case.replace(" ", "")
        records: list[Record] = []
        run(config(data, out, case, ranks, steps), resume=steps > COURSE[0][1], report=records.append)
        if rank == 0:
            losses = {record.step: record.values["loss"] for record in records if record.kind == "step"}
            notes = [record.text for record in records if record.kind == "note"]
            (out / f"{steps}.json").write_text(json.dumps({"losses": losses, "notes": notes}))


def test_from_1_to_2_to_3_to_1(data: Path, tmp_path: Path) -> None:
    run_on_ranks(1, part, data, tmp_path / "whole", 1, COURSE[-1][1])
    for ranks, steps in COURSE:
        run_on_ranks(ranks, part, data, tmp_path / "changed", ranks, steps)
    for case in CASES:
        name = case.replace(" ", "")
        whole = json.loads((tmp_path / "whole" / name / f"{COURSE[-1][1]}.json").read_text())["losses"]
        told = [json.loads((tmp_path / "changed" / name / f"{steps}.json").read_text()) for _, steps in COURSE]
        losses: dict[str, float] = {}
        for one in told:
            assert not losses.keys() & one["losses"].keys()
            losses |= one["losses"]
        assert losses == pytest.approx(whole, rel=TOLERANCE[case]), case
        assert len(losses) == COURSE[-1][1]
        for one, (before, _), (after, _) in zip(told[1:], COURSE, COURSE[1:], strict=False):
            assert any(f"scaling.workers is {after} now and was {before}" in note for note in one["notes"])
        assert Shelf.of(Folder(tmp_path / "changed" / name / "checkpoints")).whole[-1] == COURSE[-1][1]
