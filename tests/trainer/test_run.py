"""A run's folder: what is noted in it, however the run ends, and what is refused before it starts."""

import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.ranks import folder_of_shapes
from tests.web import Web, serving
from trainer import launch
from trainer.config import Config, load
from trainer.data.importers import ImportOptions
from trainer.data.importers.run import run_import
from trainer.errors import UserError
from trainer.locks import within
from trainer.run import RunNote, resolved, start
from trainer.storage import Folder
from trainer.tracking import Tracker
from trainer.train import Record

Workers = Callable[[Config, bool, Callable[[Record], None], threading.Event], None]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    run_import("folder", folder_of_shapes(folder / "images"), folder / "data", ImportOptions(holdout_share=0.4))
    return folder / "data"


def config(data: Path, out: Path, *overrides: str) -> Config:
    common = (f"data.path={data}", f"run.out={out}", "backbone.name=convnet", "tracking.enabled=false")
    return load(None, [*common, *overrides])


def workers(*steps: int, ends_well: bool = True) -> Workers:
    """What stands in for Ray's workers: an evaluation at each of the steps."""

    def work(config: Config, resume: bool, on_record: Callable[[Record], None], stop: threading.Event) -> None:
        for step in steps:
            values = {"val/rank1": step / 100, "neural_collapse/self_duality": 1 / step}
            values["neural_collapse/within_between"] = math.inf
            on_record(Record("step", step, 99, {"loss": 1.0}))
            on_record(Record("metrics", step, 99, values))
        if not ends_well:
            raise launch.TrainingFailed("a worker died")

    return work


def test_evaluations_are_noted_and_drawn_and_a_resumed_run_adds_to_them(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Record] = []
    monkeypatch.setattr(launch, "launch", workers(10, 20, 30, ends_well=False))
    with pytest.raises(launch.TrainingFailed):
        start(config(data, tmp_path / "run"), False, shown.append, pytest.fail)
    assert [(one.step, one.values["val/rank1"]) for one in RunNote.read(tmp_path / "run").evaluations] == [
        (10, 0.1), (20, 0.2), (30, 0.3)
    ]  # fmt: skip
    with Image.open(tmp_path / "run" / "neural_collapse.png") as image:
        first = image.tobytes()
    monkeypatch.setattr(launch, "launch", workers(30, 40))
    assert start(config(data, tmp_path / "run"), True, shown.append, pytest.fail) == Folder(tmp_path / "run")
    note = RunNote.read(tmp_path / "run")
    assert [one.step for one in note.evaluations] == [10, 20, 30, 40]
    assert note.course()[-1] == (40, {"self_duality": 1 / 40})
    with Image.open(tmp_path / "run" / "neural_collapse.png") as image:
        assert image.tobytes() != first
    assert len(shown) == 10
    assert load(tmp_path / "run" / "config.yaml").run.out == tmp_path / "run"


def test_paths_mean_the_same_from_everywhere(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "launch", workers())
    start(config(data, Path("here"), "tracking.uri=sqlite:///mlflow.db"), False, lambda record: None, pytest.fail)
    written = load(tmp_path / "here" / "config.yaml")
    assert written.run.out == tmp_path / "here"
    assert written.tracking.uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert RunNote.read(tmp_path / "here").tracking_uri == written.tracking.uri
    assert not (tmp_path / "here" / "neural_collapse.png").exists()


