"""A run's folder: what lies in it, what is checked before a run starts, and what is noted when it ends.

run.out/  config.yaml          the resolved config
          checkpoints/         step-00001000/, ...
          run.json             the MLflow run, so that later commands add to it, and what each evaluation measured
          tracking/            what MLflow has still to take; of a run.out in a bucket, in `~/.local/state/hypersphere`
          .lock, .writer       held by the launching process, and by the rank that writes the checkpoints
          neural_collapse.png  the course of its measures over the run
          embedder/            what `export` makes of it
"""

import hashlib
import os
import signal
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError
from torch.overrides import TorchFunctionMode

from trainer.backbones import build
from trainer.checkpoint import CHECKPOINTS, Shelf
from trainer.config import Config
from trainer.data.augment import check_augment
from trainer.data.manifest import Manifest
from trainer.data.remote import shown
from trainer.data.stream import preprocessing
from trainer.errors import UserError
from trainer.lease import held
from trainer.storage import Folder
from trainer.strict import Strict
from trainer.tracking import Status, Tracker, absolute_uri, public_uri
from trainer.train import Record

NOTE, TRACKING, LOCK = "run.json", "tracking", ".lock"
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
    def read(cls, out: Path | str) -> "RunNote":
        """The note of a run's folder; an empty one where there is none.

        Raises:
            UserError: the file is not such a note.
        """
        folder = Folder.at(out)
        try:
            return cls.model_validate_json(folder.read(NOTE))
        except FileNotFoundError:
            return cls()
        except ValidationError as error:
            raise UserError(f"'{folder}/{NOTE}' is not a run's note ({error.errors()[0]['msg']}); remove it") from error

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
    run = config.run.model_copy(update={"out": of(config.run.out)})
    tracking = config.tracking.model_copy(update={"uri": absolute_uri(config.tracking.uri, Path.cwd())})
    return config.model_copy(update={"data": data, "run": run, "tracking": tracking})


class _Notes:
    """`run.json`, written as the run goes: by the thread of the records, and by that of MLflow."""

    def __init__(self, folder: Folder, note: RunNote) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self.note = note

    def change(self, **changes: Any) -> None:
        with self._lock:
            self.note = self.note.model_copy(update=changes)
            self._folder.write(NOTE, self.note.model_dump_json(indent=1) + "\n")

    def measured(self, step: int, values: Mapping[str, float]) -> None:
        """Note an evaluation, in place of an earlier one of the step."""
        finite = {name: value for name, value in values.items() if isfinite(value)}  # JSON has no infinity
        others = [one for one in self.note.evaluations if one.step != step]
        found = sorted([*others, Evaluation(step=step, values=finite)], key=lambda one: one.step)
        self.change(evaluations=tuple(found))


def start(
    config: Config, resume: bool, on_record: Callable[[Record], None], on_trouble: Callable[[str], None]
) -> Folder:
    """Check a config, train it (or go on) on Ray workers, and write MLflow from this process; returns the run's folder.

    Args:
        on_record: called with each record of rank 0, from a second thread.
        on_trouble: called with one sentence when MLflow cannot be used.

    Raises:
        UserError: config, data or an earlier run do not fit together, another process writes into the run's folder, or
            what `launch` finds wrong.
        trainer.launch.TrainingFailed: a worker failed by no fault of the input.
        trainer.launch.Interrupted: the run can go on later; also after SIGTERM.
        SystemExit: with 143, after a second SIGTERM.
    """
    config = resolved(config)
    folder, kind = Folder.at(config.run.out), check(config).kind
    with held(folder, LOCK, uuid.uuid4().hex), _stopped_by_sigterm() as stop:
        _refuse_earlier(config, resume)
        folder.write("config.yaml", config.to_yaml())
        notes = _Notes(folder, RunNote.read(config.run.out) if resume else RunNote())
        notes.change(tracking_uri=config.tracking.uri)
        run_id = notes.note.mlflow_run_id if resume else None
        tracker = Tracker(
            config.tracking, on_trouble, run_id,
            folder=_beside(folder) / TRACKING, on_run=lambda found: notes.change(mlflow_run_id=found),
        )  # fmt: skip
        public = _public(config)
        facts = {"data": str(public.data.path), "data_kind": kind}
        tracker.start(public.model_dump(mode="json"), public.to_yaml(), facts)
        _launch(config, resume, on_record, notes, tracker, stop)
    return folder


