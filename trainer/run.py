"""A run's folder: what lies in it, what is checked before a run starts, and what is noted when it ends.

run.out/  config.yaml          the resolved config
          checkpoints/         step-00001000/, ...
          run.json             the MLflow run, so that later commands add to it, and what each evaluation measured
          tracking/            what MLflow has still to take
          .lock, .writer       held by the launching process, and by the rank that writes the checkpoints
          neural_collapse.png  the course of its measures over the run
          embedder/            what `export` makes of it
"""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

import torch
from pydantic import Field, ValidationError

from trainer.atomic import write_file
from trainer.backbones import build
from trainer.checkpoint import CHECKPOINTS, latest
from trainer.config import Config
from trainer.data.augment import check_augment
from trainer.data.manifest import Manifest
from trainer.data.remote import shown
from trainer.data.stream import preprocessing
from trainer.errors import UserError
from trainer.locks import try_lock
from trainer.strict import Strict
from trainer.tracking import Status, Tracker, absolute_uri, public_uri
from trainer.train import Record

NOTE, TRACKING = "run.json", "tracking"
_TERMINATED = 128 + signal.SIGTERM  # exit code, as shells count
COLLAPSE = "neural_collapse"  # what its measures' names begin with, and the name of their picture


class Evaluation(Strict):
    """What was measured at one step, by name."""

    step: int
    values: dict[str, float]


class RunNote(Strict):
    """`run.json`. Without MLflow, identity and URI are empty."""

    mlflow_run_id: str = ""
    tracking_uri: str = ""
    evaluations: tuple[Evaluation, ...] = Field((), description="ascending by step")

    @classmethod
    def read(cls, folder: Path) -> "RunNote":
        """The note of a run's folder; an empty one where there is none.

        Raises:
            UserError: the file is not such a note.
        """
        path = folder / NOTE
        try:
            return cls.model_validate_json(path.read_bytes()) if path.is_file() else cls()
        except ValidationError as error:
            raise UserError(f"'{path}' is not a run's note ({error.errors()[0]['msg']}); remove it") from error

    def course(self) -> list[tuple[int, Mapping[str, float]]]:
        """The measures of neural collapse of each evaluation that has some."""
        prefix = COLLAPSE + "/"
        found = [
            (one.step, {name.removeprefix(prefix): v for name, v in one.values.items() if name.startswith(prefix)})
            for one in self.evaluations
        ]
        return [(step, values) for step, values in found if values]


def resolved(config: Config) -> Config:
    """The config with paths that mean the same from every working directory."""

    def of(path: Path | str) -> Path | str:
        return path.resolve() if isinstance(path, Path) else path

    mix = tuple(part.model_copy(update={"path": of(part.path)}) for part in config.data.mix)
    cache = config.data.cache_dir and config.data.cache_dir.resolve()
    data = config.data.model_copy(update={"path": of(config.data.path), "mix": mix, "cache_dir": cache})
    init = config.init.model_copy(update={"weights": config.init.weights and config.init.weights.resolve()})
    run = config.run.model_copy(update={"out": config.run.out.resolve()})
    tracking = config.tracking.model_copy(update={"uri": absolute_uri(config.tracking.uri, Path.cwd())})
    return config.model_copy(update={"data": data, "init": init, "run": run, "tracking": tracking})


def rehearse(config: Config, resume: bool) -> tuple[Config, dict[str, float], list[str]]:
    """Check a config, and do one step on each of its Ray workers on made-up samples. Nothing is written.

    Returns:
        The resolved config, the bytes of each part of the memory (`plan.rehearse`), and what a user should read.

    Raises:
        UserError: as `start`.
        trainer.launch.TrainingFailed: a worker failed by no fault of the input.
    """
    config = resolved(config)
    check(config)
    _refuse_earlier(config, resume)
    records: list[Record] = []

    from trainer.launch import launch

    launch(config, False, records.append, dry=True)
    plan = next(record for record in records if record.kind == "plan")
    return config, plan.values, [record.text for record in records if record.text]


class _Notes:
    """`run.json`, written as the run goes: by the thread of the records, and by that of MLflow."""

    def __init__(self, folder: Path, note: RunNote) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self.note = note

    def change(self, **changes: Any) -> None:
        with self._lock:
            self.note = self.note.model_copy(update=changes)
            write_file(self._folder / NOTE, self.note.model_dump_json(indent=1) + "\n")

    def measured(self, step: int, values: Mapping[str, float]) -> None:
        """Note an evaluation, in place of an earlier one of the step."""
        finite = {name: value for name, value in values.items() if isfinite(value)}  # JSON has no infinity
        others = [one for one in self.note.evaluations if one.step != step]
        found = sorted([*others, Evaluation(step=step, values=finite)], key=lambda one: one.step)
        self.change(evaluations=tuple(found))


