"""`hypersphere train`, `submit`, `export`, `calibrate`: an Embedder is made, and given thresholds."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from serving.cli.terminal import TrainingView, fail, out, progress, warn
from trainer.errors import UserError

if TYPE_CHECKING:
    from trainer.config import Config
    from trainer.embedder import EmbedderManifest
    from trainer.evaluation.normalise import Normaliser
    from trainer.evaluation.report import Calibration

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Override single keys, e.g. `run.epochs=5`."),
]
ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file; without it, the defaults.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in run.out.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and do one step on made-up samples.")]
EmbedderOption = Annotated[Path, typer.Option("--embedder", "-e", help="Folder that `export` wrote.")]
DataOption = Annotated[Path, typer.Option("--data", "-d", help="Folder that `data import` wrote.")]
Normalise = Annotated[
    Literal["z", "t", "s", "as", "csls"] | None,
    typer.Option(help="Normalise scores by the enrolled (z), the probe (t), both (s) or both's nearest (as, csls)."),
]
TrainedOn = Annotated[Path | None, typer.Option(help="The training's data set, for overlaps; default: --data.")]
Threads = Annotated[int, typer.Option(help="CPU threads of the model.")]
Weights = Literal["trained", "ema"]
Join = Literal["mean", "concatenate"]


def train(
    overrides: Overrides = None, config: ConfigOption = None, resume: Resume = False, dry_run: DryRun = False
) -> None:
    """Train on Ray workers: on the cluster at `$RAY_ADDRESS` or `scaling.address`, else on this machine.

    After SIGTERM it writes a checkpoint and exits with 75: the same command with --resume goes on.

    Example: `hypersphere train --config configs/demo.yaml run.epochs=3 loss=cosface`
    """
    from trainer.config import load
    from trainer.launch import Interrupted, TrainingFailed
    from trainer.run import rehearse, start

    try:
        if dry_run:
            _show_plan(*rehearse(load(config, overrides), resume))
            return
        with TrainingView(out) as view:
            folder = start(load(config, overrides), resume, view.record, warn)
    except TrainingFailed as error:
        fail(str(error), "the training failed")
        raise typer.Exit(1) from error
    except Interrupted as error:
        fail(str(error), "not finished")
        raise typer.Exit(os.EX_TEMPFAIL) from error
    out.print(f"checkpoints are in {folder}/checkpoints; next: hypersphere export --run {folder}")


def _show_plan(config: "Config", parts: Mapping[str, float], notes: Sequence[str]) -> None:
    table = Table(title="memory of the worker with most of each part")
    table.add_column("part")
    table.add_column("MB", justify="right")
    for name, size in parts.items():
        if size:
            table.add_row(name, f"{size / 1e6:,.2f}")
    out.print(config.to_yaml(), end="")
    out.print(table)
    for note in notes:
        out.print(note)
    out.print("one step was done on each worker; nothing was written")


def submit(
    overrides: Overrides = None,
    *,
    address: Annotated[str, typer.Option(help="Dashboard of the Ray cluster, http://HEAD:8265.")],
    config: ConfigOption = None,
    resume: Resume = False,
    command: Annotated[str, typer.Option(help="The program on the cluster.")] = "hypersphere",
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Variable to hand to the job; may be given several times.")
    ] = None,
) -> None:
    """Send a training run to a cluster through Ray Jobs, follow its log, and exit with its status.

    Relative paths in the config are taken from this folder, so they must mean the same on the cluster.
    """
    from trainer.config import load
    from trainer.jobs import submit as send
    from trainer.run import resolved

    job = send(address, resolved(load(config, overrides)), command, resume, env or ())
    out.print(f"job {job.identity} is on {address}; stop it with: ray job stop --address {address} {job.identity}")
    status = job.follow(lambda part: print(part, end="", flush=True))
    out.print(f"job {status}")
    raise typer.Exit(0 if status == "SUCCEEDED" else 1)


def export(
    *,
    run: Annotated[
        Path | None, typer.Option("--run", "-r", help="The run's folder (run.out), or one checkpoint's.")
    ] = None,
    embedder: Annotated[
        Path | None, typer.Option("--embedder", "-e", help="Instead of a run: an Embedder that gets other --views.")
    ] = None,
    to: Annotated[Path | None, typer.Option("--out", "-o", help="New folder; default RUN/embedder.")] = None,
    data: Annotated[Path | None, typer.Option(help="Data set for the parity check; default: the run's.")] = None,
    register: Annotated[bool, typer.Option(help="Register it in MLflow with the alias champion.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    weights: Annotated[Weights, typer.Option(help="As they were trained, or their moving average.")] = "trained",
    views: Annotated[str, typer.Option(metavar="V,V,...", help="Made into an embedding: `same,left2,turn5`.")] = "",
    join: Annotated[Join, typer.Option(help="Of the views: their mean, or one behind the other.")] = "mean",
) -> None:
    """Write the Embedder (ONNX and manifest) of a checkpoint, and check it against torch on real samples.

    Views take as many times as long to embed. With `--embedder E --out NEW` the model of an Embedder gets others; it is
    to be calibrated then.
    """
    from trainer.storage import Folder
    from trainer.views import checked

    wanted = checked(views.replace(" ", "").split(",") if views else ())
    if embedder is not None and run is None and to is not None:
        from trainer.embedder import write_with_views

        manifest = write_with_views(embedder, to, wanted, overwrite, join)
    elif run is not None and embedder is None:
        from trainer.export import export_run

        to = to or run / "embedder"
        manifest = export_run(
            *(run, to),
            data=data, overwrite=overwrite, register=register, on_trouble=warn, which=weights, views=wanted, join=join,
        )  # fmt: skip
    else:
        raise UserError("export takes --run FOLDER, or --embedder FOLDER with --out NEW")
    made = "means over" if join == "mean" else "one behind the other of"
    seen = f", {made} {', '.join(wanted)}" if wanted else ""
    out.print(f"embedder {manifest.model_id}: {manifest.dimension} dimensions{seen}, in {Folder.at(to)}")


def calibrate(
    *,
    embedder: EmbedderOption,
    data: DataOption,
    split: Annotated[str, typer.Option(help="Split to calibrate on: identities that were not trained on.")] = "val",
    fpir: Annotated[float, typer.Option(help="Allowed share of strangers' searches that return somebody.")] = 0.01,
    fmr: Annotated[float, typer.Option(help="Allowed share of false matches in 1:1 verification.")] = 0.001,
    gallery_size: Annotated[int | None, typer.Option(help="Subjects in the gallery; default: the split's.")] = None,
    samples_per_subject: Annotated[int, typer.Option(min=1, help="Enrolled of each subject.")] = 1,
    extrapolate: Annotated[
        bool, typer.Option(help="Also below one expected false positive; the answer says so.")
    ] = False,
    prior: Annotated[float, typer.Option(help="Probability of a mate before a score is known, for 1:1.")] = 0.5,
    normalise: Normalise = None,
    cohort: Annotated[
        str | None, typer.Option(help="Split of the cohort, such as train; default: a fifth of the subjects.")
    ] = None,
    trained_on: TrainedOn = None,
    seed: Annotated[int, typer.Option(help="Chooses the samples that are enrolled, and the cohort.")] = 0,
    threads: Threads = 2,
) -> None:
    """Choose the thresholds for the error rates that you allow, and write them into the Embedder's manifest.

    With them goes the curve over gallery sizes, by which the service takes the threshold of the size that it has.
    """
    from trainer.assess import calibrate_on_split
    from trainer.embedder import Embedder

    opened = Embedder.open(embedder, threads)
    how: dict[str, Any] = {"fpir": fpir, "fmr": fmr, "gallery_size": gallery_size, "extrapolate": extrapolate}
    how |= {"samples_per_subject": samples_per_subject, "prior": prior, "normalise": normalise, "seed": seed}
    how |= {"cohort": cohort, "trained_on": trained_on}
    with progress() as show:
        found, normaliser, remarks = calibrate_on_split(opened, data, split, progress=show, **how)
    for remark in remarks:
        warn(remark)
    _keep(embedder, opened.manifest, found, normaliser)
    print_table("thresholds", _threshold_rows(found, extrapolate))
    out.print(f"verify: {found.verify.source}\nidentify: {found.identify.source}")


def _keep(folder: Path, manifest: "EmbedderManifest", found: "Calibration", normaliser: "Normaliser | None") -> None:
    """Write a calibration into an Embedder's folder, the cohort before the manifest that names it."""
    from trainer.embedder import write_cohort, write_manifest

    normalisation = write_cohort(folder, normaliser) if normaliser else None
    write_manifest(folder, manifest.model_copy(update={"calibration": found, "normalisation": normalisation}))
    for old in folder.glob("cohort-*.npy"):
        if normalisation is None or old.name != normalisation.file:
            old.unlink()


