"""Neural collapse during training: measured on any number of ranks alike, and reported by the loop."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.ranks import folder_of_shapes, run_on_ranks
from tests.trainer.evaluation.made_up import made_up
from trainer.config import Config, load
from trainer.data.augment import to_float
from trainer.data.importers import ImportOptions
from trainer.data.importers.run import run_import
from trainer.data.manifest import Manifest
from trainer.data.stream import Batch, Stream
from trainer.distributed import Group
from trainer.errors import UserError
from trainer.evaluation.geometry import neural_collapse
from trainer.evaluation.protocols import quick
from trainer.monitor import Collapse, _together, embed, measured_at_most
from trainer.objective import Objective
from trainer.train import Record, run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """7 identities to train on, which neither 2 nor 3 ranks share evenly."""
    folder = tmp_path_factory.mktemp("shapes")
    source = folder_of_shapes(folder / "images", identities=10, samples=4)
    run_import("folder", source, folder / "data", ImportOptions(holdout_share=0.3))
    assert Manifest.read(folder / "data").splits["train"].identities == 7
    return folder / "data"


def config(data: Path, *overrides: str) -> Config:
    small = ["backbone.name=convnet", "backbone.dimension=16", "backbone.width=4", "data.height=24", "data.width=24"]
    return load(None, [f"data.path={data}", *small, "data.batch_size=12", "run.collapse=true", *overrides])


def objective_of(settings: Config, data: Path) -> Objective:
    split = Manifest.read(data).split("train")
    return Objective(settings, split.identities, split.classes.counts().tolist(), torch.device("cpu"))


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(24 * 24, 16))


def measure(settings: Config, data: Path) -> dict[str, float]:
    measured = Collapse(settings, Manifest.read(data), Group.current())
    return measured(linear(), objective_of(settings, data), torch.device("cpu"))


def samples(settings: Config, data: Path) -> Batch:
    """The whole training split in one batch."""
    manifest = Manifest.read(data)
    whole = settings.data.model_copy(update={"batch_size": manifest.split("train").samples})
    return Stream(manifest, "train", whole, shuffle=False).batch(0, 0)


LOSSES = ("arcface", "softmax", "sub_center_arcface", "triplet", "tse")


def cases(data: Path) -> list[dict[str, float]]:
    """Some losses on all 7 identities, then one on 5 of them, with 3 identities a batch or fewer."""
    chosen = [config(data, f"loss={name}", "scaling.workers=1") for name in LOSSES]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.monitor._CLASSES_A_STEP", 3)
        measured = [measure(settings, data) for settings in chosen]
        patch.setattr("trainer.monitor.MOST_CLASSES", 5)
        return [*measured, measure(chosen[0], data)]


def on_ranks(rank: int, data: Path, out: Path) -> None:
    measured = cases(data)
    if rank == 0:
        out.write_text(json.dumps(measured))


def test_the_same_on_one_two_and_three_ranks(data: Path, tmp_path: Path) -> None:
    one = cases(data)
    for size in (2, 3):
        run_on_ranks(size, on_ranks, data, tmp_path / f"{size}.json")
        for alone, shared in zip(one, json.loads((tmp_path / f"{size}.json").read_text()), strict=True):
            assert alone.keys() == shared.keys()
            np.testing.assert_allclose(list(alone.values()), list(shared.values()), rtol=1e-6, atol=1e-7)
    for with_centres in one[:3]:
        assert with_centres["neural_collapse/self_duality"] > 0
        assert 0 <= with_centres["neural_collapse/nearest_centre_agreement"] <= 1
    for without in one[3:5]:
        assert "neural_collapse/self_duality" not in without  # triplet losses have no class centres
        assert without["neural_collapse/within_between"] > 0


def test_every_image_counts_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What all 28 images give at once, although they come in batches of 3 identities, which do not divide 7."""
    monkeypatch.setattr("trainer.monitor._CLASSES_A_STEP", 3)
    settings = config(data, "loss=contrastive", "loss.unit=false", "scaling.workers=1")
    batch = samples(settings, data)
    with torch.no_grad():
        x_ND = linear()(to_float(batch.images_BCHW))
    measures = neural_collapse(x_ND.double().numpy(), batch.labels_B.numpy())
    expected = {f"neural_collapse/{name}": value for name, value in measures.items()}
    assert measure(settings, data) == pytest.approx(expected, rel=1e-5)


def test_a_bounded_number_of_identities_and_images_chosen_by_the_seed(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.monitor.MOST_CLASSES", 5)
    monkeypatch.setattr("trainer.monitor.SAMPLES_A_CLASS", 3)
    monkeypatch.setattr("trainer.monitor._CLASSES_A_STEP", 2)
    chosen = []
    for seed in (0, 0, 1, 2):
        settings = config(data, "scaling.workers=1", f"run.seed={seed}")
        collapse = Collapse(settings, Manifest.read(data), Group())
        images_nD, labels_n = embed(nn.Flatten(), collapse._batches(), Group(), torch.device("cpu"), bf16=False)
        assert np.unique(labels_n, return_counts=True)[1].tolist() == [3] * 5
        assert len(np.unique(images_nD, axis=0)) == 15
        chosen.append(sorted(set(labels_n.tolist())))
    assert chosen[0] == chosen[1]
    assert len(set(map(tuple, chosen))) > 1


class Known(nn.Module):
    """A backbone that has seen each image and knows its embedding."""

    def __init__(self, batch: Batch, x_ND: torch.Tensor) -> None:
        super().__init__()
        pixels = to_float(batch.images_BCHW)
        self.known = {image.numpy().tobytes(): x_D for image, x_D in zip(pixels, x_ND, strict=True)}

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.known[image.numpy().tobytes()] for image in images_BCHW])