def _launch(
    config: Config,
    resume: bool,
    on_record: Callable[[Record], None],
    notes: _Notes,
    tracker: Tracker,
    stop: threading.Event,
) -> None:
    """Train; however that ends, draw what was measured, and end MLflow's run."""

    def dispatch(record: Record) -> None:
        on_record(record)
        if record.kind == "start":
            tracker.wake()
        elif record.kind == "back":
            tracker.go_back(record.step)
        elif record.kind in ("step", "metrics"):
            tracker.metrics(record.values, record.step, record.time_ms)
        if record.kind == "metrics":
            notes.measured(record.step, record.values)

    # Only now: Ray takes seconds to import, and who reads a note does without.
    from trainer.launch import Interrupted, launch

    status: Status = "FAILED"
    try:
        launch(config, resume, dispatch, stop)
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit, Interrupted):
        status = "KILLED"
        raise
    finally:
        if course := notes.note.course():
            from trainer.evaluation.plots import course_plot  # matplotlib, which the workers do not need

            folder = Folder.at(config.run.out)
            picture = course_plot(course, _beside(folder) / f"{COLLAPSE}.png")
            if isinstance(folder.address, str):
                folder.write(picture.name, [picture.read_bytes()])
            tracker.artifact(picture)
        tracker.close(status)


def _beside(folder: Folder) -> Path:
    """Where on this machine lies what cannot lie in a bucket: of a folder on a disk that folder itself."""
    if isinstance(folder.address, Path):
        return folder.address
    home = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    beside = home / "hypersphere" / hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    try:
        beside.mkdir(parents=True, exist_ok=True)
    except OSError:  # in a container, say
        return Path(tempfile.mkdtemp(prefix="hypersphere-"))
    return beside


@contextmanager
def _stopped_by_sigterm() -> Iterator[threading.Event]:
    """Yields what the first SIGTERM sets; a second one raises SystemExit. Only where signals can be taken."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def end(number: int, frame: object) -> None:
        if stop.is_set():
            raise SystemExit(_TERMINATED)
        stop.set()

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def _public(config: Config) -> Config:
    """The config as others may read it: addresses without passwords and tokens."""
    mix = tuple(part.model_copy(update={"path": shown(part.path)}) for part in config.data.mix)
    data = config.data.model_copy(update={"path": shown(config.data.path), "mix": mix})
    tracking = config.tracking.model_copy(update={"uri": public_uri(config.tracking.uri)})
    run = config.run.model_copy(update={"out": shown(config.run.out)})
    return config.model_copy(update={"data": data, "run": run, "tracking": tracking})


def check(config: Config) -> Manifest:
    """What can be seen to be wrong before Ray is started; the data set's manifest.

    Raises:
        UserError: no such data set or split, changes to images where there are none, or a backbone that cannot be
            built, or a run.out that the workers would not see.
    """
    if str(config.run.out).startswith("memory://"):
        raise UserError(f"run.out '{config.run.out}' is in one process' memory; name a folder, or s3:// or gs://")
    manifest = Manifest.read(config.data.path, config.data.remote_cache)
    manifest.split(config.data.train_split)
    check_augment(config.augment, form := preprocessing(manifest, config.data))
    with torch.device("meta"), Unfilled():
        build(config.backbone, *form.shape_CHW)
    return manifest


class Unfilled(TorchFunctionMode):
    """Skips what draws a weight's first values: on the meta device there are none, and torch's compiler, seconds of a
    core to import, would be asked for them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in (torch.Tensor.normal_, torch.Tensor.uniform_) else func(*args, **(kwargs or {}))


def _refuse_earlier(config: Config, resume: bool) -> None:
    folder = Folder.at(config.run.out)
    if not resume and Shelf.of(folder / CHECKPOINTS).whole:
        raise UserError(
            f"'{folder}' holds the checkpoints of an earlier run; "
            "add --resume to go on with it, or choose another run.out"
        )
