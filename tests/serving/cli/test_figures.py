"""`hypersphere plot`: figures, captions and numbers on disk, and in the active MLflow run."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

from serving.cli import app
from trainer.errors import UserError
from trainer.figures import draw as figures
from trainer.figures.digits import Trained
from trainer.figures.plot_geometry import geometry_figure
from trainer.losses.centres import Center
from trainer.objective import members
from trainer.objective.sharded import CentreModule

RUNNER = CliRunner()


def test_geometry_of_one_loss(tmp_path: Path) -> None:
    done = RUNNER.invoke(
        app,
        ["plot", "geometry", "--loss", "l_softmax", "--dimension", "2", "--steps", "8", "--out", str(tmp_path)],
    )
    assert done.exit_code == 0, done.output
    captions = (tmp_path / "captions.md").read_text()
    names = ["geometry_margin_2d", "angles_margin_2d", "geometry_l_softmax_2d", "psi", "negatives"]
    for name in [*names, "boundaries", "boundary_planes"]:
        assert (tmp_path / f"{name}.pdf").is_file()
        with Image.open(tmp_path / f"{name}.png") as image:
            assert np.asarray(image.convert("L"), dtype=np.float64).std() > 8, name
        assert f"**{name}**: " in captions
    numbers = json.loads((tmp_path / "geometry.json").read_text())
    assert (numbers["steps"], numbers["seed"]) == (8, 0)
    assert [one["name"] for one in numbers["embeddings"]] == ["l_softmax"] * 5
    assert [one["loss"]["margin"] for one in numbers["embeddings"][1:]] == [1, 2, 3, 4]
    assert {row["name"] for row in json.loads((tmp_path / "boundaries.json").read_text())} >= {"arcface", "cosface"}
    assert "| arcface |" in (tmp_path / "boundaries.md").read_text()


def test_the_figures_of_three_families_and_the_centres_of_the_centre_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the curves of the margins, which `test_geometry_of_one_loss` draws."""
    panels: list[Trained] = []
    modules: list[CentreModule] = []

    def draw(of_family: Sequence[Trained]) -> Figure:
        panels.extend(of_family)
        return geometry_figure(of_family)

    def make(spec: Center, classes: int, dimension: int, device: torch.device) -> CentreModule:
        modules.append(CentreModule(spec, classes, dimension, device=device))
        return modules[-1]

    monkeypatch.setattr(figures, "geometry_figure", draw)
    monkeypatch.setattr(figures, "_draw_margins", lambda folder: figures.Written((), ()))
    monkeypatch.setattr(members, "CentreModule", make)
    wanted = [word for name in ("softmax", "triplet", "center") for word in ("--loss", name)]
    done = RUNNER.invoke(app, ["plot", "geometry", *wanted, "--steps", "4", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    drawn = {path.name for path in tmp_path.glob("geometry_*")}
    families = ("softmax", "pair", "centre")
    names = [f"geometry_{family}_{dimension}d" for family in families for dimension in (2, 3)]
    assert drawn == {f"{name}.{kind}" for name in names for kind in ("pdf", "png")}
    of_centre = [panel for panel in panels if panel.learned_CD is not None]
    assert [panel.title for panel in of_centre] == ["softmax + centre"] * 2
    assert len(panels) == 6
    for panel, module in zip(of_centre, modules, strict=True):
        assert panel.learned_CD is not None
        np.testing.assert_array_equal(panel.learned_CD, module.centres.double().numpy())
        assert np.abs(panel.learned_CD).min() > 0
        assert np.abs(panel.learned_CD - panel.centres_MD).max() > 0.1
    captions = (tmp_path / "captions.md").read_text()
    assert "Crosses: the centres that the centre loss itself learns in softmax + centre, at their place" in captions
    assert "Slanted crosses: the directions of the centres that the centre loss itself learns" in captions
    numbers = json.loads((tmp_path / "geometry.json").read_text())["embeddings"]
    learned = {(one["name"], one["dimension"]): one["learned_centres"] for one in numbers}
    np.testing.assert_allclose(learned["center", 2], modules[0].centres.numpy(), atol=1e-4)
    assert learned["softmax", 2] is None


def test_gradients_keep_the_captions_of_other_figures(tmp_path: Path) -> None:
    (tmp_path / "captions.md").write_text("**psi**: Above and below.\n")
    done = RUNNER.invoke(app, ["plot", "gradients", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    captions = (tmp_path / "captions.md").read_text()
    assert "**psi**: Above and below." in captions
    assert "10,000 classes whose other centres are all at right angles" in captions
    records = json.loads((tmp_path / "gradients.json").read_text())
    cosface = next(record for record in records if record["name"] == "cosface")
    assert cosface["psi_slope"] == pytest.approx([1.0] * len(cosface["theta_degrees"]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--loss", "arcfaec"], "loss 'arcfaec' is not known; allowed: softmax"),
        (["--family", "margins"], "family 'margins' is not known; allowed: softmax, margin, pair, centre"),
        (["--dimension", "4"], "4 dimensions cannot be drawn; choose 2 or 3"),
    ],
)
def test_what_cannot_be_drawn_is_named(arguments: list[str], words: str, tmp_path: Path) -> None:
    done = RUNNER.invoke(app, ["plot", "geometry", *arguments, "--out", str(tmp_path)])
    assert isinstance(done.exception, UserError)
    assert words in str(done.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("default")  # MLflow's own imports warn of what they use
def test_figures_are_logged_to_the_active_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.tracking import Tracker, TrackingConfig

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    troubles: list[str] = []
    tracker = Tracker(TrackingConfig(uri=uri), troubles.append)
    tracker.start({}, "", {})
    run_id = tracker.run_id()
    tracker.close()
    assert not troubles
    assert run_id is not None
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    (tmp_path / "figures" / "below").mkdir(parents=True)
    for strange in ("private.txt", "psi.png", "below/gradients.json"):
        (tmp_path / "figures" / strange).write_text("not of this command")
    done = RUNNER.invoke(app, ["plot", "gradients", "--out", str(tmp_path / "figures")])
    assert done.exit_code == 0, done.output
    assert f"logged to the MLflow run {run_id}" in done.output
    stored = [path for path in (tmp_path / "mlartifacts").rglob("*") if path.is_file() and path.name != "config.yaml"]
    assert sorted(path.name for path in stored) == ["captions.md", "gradients.json", "gradients.pdf", "gradients.png"]
    assert {path.parent.name for path in stored} == {"figures"}


@pytest.mark.filterwarnings("default")
def test_an_mlflow_that_cannot_be_used_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'empty.db'}")
    done = RUNNER.invoke(app, ["plot", "gradients", "--out", str(tmp_path / "figures")])
    assert done.exit_code == 0
    assert (tmp_path / "figures" / "gradients.png").is_file()
    assert "going on without" in done.output
    assert "logged to" not in done.output
