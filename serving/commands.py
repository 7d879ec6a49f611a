"""What the longer commands do: the rooms joined in the order of the data.

train -> Checkpoint -> export -> Embedder -> evaluate -> calibrate -> Threshold
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from trainer.errors import UserError

if TYPE_CHECKING:
    from serving.embedder import Embedder
    from serving.terminal import TrainingView
    from trainer.artifact import EmbedderManifest
    from trainer.checkpoint import Checkpoint
    from trainer.config import Config
    from trainer.data.manifest import Manifest
    from trainer.tracking import Tracker
    from trainer.train import Record

_PARITY_IMAGES = 16


def resolved(config: "Config") -> "Config":
    """The config with paths that mean the same from every working directory."""
    from trainer.tracking import absolute_uri

    here = Path.cwd()
    tracking = config.tracking.model_copy(update={"uri": absolute_uri(config.tracking.uri, here)})
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"path": config.data.path.resolve()}),
            "run": config.run.model_copy(update={"out": config.run.out.resolve()}),
            "tracking": tracking,
        }
    )


def train_and_track(config: "Config", resume: bool, out: Console, err: Console) -> None:
    """Launch a training run, show its progress, and write it to MLflow from this process."""
    from serving.terminal import TrainingView
    from trainer.launch import launch
    from trainer.tracking import Tracker

    config = resolved(config)
    manifest = _check(config, resume)
    folder = config.run.out
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    earlier = read_run(folder).get("mlflow_run_id") if resume else None
    tracker = Tracker(config.tracking, lambda text: err.print(text, style="yellow", highlight=False), earlier)
    tracker.start(config, {"data": str(config.data.path), "data_kind": manifest.kind})
    status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
    try:
        with TrainingView(out) as view:
            launch(config, resume, lambda record: _on_record(record, view, tracker))
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        run = {"mlflow_run_id": tracker.run_id() or "", "tracking_uri": config.tracking.uri}
        (folder / "run.json").write_text(json.dumps(run, indent=1) + "\n")
        tracker.close(status)
    out.print(f"checkpoints are in {folder / 'checkpoints'}; next: hypersphere export --run {folder}", highlight=False)


def _on_record(record: "Record", view: "TrainingView", tracker: "Tracker") -> None:
    if record.kind == "note":
        view.line(record.text)
    elif record.kind in ("start", "step"):
        view.step(record.step, record.total_steps, record.values)
    elif record.kind == "metrics":
        view.line(f"step {record.step}: " + ", ".join(f"{key} {value:.4f}" for key, value in record.values.items()))
    if record.kind in ("step", "metrics"):
        tracker.metrics(record.values, record.step, record.time_ms)


def _check(config: "Config", resume: bool) -> "Manifest":
    """What can be seen to be wrong before Ray is started."""
    from trainer.backbones.build import build
    from trainer.checkpoint import latest
    from trainer.data.manifest import Manifest

    manifest = Manifest.read(config.data.path)
    manifest.split(config.data.train_split)
    if not resume and latest(config.run.out / "checkpoints") is not None:
        raise UserError(
            f"'{config.run.out}' holds the checkpoints of an earlier run; "
            "add --resume to go on with it, or choose another run.out"
        )
    import torch

    with torch.device("meta"):
        build(config.backbone, 1 if manifest.image_mode == "L" else 3, config.data.height, config.data.width)
    return manifest


def read_run(folder: Path) -> dict[str, str]:
    """What training noted beside the checkpoints: the MLflow run, so that later commands can add to it."""
    path = folder / "run.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def export_run(
    run: Path, to: Path, data: Path | None, register: bool, overwrite: bool, err: Console
) -> "EmbedderManifest":
    """Export the newest checkpoint of a run (or the checkpoint that `run` is), check it, register it."""
    from trainer.backbones.build import build
    from trainer.checkpoint import MANIFEST, latest, open_checkpoint
    from trainer.config import from_tree
    from trainer.data.manifest import Manifest
    from trainer.data.stream import preprocessing
    from trainer.export import export
    from trainer.objective import embedder_of

    found = open_checkpoint(run) if (run / MANIFEST).is_file() else latest(run / "checkpoints")
    if found is None:
        raise UserError(f"'{run}' holds no checkpoint; give the run.out of a training run, or train one first")
    config = from_tree(found.manifest.config)
    folder = data or config.data.path
    manifest = Manifest.read(folder)
    pixels = preprocessing(manifest, config.data)
    backbone = build(config.backbone, pixels.channels, pixels.height, pixels.width)
    backbone.load_state_dict(_weights(found))
    model = embedder_of(config, found, backbone)
    images = np.stack(list(islice(_images(folder, manifest, config), _PARITY_IMAGES)))
    import torch

    noted = read_run(config.run.out)
    provenance = {
        "checkpoint_step": str(found.step),
        "class_digest": found.manifest.class_digest,
        "classes": str(found.manifest.classes),
        "mlflow_run_id": noted.get("mlflow_run_id", ""),
        "tracking_uri": noted.get("tracking_uri", "") if "@" not in noted.get("tracking_uri", "") else "",
        "data": manifest.kind,
    }
    written = export(model, pixels, to, torch.from_numpy(images), provenance, overwrite=overwrite)
    if register and noted.get("mlflow_run_id"):
        from trainer.tracking import Tracker

        tracker = Tracker(config.tracking, lambda text: err.print(text, style="yellow"), noted["mlflow_run_id"])
        tracker.register(to, written.model_id)
        tracker.close(None)
    return written


def _weights(found: "Checkpoint") -> dict[str, "object"]:
    """The backbone's state dict out of the engine's: its weights and buffers, by their own names."""
    state = found.read("backbone.safetensors")
    return {
        name.partition(".")[2]: tensor
        for name, tensor in state.items()
        if name.partition(".")[0] in ("weight", "buffer")
    }


def _images(folder: Path, manifest: "Manifest", config: "Config") -> Iterator[NDArray[np.uint8]]:
    """Real images for the parity check, of the validation split where there is one."""
    from trainer.data.stream import Stream

    split = config.data.val_split if config.data.val_split in manifest.splits else config.data.train_split
    settings = config.data.model_copy(update={"batch_size": _PARITY_IMAGES, "cache": "none"})
    for batch in Stream(folder, manifest, split, settings, shuffle=False).batches(0):
        yield from batch.images_BCHW.numpy()


def embed_split(
    embedder: "Embedder", data: Path, split: str, console: Console
) -> tuple[NDArray[np.float32], NDArray[np.int64], "Manifest"]:
    """Unit vectors [N, D] and labels [N] of a split, in the order of its shards."""
    from serving.terminal import progress
    from trainer.config import DataConfig
    from trainer.data.manifest import Manifest
    from trainer.data.stream import Stream

    manifest = Manifest.read(data)
    pixels = embedder.manifest.preprocessing
    settings = DataConfig(height=pixels.height, width=pixels.width, cache="none")
    as_the_model_reads = manifest.model_copy(update={"image_mode": pixels.mode})
    stream = Stream(data, as_the_model_reads, split, settings, shuffle=False)
    vectors, labels = [], []
    with progress(console) as show:
        for batch in stream.batches(0):
            real_B = batch.labels_B.numpy() >= 0
            vectors.append(embedder.embed(batch.images_BCHW.numpy()[real_B]))
            labels.append(batch.labels_B.numpy()[real_B])
            show("embed", sum(map(len, labels)), stream.samples)
    return np.concatenate(vectors), np.concatenate(labels), manifest


def evaluate_embedder(
    folder: Path,
    data: Path,
    split: str,
    to: Path,
    unenrolled: float,
    seed: int,
    threads: int,
    out: Console,
    err: Console,
) -> None:
    """Evaluate, print the table, write report.json and the plots, and add them to the MLflow run."""
    from serving.embedder import Embedder
    from serving.terminal import report_rows, rows_table
    from trainer.evaluation.plots import report_plots
    from trainer.evaluation.protocols import evaluate

    embedder = Embedder.open(folder, threads)
    vectors, labels, manifest = embed_split(embedder, data, split, out)
    names = manifest.split(split).classes
    report = evaluate(vectors, labels, names, seed=seed, unenrolled_share=unenrolled)
    to.mkdir(parents=True, exist_ok=True)
    (to / "report.json").write_text(report.to_json())
    plots = report_plots(report, to)
    out.print(rows_table(f"{split}: {len(labels)} images of {len(names)} identities", report_rows(report)))
    out.print(f"report and {len(plots)} plots are in {to}", highlight=False)
    _track_evaluation(embedder, to, report.scalars(), err)


def _track_evaluation(embedder: "Embedder", to: Path, scalars: dict[str, float], err: Console) -> None:
    import time

    provenance = embedder.manifest.provenance
    if not provenance.get("mlflow_run_id") or not provenance.get("tracking_uri"):
        return
    from trainer.config import TrackingConfig
    from trainer.tracking import Tracker

    settings = TrackingConfig(uri=provenance["tracking_uri"])
    tracker = Tracker(settings, lambda text: err.print(text, style="yellow"), provenance["mlflow_run_id"])
    values = {f"evaluation/{name}": value for name, value in scalars.items()}
    tracker.metrics(values, int(provenance["checkpoint_step"]), int(time.time() * 1000))
    tracker.artifact(to, "evaluation")
    tracker.close(None)


def calibrate_embedder(
    folder: Path,
    data: Path,
    split: str,
    fpir: float,
    fmr: float,
    gallery_size: int | None,
    seed: int,
    threads: int,
    out: Console,
) -> None:
    """Choose the thresholds and write them into the Embedder's manifest."""
    from serving.embedder import Embedder
    from serving.terminal import rows_table
    from trainer.artifact import write_manifest
    from trainer.evaluation.calibration import calibrate

    embedder = Embedder.open(folder, threads)
    vectors, labels, manifest = embed_split(embedder, data, split, out)
    calibration = calibrate(
        vectors,
        labels,
        model_id=embedder.manifest.model_id,
        fpir=fpir,
        fmr=fmr,
        gallery_size=gallery_size or len(manifest.split(split).classes),
        seed=seed,
        source=f"{manifest.kind}, split '{split}'",
    )
    write_manifest(folder, embedder.manifest.model_copy(update={"calibration": calibration}))
    rows = [
        (
            f"{use} ({threshold.target} {threshold.rate:g}" + (f" at {threshold.gallery_size} subjects)" if n else ")"),
            f"{threshold.value:.4f}, reached {threshold.target} between {threshold.low:.4f} and {threshold.high:.4f}",
        )
        for use, threshold, n in (("verify", calibration.verify, False), ("identify", calibration.identify, True))
    ]
    out.print(rows_table("thresholds", rows))
