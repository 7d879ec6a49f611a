"""A run's folder: what lies in it, what is checked before a run starts, and what is noted when it ends.

run.out/  config.yaml          the resolved config
          checkpoints/         step-00001000/, ...
          run.json             the MLflow run, so that later commands add to it, and what each evaluation measured
          neural_collapse.png  the course of its measures over the run
          embedder/            what `export` makes of it
"""

from collections.abc import Callable, Mapping
from math import isfinite
from pathlib import Path

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
from trainer.strict import Strict
from trainer.tracking import Status, Tracker, absolute_uri
from trainer.train import Record

NOTE = "run.json"
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
    path = config.data.path
    data = config.data.model_copy(update={"path": path.resolve() if isinstance(path, Path) else path})
    run = config.run.model_copy(update={"out": config.run.out.resolve()})
    tracking = config.tracking.model_copy(update={"uri": absolute_uri(config.tracking.uri, Path.cwd())})
    return config.model_copy(update={"data": data, "run": run, "tracking": tracking})


def start(config: Config, resume: bool, on_record: Callable[[Record], None], on_trouble: Callable[[str], None]) -> Path:
    """Check a config, train it (or go on) on Ray workers, and write MLflow from this process; returns the run's folder.

    Args:
        on_record: called with each record of rank 0, from a second thread.
        on_trouble: called with one sentence when MLflow cannot be used.

    Raises:
        UserError: config, data or an earlier run do not fit together, or what `launch` finds wrong.
        trainer.launch.TrainingFailed: a worker failed by no fault of the input.
    """
    config = resolved(config)
    folder, kind = config.run.out, check(config, resume).kind
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "config.yaml", config.to_yaml())
    note = RunNote.read(folder) if resume else RunNote()
    tracker = Tracker(config.tracking, on_trouble, note.mlflow_run_id or None)
    public = _public(config)
    facts = {"data": str(public.data.path), "data_kind": kind}
    tracker.start(public.model_dump(mode="json"), public.to_yaml(), facts)
    measured = {one.step: one.values for one in note.evaluations}

    def dispatch(record: Record) -> None:
        on_record(record)
        if record.kind == "metrics":  # JSON has no infinity, which a measure of collapsed embeddings may be
            measured[record.step] = {name: value for name, value in record.values.items() if isfinite(value)}
        if record.kind in ("step", "metrics"):
            tracker.metrics(record.values, record.step, record.time_ms)

    from trainer.launch import launch  # only now: Ray takes seconds to import, and who reads a note does without

    status: Status = "FAILED"
    try:
        launch(config, resume, dispatch)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        _finish(config, tracker, status, measured)
    return folder


def _public(config: Config) -> Config:
    """The config as others may read it: addresses without passwords and tokens."""
    mix = tuple(part.model_copy(update={"path": shown(part.path)}) for part in config.data.mix)
    data = config.data.model_copy(update={"path": shown(config.data.path), "mix": mix})
    return config.model_copy(update={"data": data})


def _finish(config: Config, tracker: Tracker, status: Status, measured: Mapping[int, dict[str, float]]) -> None:
    """Write the note, and the picture of what was measured (by step), and end MLflow's run, however the run ended."""
    evaluations = tuple(Evaluation(step=step, values=measured[step]) for step in sorted(measured))
    note = RunNote(mlflow_run_id=tracker.run_id() or "", tracking_uri=config.tracking.uri, evaluations=evaluations)
    folder = config.run.out
    write_file(folder / NOTE, note.model_dump_json(indent=1) + "\n")
    if course := note.course():
        from trainer.evaluation.plots import course_plot  # matplotlib, which the workers do not need

        tracker.artifact(course_plot(course, folder / f"{COLLAPSE}.png"))
    tracker.close(status)


def check(config: Config, resume: bool) -> Manifest:
    """What can be seen to be wrong before Ray is started; the data set's manifest.

    Raises:
        UserError: no such data set or split, an earlier run in the folder, changes to images where there are none, or a
            backbone that cannot be built.
    """
    manifest = Manifest.read(config.data.path, config.data.remote_cache)
    manifest.split(config.data.train_split)
    if not resume and latest(config.run.out / CHECKPOINTS) is not None:
        raise UserError(
            f"'{config.run.out}' holds the checkpoints of an earlier run; "
            "add --resume to go on with it, or choose another run.out"
        )
    check_augment(config.augment, form := preprocessing(manifest, config.data))
    with torch.device("meta"):
        build(config.backbone, *form.shape_CHW)
    return manifest
