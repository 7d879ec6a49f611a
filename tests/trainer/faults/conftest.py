"""A data set, and the losses of a run that nothing disturbs."""

import json
from pathlib import Path

import pytest

from tests.ranks import folder_of_shapes, run_on_ranks
from tests.trainer.faults.command import SETTINGS, STEPS
from trainer.config import load
from trainer.data.importers import ImportOptions
from trainer.data.importers.run import run_import
from trainer.train import Record, run


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    run_import("folder", folder_of_shapes(folder / "images", 8), folder / "data", ImportOptions(holdout_share=0.3))
    return folder / "data"


def undisturbed_ranks(rank: int, data: Path, folder: Path) -> None:
    losses: dict[int, float] = {}

    def report(record: Record) -> None:
        if record.kind == "step":
            losses[record.step] = record.values["loss"]

    places = (f"data.path={data}", f"run.out={folder}/run", f"run.max_steps={STEPS}", "schedule.kind=constant")
    run(load(None, [*SETTINGS, *places]), resume=False, report=report)
    if rank == 0:
        (folder / "losses.json").write_text(json.dumps(losses))


@pytest.fixture(scope="session")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """By step, of two ranks without Ray, with a rate that does not depend on the number of steps."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_on_ranks(2, undisturbed_ranks, data, folder)
    return {int(step): loss for step, loss in json.loads((folder / "losses.json").read_text()).items()}
