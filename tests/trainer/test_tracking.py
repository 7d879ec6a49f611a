"""MLflow, for real: a SQLite store, a server that goes and comes back, and one that is not there."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from trainer.config import load
from trainer.locks import within
from trainer.outbox import Outbox, queue_inode
from trainer.tracking import Tracker, TrackingConfig, absolute_uri, outlive, public_uri

# MLflow's own imports warn of what they use.
pytestmark = pytest.mark.filterwarnings("default")


class Server:
    """An MLflow server with a store of its own, at one address each time that it starts."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._folder, self.uri = folder, f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        store = ["--backend-store-uri", f"sqlite:///{self._folder}/server.db", "--artifacts-destination", "artifacts"]
        address = ["--host", "127.0.0.1", "--port", str(self._port), "--workers", "1"]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *store, *address],
                cwd=self._folder, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        assert within(120, self._is_up), (self._folder / "server.log").read_text()

    def stop(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.stop()


def losses(client: MlflowClient, run_id: str) -> list[int]:
    return sorted(m.step for m in client.get_metric_history(run_id, "loss"))


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


def test_what_a_server_missed_it_gets_when_it_is_back(server: Server, tmp_path: Path) -> None:
    server.start()
    troubles: list[str] = []
    noted: list[str] = []
    config = TrackingConfig(uri=server.uri)
    tracker = Tracker(config, troubles.append, folder=tmp_path / "box", on_run=noted.append, patience_s=120)
    tracker.start({"lr": 0.1}, "lr: 0.1", {})
    tracker.wake()
    assert within(120, lambda: bool(noted))  # at the start
    for step in range(50):
        tracker.metrics({"loss": 1.0}, step, 1000 + step)
    assert within(120, lambda: (tmp_path / "box" / "queue.jsonl").stat().st_size == 0)
    server.stop()
    for step in range(50, 100):
        tracker.metrics({"loss": 1.0}, step, 1000 + step)
    assert within(120, lambda: bool(troubles))
    server.start()
    tracker.close("FINISHED")
    assert [text.partition("'; ")[0].partition(": ")[0] for text in troubles] == [
        f"MLflow at '{server.uri}' cannot be used",
        f"MLflow at '{server.uri}' answers again; it is sent what it missed",
    ]
    client = MlflowClient(server.uri)
    assert losses(client, noted[0]) == list(range(100))
    assert client.get_run(noted[0]).info.status == "FINISHED"


def test_what_a_server_missed_it_gets_after_the_process_has_ended(server: Server, tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from trainer.tracking import Tracker, TrackingConfig
tracker = Tracker(TrackingConfig(uri=sys.argv[1]), print, folder=Path(sys.argv[2]), patience_s=1)
tracker.start({"lr": 0.1}, "lr: 0.1", {})
for step in range(3):
    tracker.metrics({"loss": 1.0}, step, 1000 + step)
tracker.close("FAILED")
"""
    done = subprocess.run(
        [sys.executable, "-c", program, server.uri, str(tmp_path / "box")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f"7 records wait in '{tmp_path / 'box'}'; they are sent if it answers within 10 minutes" in done.stdout
    server.start()
    client = MlflowClient(server.uri)

    def arrived() -> bool:
        experiment = client.get_experiment_by_name("hypersphere")
        runs = client.search_runs([experiment.experiment_id]) if experiment else []
        return [(run.info.status, losses(client, run.info.run_id)) for run in runs] == [("FAILED", [0, 1, 2])]

    assert within(120, arrived)


def test_a_run_goes_on_with_other_keys_as_tags(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    troubles: list[str] = []
    noted: list[str] = []
    for number, rate in enumerate((0.1, 0.01, 0.01, 0.001)):
        run_id = noted[-1] if number else None
        folder = tmp_path / "box"
        tracker = Tracker(TrackingConfig(uri=uri), troubles.append, run_id, folder=folder, on_run=noted.append)
        tracker.start({"optimizer": {"lr": rate, "name": "sgd"}} | ({"fresh": 1} if number else {}), "", {})
        tracker.metrics({"loss": 1.0}, number, 1000 + number)
        tracker.close("FINISHED")
    assert troubles == []
    assert len(set(noted)) == 1
    client = MlflowClient(uri)
    run = client.get_run(noted[0])
    assert run.data.params == {"optimizer.lr": "0.1", "optimizer.name": "sgd", "fresh": "1"}
    changed = {key: value for key, value in run.data.tags.items() if key.startswith("changed.")}
    assert changed == {"changed.optimizer.lr": "0.1 -> 0.01 -> 0.001"}
    assert losses(client, noted[0]) == [0, 1, 2, 3]


def test_steps_that_are_done_again_are_recorded_once(tmp_path: Path) -> None:
    """Unless they are news: with another config, or after going back on purpose."""
    config = TrackingConfig(uri=f"sqlite:///{tmp_path / 'mlflow.db'}")

    times: list[int] = []

    def train(run_id: str | None, tree: dict[str, Any], *steps: int) -> str:
        tracker = Tracker(config, pytest.fail, run_id, folder=tmp_path / "box", patience_s=200)
        tracker.start(tree, "", {})
        for step in steps:
            if step < 0:
                tracker.go_back(-step)
            else:
                times.append(len(times))
                tracker.metrics({"loss": step / 10, f"even/{step % 2}": 1.0}, step, times[-1])
        found = tracker.run_id()
        tracker.close("KILLED")
        assert found is not None
        return found

    client = MlflowClient(config.uri, config.uri)
    run_id = train(None, {"lr": 0.1}, 1, 2, 3, 4, 3, 4, 5)
    assert losses(client, run_id) == [1, 2, 3, 4, 5]
    assert train(run_id, {"lr": 0.1}, 4, 5, 6, 7) == run_id
    assert losses(client, run_id) == [1, 2, 3, 4, 5, 6, 7]
    assert [m.step for m in client.get_metric_history(run_id, "even/0")] == [2, 4, 6]
    train(run_id, {"lr": 0.1}, -4, 5, 6, 7, 8)
    assert losses(client, run_id) == [1, 2, 3, 4, 5, 5, 6, 6, 7, 7, 8]
    train(run_id, {"lr": 0.2}, 8, 9)
    assert losses(client, run_id) == [1, 2, 3, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9]


def test_steps_that_are_done_again_are_recorded_once_by_who_takes_the_queue_over(tmp_path: Path) -> None:
    """A worker died, and then the process that sent the steps: those that were done again still wait."""
    config = TrackingConfig(uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    tracker = Tracker(config, pytest.fail, folder=tmp_path / "box", patience_s=200)
    tracker.start({}, "", {})
    for step in (1, 2, 3):
        tracker.metrics({"loss": step / 10}, step, step)
    run_id = tracker.run_id()
    tracker.close()
    waiting = Outbox(tmp_path / "box", pytest.fail)
    for step in (2, 3, 4):
        waiting.put({"kind": "metrics", "values": {"loss": step / 10}, "step": step, "time_ms": 10 + step})
    waiting.close()
    task = {"config": config.model_dump(mode="json"), "folder": str(tmp_path / "box")}
    outlive(json.dumps(task | {"inode": queue_inode(tmp_path / "box")}))
    assert run_id is not None
    client = MlflowClient(config.uri)
    assert losses(client, run_id) == [1, 2, 3, 4]
    assert client.get_run(run_id).info.status == "KILLED"


def test_what_mlflow_refuses_holds_nothing_up(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    troubles: list[str] = []
    tracker = Tracker(TrackingConfig(uri=uri), troubles.append, folder=tmp_path / "box")
    tracker.start({}, "", {})
    tracker.metrics({"loss": 1.0}, 1, 1)
    tracker.metrics({"no such: name?": 1.0}, 2, 2)
    tracker.artifact(tmp_path / "nowhere.png")
    tracker.metrics({"loss": 1.0}, 3, 3)
    run_id = tracker.run_id()
    tracker.close("FINISHED")
    assert [text.partition(": ")[0] for text in troubles] == [
        f"MLflow at '{uri}' does not take the run's metrics", f"MLflow at '{uri}' does not take the run's artifact"
    ]  # fmt: skip
    assert run_id
    client = MlflowClient(uri)
    assert losses(client, run_id) == [1, 3]
    assert client.get_run(run_id).info.status == "FINISHED"


def test_a_run_that_was_left_running_is_ended_by_the_next_one(tmp_path: Path) -> None:
    """As after the machine's death, which takes the guard with it."""
    uri, folder = f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "box"
    troubles: list[str] = []
    for _ in range(2):
        tracker = Tracker(TrackingConfig(uri=uri), troubles.append, folder=folder)
        tracker.start({}, "", {})
        tracker.run_id()
        tracker.close()  # without a word on how it ended
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("hypersphere")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    assert [run.info.status for run in runs] == ["KILLED", "RUNNING"]
    assert troubles == []


def test_a_run_whose_end_was_taken_but_not_noted_keeps_it(tmp_path: Path) -> None:
    uri, folder = f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "box"
    ids: list[str] = []
    for _ in range(2):
        tracker = Tracker(TrackingConfig(uri=uri), pytest.fail, folder=folder, on_run=ids.append)
        tracker.start({}, "", {})
        tracker.close("FINISHED")
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(state | {"ended": False}))
    assert [MlflowClient(uri).get_run(run_id).info.status for run_id in ids] == ["FINISHED", "FINISHED"]


def test_records_of_a_run_that_mlflow_refuses_never_reach_another(tmp_path: Path) -> None:
    uri, folder = f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "box"
    troubles: list[str] = []
    ids: list[str] = []
    client = MlflowClient(uri)
    for experiment in ("good", "deleted", "good"):
        if experiment == "deleted":
            client.delete_experiment(client.create_experiment(experiment))
        config = TrackingConfig(uri=uri, experiment=experiment)
        tracker = Tracker(config, troubles.append, folder=folder, on_run=ids.append)
        tracker.start({}, "", {})
        tracker.metrics({"loss": 1.0}, len(ids), 1)
        tracker.close("FINISHED")
    assert len(troubles) == 1
    assert troubles[0].startswith(f"MLflow at '{uri}' cannot be used: ")
    assert troubles[0].endswith("; going on without tracking")
    assert [losses(client, run_id) for run_id in ids] == [[0], [1]]


def test_a_torn_line_of_a_queue_is_left_out(tmp_path: Path) -> None:
    uri, folder = f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "box"
    folder.mkdir()
    made = {"kind": "run", "key": "k", "run_id": None, "time_ms": 1, "name": None, "tags": {}}
    whole = {"kind": "metrics", "values": {"loss": 1.0}, "step": 1, "time_ms": 1}
    (folder / "queue.jsonl").write_text(f'{json.dumps(made)}\n{{"kind": "met\n{json.dumps(whole)}\n{{"kind"')
    noted: list[str] = []
    with closing(Tracker(TrackingConfig(uri=uri), pytest.fail, "", folder=folder, on_run=noted.append)):
        pass
    assert losses(MlflowClient(uri), noted[0]) == [1]
    assert (folder / "queue.jsonl").read_bytes() == b""


def test_a_server_that_is_not_there_is_reported_once(tmp_path: Path) -> None:
    troubles: list[str] = []
    config = load(None, ["tracking.uri=http://annie:s3cret@127.0.0.1:9"])
    tracker = Tracker(config.tracking, troubles.append, patience_s=1)
    tracker.start({}, "", {})
    tracker.metrics({"loss": 1.0}, 1, 1)
    tracker.artifact(tmp_path)
    assert tracker.run_id() is None
    tracker.close()
    assert len(troubles) == 1
    assert troubles[0].startswith("MLflow at 'http://127.0.0.1:9' cannot be used: ")
    assert troubles[0].endswith("; what it missed is lost")
    assert "s3cret" not in troubles[0]


def test_a_folder_that_cannot_be_written_is_reported_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    troubles: list[str] = []
    tracker = Tracker(TrackingConfig(uri=uri), troubles.append, folder=tmp_path / "file" / "box")
    tracker.start({}, "", {})
    tracker.metrics({"loss": 1.0}, 1, 1)
    run_id = tracker.run_id()
    tracker.close("FINISHED")
    assert len(troubles) == 1
    assert "cannot be written (Not a directory): records for MLflow are kept in memory only" in troubles[0]
    assert run_id
    assert losses(MlflowClient(uri), run_id) == [1]


def test_switched_off_it_does_nothing(tmp_path: Path) -> None:
    troubles: list[str] = []
    tracker = Tracker(TrackingConfig(enabled=False), troubles.append, folder=tmp_path / "box")
    tracker.start({}, "", {})
    tracker.metrics({"loss": 1.0}, 1, 1)
    tracker.close("FINISHED")
    assert troubles == []
    assert tracker.run_id() is None
    assert not (tmp_path / "box").exists()


def test_relative_stores_are_made_absolute(tmp_path: Path) -> None:
    assert absolute_uri("sqlite:///mlflow.db", tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    assert absolute_uri("sqlite:////x/mlflow.db", tmp_path) == "sqlite:////x/mlflow.db"
    assert absolute_uri("http://host:5000", tmp_path) == "http://host:5000"
    assert public_uri("http://annie:s3cret@host:5000/x") == "http://host:5000/x"