def test_embeddings_at_their_own_centres_have_collapsed(data: Path) -> None:
    settings = config(data, "loss=arcface", "scaling.workers=1")
    objective, batch = objective_of(settings, data), samples(settings, data)
    centres = objective.geometry().centres
    assert centres is not None
    rows_cD = torch.from_numpy(centres(torch.arange(7)).rows_cKD[:, 0])
    backbone = Known(batch, 3 * rows_cD[batch.labels_B])
    measured = Collapse(settings, Manifest.read(data), Group())(backbone, objective, torch.device("cpu"))
    assert measured["neural_collapse/within_between"] == pytest.approx(0, abs=1e-9)
    assert measured["neural_collapse/nearest_centre_agreement"] == 1.0


def on_axes(data: Path, *overrides: str) -> dict[str, float]:
    """Measured where each identity has a direction of its own, at right angles to the others, and lengths are free."""
    settings = config(data, "scaling.workers=1", *overrides)
    objective, batch = objective_of(settings, data), samples(settings, data)
    generator = torch.Generator().manual_seed(0)
    lengths_N1 = 0.1 + 5 * torch.rand(len(batch.labels_B), 1, generator=generator)
    backbone = Known(batch, lengths_N1 * torch.eye(16)[batch.labels_B])
    assert not backbone.eval().training
    measured = Collapse(settings, Manifest.read(data), Group())(backbone, objective, torch.device("cpu"))
    assert not backbone.training
    return measured


@pytest.mark.parametrize(
    "loss",
    [
        *[["loss=triplet"], ["loss=contrastive"], ["loss=marginal"], ["loss=coco"], ["loss=range"]],
        *[["loss=center", "loss.unit=true"], ["loss=tse", "loss.dimension=16", "loss.init=orthogonal"]],
    ],
    ids=lambda loss: loss[0],
)
def test_losses_on_unit_vectors_are_measured_on_unit_vectors(data: Path, loss: list[str]) -> None:
    measured = on_axes(data, *loss)
    assert measured["neural_collapse/within_between"] == pytest.approx(0, abs=1e-9)
    assert measured["neural_collapse/equinorm_features"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["contrastive", "range", "center"])
def test_losses_on_embeddings_with_their_lengths_are_measured_on_those(data: Path, name: str) -> None:
    measured = on_axes(data, f"loss={name}", "loss.unit=false")
    assert measured["neural_collapse/within_between"] > 0.1
    assert measured["neural_collapse/equinorm_features"] > 0.1


def test_a_learned_projection_is_measured_behind_it(data: Path) -> None:
    """T keeps 3 of 16 dimensions, so that 7 identities at right angles no longer are; beside a head, whose centres are
    in the backbone's space, that is what is measured."""
    orthogonal = ["loss=tpe", "loss.init=orthogonal"]
    narrow, wide = (on_axes(data, *orthogonal, f"loss.dimension={n}") for n in (3, 16))
    assert wide["neural_collapse/equiangular_features"] == pytest.approx(0, abs=1e-6)
    assert narrow["neural_collapse/equiangular_features"] > 0.1
    beside = on_axes(data, "loss=arcface", "auxiliary=[{name: tpe, dimension: 3, frozen: true}]")
    assert beside["neural_collapse/equiangular_features"] == pytest.approx(0, abs=1e-6)
    assert "neural_collapse/self_duality" in beside


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
    if manifest.split("train").classes.counts().min() > 1:
        pytest.fail("the identity with one image was held out; choose another seed")
    with pytest.raises(UserError, match=r"'person02' has 1; import with --min-samples 2"):
        Collapse(config(tmp_path / "data", "scaling.workers=1"), manifest, Group())


def searched(rank: int, out: Path) -> None:
    """Every rank searches for its part of the probes, and all of them know all that was found."""
    vectors, labels = made_up(111, 6, 0.9)
    group = Group.current()
    together = partial(_together, group, torch.device("cpu"))
    found = quick(vectors, labels, slice(group.rank, None, group.size), together)
    (out / f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_share_the_probes_find_what_one_finds(size: int, tmp_path: Path) -> None:
    run_on_ranks(size, searched, tmp_path)
    alone = quick(*made_up(111, 6, 0.9))
    assert alone[1] is not None
    for rank in range(size):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(alone, abs=1e-12)


def test_ranks_without_a_probe_take_part(tmp_path: Path) -> None:
    """Three ranks, two strangers' samples and few others."""
    run_on_ranks(3, of_few, tmp_path)
    assert len({(tmp_path / f"{rank}.json").read_text() for rank in range(3)}) == 1


def of_few(rank: int, out: Path) -> None:
    vectors, labels = made_up(2, 2, 0.1)
    group = Group.current()
    found = quick(vectors, labels, slice(rank, None, 3), partial(_together, group, torch.device("cpu")))
    (out / f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("every", "epochs", "trained", "most"),
    [(4, 16, 15_400, 2464), (1, 16, 20_000, 800), (4, 1, 1_000_000, 40_000), (1, 9, 50, 640)],
)
def test_what_is_measured_grows_with_what_is_trained(
    data: Path, every: int, epochs: int, trained: int, most: int
) -> None:
    settings = config(data, f"run.eval_every={every}", f"run.epochs={epochs}")
    assert measured_at_most(settings, trained) == most


def test_collapse_is_measured_on_what_the_training_affords(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.monitor.LEAST_SAMPLES", 12)
    measured = Collapse(config(data, "scaling.workers=1", "run.epochs=1"), Manifest.read(data), Group())
    _, labels_n = embed(nn.Flatten(), measured._batches(), Group(), torch.device("cpu"), bf16=False)
    assert np.unique(labels_n, return_counts=True)[1].tolist() == [4, 4, 4]  # of 7 identities
