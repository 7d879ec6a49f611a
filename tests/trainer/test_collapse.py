"""Neural collapse during training: measured on any number of ranks alike, and reported by the loop."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.ranks import folder_of_shapes, run_on_ranks
from trainer.collapse import Collapse
from trainer.config import Config, load
from trainer.data.importers.run import ImportOptions, run_import
from trainer.data.manifest import Manifest
from trainer.distributed import Group
from trainer.errors import UserError
from trainer.objective import Objective
from trainer.train import Record, run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    source = folder_of_shapes(folder / "images", identities=9, samples=4)
    run_import("folder", source, folder / "data", ImportOptions(holdout_share=0.3))
    return folder / "data"


def config(data: Path, *overrides: str) -> Config:
    small = ["backbone.name=convnet", "backbone.dimension=16", "backbone.width=4", "data.height=24", "data.width=24"]
    return load(None, [f"data.path={data}", *small, "data.batch_size=12", "run.collapse=true", *overrides])


def measure(settings: Config, data: Path) -> dict[str, float]:
    manifest, group = Manifest.read(data), Group.current()
    classes = len(manifest.split("train").classes)
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(24 * 24, 16))
    counts = list(manifest.split("train").class_counts)
    objective = Objective(settings, classes, counts, torch.device("cpu"))
    return Collapse(settings, manifest, group)(backbone, objective, torch.device("cpu"))


def cases(data: Path) -> list[dict[str, float]]:
    names = ("arcface", "softmax", "sub_center_arcface", "triplet")
    return [measure(config(data, f"loss={name}", "scaling.workers=1"), data) for name in names]


def on_ranks(rank: int, data: Path, out: Path) -> None:
    measured = cases(data)
    if rank == 0:
        out.write_text(json.dumps(measured))


def test_the_same_on_one_rank_and_on_two(data: Path, tmp_path: Path) -> None:
    run_on_ranks(2, on_ranks, data, tmp_path / "two.json")
    one, two = cases(data), json.loads((tmp_path / "two.json").read_text())
    for alone, shared in zip(one, two, strict=True):
        assert alone.keys() == shared.keys()
        np.testing.assert_allclose(list(alone.values()), list(shared.values()), rtol=1e-4, atol=1e-5)
    for with_centres in one[:3]:
        assert with_centres["neural_collapse/self_duality"] > 0
        assert 0 <= with_centres["neural_collapse/nearest_centre_agreement"] <= 1
    assert "neural_collapse/self_duality" not in one[3]  # triplet loss has no class centres
    assert one[3]["neural_collapse/within_between"] > 0


def test_embeddings_at_their_own_centres_have_collapsed(data: Path) -> None:
    """A backbone that knows each image's class, by its colour, and puts it at that class's centre."""
    settings = config(data, "loss=arcface", "scaling.workers=1")
    manifest = Manifest.read(data)
    classes = len(manifest.split("train").classes)
    objective = Objective(settings, classes, list(manifest.split("train").class_counts), torch.device("cpu"))
    centres = objective.centres(torch.arange(classes))
    assert centres is not None
    collapse = Collapse(settings, manifest, Group())
    labels = [collapse._stream.batch(0, step).labels_B for step in range(collapse._steps)]
    known = iter(labels)

    class Oracle(nn.Module):
        def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
            return 3 * centres.rows_cKD[next(known), 0]

    measured = collapse(Oracle(), objective, torch.device("cpu"))
    assert measured["neural_collapse/within_between"] == pytest.approx(0, abs=1e-9)
    assert measured["neural_collapse/nearest_centre_agreement"] == 1.0


def training(rank: int, data: Path, out: Path) -> None:
    records: list[Record] = []
    settings = config(data, f"run.out={out / 'run'}", "run.epochs=2", "loss.scale=16")
    run(settings, resume=False, report=records.append)
    if rank == 0:
        metrics = [record.values for record in records if record.kind == "metrics"]
        (out / "metrics.json").write_text(json.dumps(metrics))


def test_the_loop_reports_it_at_each_evaluation(data: Path, tmp_path: Path) -> None:
    run_on_ranks(2, training, data, tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert len(metrics) == 2
    for values in metrics:
        assert {"val/rank1", "neural_collapse/within_between", "neural_collapse/self_duality"} <= values.keys()
        assert all(np.isfinite(list(values.values())))


def test_an_identity_with_one_image_is_named(tmp_path: Path) -> None:
    source = folder_of_shapes(tmp_path / "images", identities=6, samples=2)
    (source / "person02" / "1.png").unlink()
    run_import("folder", source, tmp_path / "data", ImportOptions(holdout_share=0.01))
    manifest = Manifest.read(tmp_path / "data")
    if min(manifest.split("train").class_counts) > 1:
        pytest.fail("the identity with one image was held out; choose another seed")
    with pytest.raises(UserError, match=r"'person02' has 1; import with --min-samples 2"):
        Collapse(config(tmp_path / "data", "scaling.workers=1"), manifest, Group())
