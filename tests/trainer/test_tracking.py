"""MLflow, for real: a SQLite store, and a server that is not there."""

from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient

from trainer.config import load
from trainer.tracking import Tracker, TrackingConfig, absolute_uri

# MLflow's own imports warn of what they use.
pytestmark = pytest.mark.filterwarnings("default")


def test_a_run_with_its_config_metrics_artifacts_and_model(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = load(None, [f"tracking.uri={uri}", "run.epochs=3"])
    troubles: list[str] = []
    tracker = Tracker(config.tracking, troubles.append)
    tracker.start(config.model_dump(mode="json"), config.to_yaml(), {"data": "x"})
    run_id = tracker.run_id()
    assert run_id, troubles
    for step in (1, 2):
        tracker.metrics({"loss": 1.0 / step}, step, 1000 + step)
    (tmp_path / "embedder").mkdir()
    (tmp_path / "embedder" / "model.onnx").write_bytes(b"m")
    tracker.register(tmp_path / "embedder", "abc")
    tracker.close("FINISHED")
    assert troubles == []
    client = MlflowClient(uri, uri)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["run.epochs"] == "3"
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "loss")] == [(1, 1.0), (2, 0.5)]
    assert {item.path for item in client.list_artifacts(run_id)} >= {"config.yaml", "embedder"}
    champion = client.get_model_version_by_alias("hypersphere-embedder", "champion")
    assert (champion.run_id, champion.tags["model_id"]) == (run_id, "abc")
    with closing(Tracker(config.tracking, troubles.append, run_id)) as again:
        again.register(tmp_path / "embedder", "def")
    assert client.get_run(run_id).info.status == "FINISHED"
    assert client.get_model_version_by_alias("hypersphere-embedder", "champion").tags["model_id"] == "def"


def test_a_server_that_is_not_there_is_reported_once(tmp_path: Path) -> None:
    troubles: list[str] = []
    config = load(None, ["tracking.uri=http://127.0.0.1:9"])
    tracker = Tracker(config.tracking, troubles.append)
    tracker.start({}, "", {})
    tracker.metrics({"loss": 1.0}, 1, 1)
    tracker.artifact(tmp_path)
    assert tracker.run_id() is None
    tracker.close()
    assert len(troubles) == 1
    assert "http://127.0.0.1:9" in troubles[0]
    assert "going on without tracking" in troubles[0]


def test_switched_off_it_does_nothing() -> None:
    troubles: list[str] = []
    tracker = Tracker(TrackingConfig(enabled=False), troubles.append)
    tracker.metrics({"loss": 1.0}, 1, 1)
    tracker.close()
    assert troubles == []
    assert tracker.run_id() is None


def test_relative_stores_are_made_absolute(tmp_path: Path) -> None:
    assert absolute_uri("sqlite:///mlflow.db", tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    assert absolute_uri("sqlite:////x/mlflow.db", tmp_path) == "sqlite:////x/mlflow.db"
    assert absolute_uri("http://host:5000", tmp_path) == "http://host:5000"