def start(config: Config, resume: bool, on_record: Callable[[Record], None], on_trouble: Callable[[str], None]) -> Path:
    """Check a config, train it (or go on) on Ray workers, and write MLflow from this process; returns the run's folder.

    Args:
        on_record: called with each record of rank 0, from a second thread.
        on_trouble: called with one sentence when MLflow cannot be used.

    Raises:
        UserError: config, data or an earlier run do not fit together, another process writes into the run's folder, or
            what `launch` finds wrong.
        trainer.launch.TrainingFailed: a worker failed by no fault of the input.
        SystemExit: with 143, after SIGTERM.
    """
    config = resolved(config)
    folder, kind = config.run.out, check(config).kind
    folder.mkdir(parents=True, exist_ok=True)
    with _alone_in(folder), _ended_by_sigterm():
        _refuse_earlier(config, resume)
        write_file(folder / "config.yaml", config.to_yaml())
        notes = _Notes(folder, RunNote.read(folder) if resume else RunNote())
        notes.change(tracking_uri=config.tracking.uri)
        run_id = notes.note.mlflow_run_id if resume else None
        tracker = Tracker(
            config.tracking, on_trouble, run_id,
            folder=folder / TRACKING, on_run=lambda found: notes.change(mlflow_run_id=found),
        )  # fmt: skip
        public = _public(config)
        facts = {"data": str(public.data.path), "data_kind": kind}
        tracker.start(public.model_dump(mode="json"), public.to_yaml(), facts)
        _launch(config, resume, on_record, notes, tracker)
    return folder


def _launch(config: Config, resume: bool, on_record: Callable[[Record], None], notes: _Notes, tracker: Tracker) -> None:
    """Train; however that ends, draw what was measured, and end MLflow's run."""

    def dispatch(record: Record) -> None:
        on_record(record)
        if record.kind == "start":
            tracker.wake()
        if record.kind == "metrics":
            notes.measured(record.step, record.values)
        if record.kind in ("step", "metrics"):
            tracker.metrics(record.values, record.step, record.time_ms)

    from trainer.launch import launch  # only now: Ray takes seconds to import, and who reads a note does without

    status: Status = "FAILED"
    try:
        launch(config, resume, dispatch)
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        if course := notes.note.course():
            from trainer.evaluation.plots import course_plot  # matplotlib, which the workers do not need

            tracker.artifact(course_plot(course, config.run.out / f"{COLLAPSE}.png"))
        tracker.close(status)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("ab") as file:
        if not try_lock(file):
            raise UserError(f"another run is writing into '{folder}' now; wait for its end, or choose another run.out")
        yield


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM raise SystemExit from the block, and Ctrl-C KeyboardInterrupt, where signals can be taken."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    taken = threading.Event()

    def end(number: int, frame: object) -> NoReturn:
        taken.set()
        raise SystemExit(_TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except SystemExit as ended:  # Ray changes the code, and raises this at Ctrl-C, too
        raise SystemExit(_TERMINATED) if taken.is_set() else KeyboardInterrupt from ended
    finally:
        signal.signal(signal.SIGTERM, before)


def _public(config: Config) -> Config:
    """The config as others may read it: addresses without passwords and tokens."""
    mix = tuple(part.model_copy(update={"path": shown(part.path)}) for part in config.data.mix)
    data = config.data.model_copy(update={"path": shown(config.data.path), "mix": mix})
    tracking = config.tracking.model_copy(update={"uri": public_uri(config.tracking.uri)})
    return config.model_copy(update={"data": data, "tracking": tracking})


def check(config: Config) -> Manifest:
    """What can be seen to be wrong before Ray is started; the data set's manifest.

    Raises:
        UserError: no such data set or split, changes to images where there are none, or a backbone that cannot be
            built.
    """
    manifest = Manifest.read(config.data.path, config.data.remote_cache)
    manifest.split(config.data.train_split)
    check_augment(config.augment, form := preprocessing(manifest, config.data))
    with torch.device("meta"):
        build(config.backbone, *form.shape_CHW)
    if config.init.weights is not None and not config.init.weights.is_dir():
        raise UserError(
            f"init.weights '{config.init.weights}' is no folder; name that of a run, checkpoint or embedder"
        )
    return manifest


def _refuse_earlier(config: Config, resume: bool) -> None:
    if not resume and latest(config.run.out / CHECKPOINTS) is not None:
        raise UserError(
            f"'{config.run.out}' holds the checkpoints of an earlier run; "
            "add --resume to go on with it, or choose another run.out"
        )
