"""`hypersphere plot`: figures, captions and numbers on disk, and in the active MLflow run."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from serving.cli import app
from trainer.errors import UserError

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
    from trainer.config import Config, TrackingConfig
    from trainer.tracking import Tracker

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    troubles: list[str] = []
    tracker = Tracker(TrackingConfig(uri=uri), troubles.append)
    tracker.start(Config(), {})
    run_id = tracker.run_id()
    tracker.close()
    assert not troubles
    assert run_id is not None
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    done = RUNNER.invoke(app, ["plot", "gradients", "--out", str(tmp_path / "figures")])
    assert done.exit_code == 0, done.output
    assert f"logged to the MLflow run {run_id}" in done.output
    stored = {path.name for path in (tmp_path / "mlartifacts").rglob("figures/*")}
    assert stored == {"captions.md", "gradients.json", "gradients.pdf", "gradients.png"}


@pytest.mark.filterwarnings("default")
def test_an_mlflow_that_cannot_be_used_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'empty.db'}")
    done = RUNNER.invoke(app, ["plot", "gradients", "--out", str(tmp_path / "figures")])
    assert done.exit_code == 0
    assert (tmp_path / "figures" / "gradients.png").is_file()
    assert "cannot be used" in done.output
    assert "logged to" not in done.output