def _threshold_rows(found: "Calibration", extrapolate: bool) -> list[tuple[str, str]]:
    """Each threshold with the interval of its rate: for 1:1, and for galleries of N, 2 N and 10 N."""
    verify, identify, curve = found.verify, found.identify, found.curve
    assert curve is not None, "calibrate makes one"
    rows = [(f"verify (FMR {verify.rate:g})", _reached(verify.value, verify.low, verify.high))]
    for growth in (1, 2, 10):
        size = growth * identify.gallery_size
        try:
            at = curve.at(size, identify.rate, 0.0 if extrapolate else 1.0)
            told = _reached(at.value, at.low, at.high)
        except UserError as error:
            told = f"refused: {error}"
        rows.append((f"identify (FPIR {identify.rate:g} at {size} subjects)", told))
    if model := found.probability:
        ece = f"ECE {model.ece_platt:.3g} by Platt's sigmoid, {model.ece_isotonic:.3g} by isotonic regression"
        mate = model.probability(verify.value)
        rows.append((f"probability of a mate at {verify.value:.4f}, prior {model.prior:g}", f"{mate:.4f}; {ece}"))
    return rows


def _reached(value: float, low: float, high: float) -> str:
    return f"{value:.4f}, the rate lies between {low:.3g} and {high:.3g}"


def print_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """A table of two columns: what, and its value."""
    table = Table(title=title, show_header=False, title_justify="left")
    for row in rows:
        table.add_row(*row)
    out.print(table)