def test_two_runs_in_one_folder(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def work(given: Config, resume: bool, on_record: Callable[[Record], None], stop: threading.Event) -> None:
        for again in (False, True):
            with pytest.raises(UserError) as caught:
                start(config(data, tmp_path / "run", "run.seed=9"), again, lambda _: None, pytest.fail)
            said.append(str(caught.value))
        assert load(tmp_path / "run" / "config.yaml").run.seed == 0

    monkeypatch.setattr(launch, "launch", work)
    start(config(data, tmp_path / "run"), False, lambda _: None, pytest.fail)
    other = f"another run is writing into '{tmp_path / 'run'}' now; wait for its end, or choose another run.out"
    assert said == [other, other]
    monkeypatch.setattr(launch, "launch", workers())
    start(config(data, tmp_path / "run"), False, lambda _: None, pytest.fail)  # free again


PROGRAM = """
import signal, sys, time
from pathlib import Path
from trainer import launch, run
from trainer.config import load
from trainer.train import Record

def work(config, resume, on_record, stop):
    on_record(Record("start", 0, 99))
    on_record(Record("step", 1, 99, {"loss": 1.0}))
    while not run.RunNote.read(config.run.out).mlflow_run_id:
        time.sleep(0.1)
    print("training", flush=True)
    stop.wait(600)
    print("stopping", flush=True)
    if config.run.seed == 2:  # the workers do not come to an end
        time.sleep(600)
    raise launch.Interrupted("stopped at step 1")

signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background of a script ignores it
launch.launch = work
try:
    run.start(load(Path(sys.argv[1])), False, lambda record: None, print)
except launch.Interrupted:
    sys.exit(75)
"""


@pytest.mark.filterwarnings("default")  # MLflow's own imports warn of what they use
@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ([signal.SIGINT], 1),
        ([signal.SIGTERM], 75),
        ([signal.SIGTERM, signal.SIGTERM], 143),
        ([signal.SIGKILL], -signal.SIGKILL),
    ],
)
def test_what_a_signal_ends_is_killed_in_mlflow_and_free(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbers: list[int], code: int
) -> None:
    """The run's identity is noted while it trains; the lock on its folder dies with the process."""
    from mlflow import MlflowClient

    uri, out = f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "run"
    overrides = ("tracking.enabled=true", f"tracking.uri={uri}", f"run.seed={len(numbers)}")
    (tmp_path / "config.yaml").write_text(config(data, out, *overrides).to_yaml())
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "config.yaml")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "training\n"
        with pytest.raises(UserError, match="another run is writing into"):
            start(config(data, out), False, lambda _: None, pytest.fail)
        run_id = RunNote.read(out).mlflow_run_id
        for sent, number in enumerate(numbers):
            assert sent == 0 or process.stdout.readline() == "stopping\n"
            process.send_signal(number)
        assert process.wait(60) == code
    client = MlflowClient(uri, uri)
    assert within(120, lambda: client.get_run(run_id).info.status == "KILLED")
    assert [m.step for m in client.get_metric_history(run_id, "loss")] == [1]
    monkeypatch.setattr(launch, "launch", workers(2))
    start(config(data, out, *overrides), True, lambda _: None, pytest.fail)
    assert client.get_run(run_id).info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(run_id, "loss")] == [1, 2]


def test_memory_is_no_place_for_a_run(data: Path) -> None:
    with pytest.raises(UserError, match=r"run\.out 'memory://run' is in one process' memory"):
        start(config(data, Path("memory://run")), False, lambda _: None, pytest.fail)


def test_a_folder_without_a_note_and_one_with_a_spoilt_one(tmp_path: Path) -> None:
    assert RunNote.read(tmp_path) == RunNote()
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match="is not a run's note"):
        RunNote.read(tmp_path)


def test_what_mlflow_is_told_carries_no_password(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(Tracker, "start", lambda _, *arguments: told.extend(arguments))
    monkeypatch.setattr(launch, "launch", workers(10))
    with serving(Web(data, password="annie:s3cret", token="t0ken")) as web:
        address = f"http://annie:s3cret@127.0.0.1:{web.port}/?key=t0ken"
        mix, cache = f"data.mix=[{{path: '{address}'}}]", f"data.cache_dir={tmp_path}/cache"
        start(config(data, tmp_path / "run", f"data.path={address}", mix, cache), False, lambda _: None, pytest.fail)
    assert str(told).count(f"http://127.0.0.1:{web.port}/") == 5  # path and mix, as a tree and as text, and the fact
    assert not any(secret in str(told) for secret in ("annie", "s3cret", "t0ken"))


def test_paths_of_the_data_mean_the_same_for_workers_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mix = "data.mix=[{path: one}, {path: 's3://bucket/two'}]"
    found = resolved(config(Path("one"), Path("out"), mix, "data.cache_dir=cache")).data
    assert (found.path, found.cache_dir) == (tmp_path / "one", tmp_path / "cache")
    assert [part.path for part in found.mix] == [tmp_path / "one", "s3://bucket/two"]
