"""`hypersphere evaluate`: an Embedder is measured, or two are compared; as text, JSON, pictures and a page."""

import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serving.cli.embedder import Threads, TrainedOn, print_table
from serving.cli.terminal import out, progress, warn
from trainer.errors import UserError

if TYPE_CHECKING:
    from trainer.assess import Evaluated
    from trainer.embedder import Embedder
    from trainer.evaluation.report import Report

_Embedder = Annotated[Path | None, typer.Option("--embedder", "-e", help="Folder that `export` wrote.")]
_Compare = Annotated[
    tuple[Path, Path] | None, typer.Option(metavar="A B", help="Two Embedders on the same data, on one page.")
]
_Data = Annotated[Path | None, typer.Option("--data", "-d", help="Folder that `data import` wrote.")]
_Protocol = Annotated[
    Path | None,
    typer.Option(help="List of pairs, .bin, protocol.yaml with templates, or folder of Omniglot's one-shot runs."),
]
_Images = Annotated[Path | None, typer.Option(help="Folder of the protocol's images; default: the protocol's own.")]
_By = Annotated[list[str] | None, typer.Option(help="Attribute of the set: errors of each of its groups. Repeatable.")]
_Quality = Annotated[str | None, typer.Option(help="Numeric attribute by which templates are weighted.")]
_To = Annotated[
    Path | None, typer.Option("--report", "--out", "-o", help="Folder of the report; default EMBEDDER/evaluation.")
]


def evaluate(
    *,
    embedder: _Embedder = None,
    compare: _Compare = None,
    data: _Data = None,
    split: Annotated[str, typer.Option(help="Split to evaluate on.")] = "val",
    protocol: _Protocol = None,
    images: _Images = None,
    to: _To = None,
    by: _By = None,
    quality: _Quality = None,
    trained_on: TrainedOn = None,
    unenrolled: Annotated[float, typer.Option(help="Share of the identities not enrolled, for open-set errors.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Chooses who is not enrolled.")] = 0,
    threads: Threads = 2,
) -> None:
    """Measure an Embedder: verification, identification, open-set errors; as text, JSON, pictures and one HTML page.

    With `--protocol FILE` the comparisons are those of the file, else all of a split. With `--compare A B` two are
    measured on the same, and their differences told with paired intervals. Scores are normalised as the service
    does it, where `calibrate --normalise` has written a cohort.
    """
    from trainer.assess import evaluate_protocol, evaluate_split
    from trainer.embedder import Embedder, read_cohort

    folders: list[Path] = [*(compare or ()), *([embedder] if embedder is not None else [])]
    _check(embedder, compare, data, protocol, to, by or quality or trained_on)
    found = []
    for folder in folders:
        opened = Embedder.open(folder, threads)
        with progress() as show:
            how: dict[str, Any] = {"seed": seed, "normaliser": read_cohort(folder, opened.manifest), "progress": show}
            if protocol is not None:
                one = evaluate_protocol(opened, protocol, images, data=data, split=split, **how)
            else:
                how |= {"unenrolled": unenrolled, "by": by or (), "quality": quality, "trained_on": trained_on}
                one = evaluate_split(opened, data, split, **how)  # type: ignore[arg-type]
        found.append((folder, opened, one))
    _write(found, to or folders[0] / "evaluation")


def _check(
    embedder: Path | None,
    compare: tuple[Path, Path] | None,
    data: Path | None,
    protocol: Path | None,
    to: Path | None,
    of_split: object,
) -> None:
    """Options that do not go together."""
    if (embedder is None) == (compare is None):
        raise UserError("evaluate takes --embedder FOLDER, or --compare A B; name one of them")
    if protocol is None and data is None:
        raise UserError("evaluate takes --data FOLDER, --protocol FILE, or both; name what to measure on")
    if protocol is not None and of_split:
        raise UserError("--by, --quality and --trained-on are of a data set's split; leave them out with --protocol")
    if compare is not None and to is None:
        raise UserError("--compare writes one page of two Embedders; name its folder with --report DIR")


def _write(found: list[tuple[Path, "Embedder", "Evaluated"]], to: Path) -> None:
    """Tables on the terminal, and everything into the folder, or the bucket, and to MLflow."""
    from trainer.storage import Folder, written_here

    place = Folder.at(to)
    with written_here(place, "report.json") as here:
        here.mkdir(parents=True, exist_ok=True)
        written = _files(found, here)
        for _, opened, one in found:
            _track(opened, one.measured.report, here, "evaluation" if len(found) == 1 else "comparison")
    out.print(f"report.json and {len(written)} other files are in {place}")


def _files(found: list[tuple[Path, "Embedder", "Evaluated"]], to: Path) -> list[Path]:
    """The files beside report.json."""
    from trainer.atomic import write_file

    for name, (_, opened, one) in zip(("report.json", "report_second.json"), found, strict=False):
        report = one.measured.report
        write_file(to / name, report.to_json())
        print_table(f"{opened.model_id}: {report.source}, {report.samples} samples", _rows(report))
        for remark in report.remarks:
            warn(remark)
    written: list[Path] = []
    try:
        from trainer.present import present

        written, sentences = present([(folder, opened.manifest, one) for folder, opened, one in found], to)
        for sentence in sentences:
            out.print(sentence)
    except ModuleNotFoundError as error:
        warn(f"no page: '{error.name}' is not installed; pip install 'hypersphere[trainer]' brings it")
    return written


def _rows(report: "Report") -> list[tuple[str, str]]:
    """The headline figures, each with what it was measured on; a figure that is not resolved says why."""
    rows = []
    if (shot := report.one_shot) is not None:
        rank1 = f"{shot.rank1:.2%}{_ends(shot.low, shot.high)}, {shot.probes} probes"
        rows.append((f"rank-1, gallery of {shot.gallery_size}", rank1))
    if (pairs := report.verification) is not None:
        rows.append(("EER", f"{pairs.eer:.2%}{_ends(*pairs.eer_interval)}"))
        for far in pairs.tar_at_far:
            rows.append((f"TAR at FAR {far.far:g}", _rate(far.tar, far.reason) + _ends(far.low, far.high)))
        if (folds := pairs.ten_fold) is not None:
            rows.append(("ten-fold accuracy", f"{folds.accuracy:.2%}, standard error {folds.standard_error:.2%}"))
    if (found := report.open_set) is not None:
        for point in found.points:
            what = f"FNIR at FPIR {point.fpir:g}, {found.unenrolled} identities not enrolled, gallery of"
            value = _rate(point.fnir, point.reason) + _ends(point.low, point.high)
            rows.append((f"{what} {found.gallery_size}", value))
    if (retrieved := report.retrieval) is not None:
        rows.append(("mAP@R", f"{retrieved.map_at_r:.2%}{_ends(*retrieved.map_interval)}"))
    return rows


def _rate(value: float | None, reason: str | None) -> str:
    return f"{value:.2%}" if value is not None else f"not resolved: {reason}"


def _ends(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"  (95 %: {low:.2%} to {high:.2%})"


def _track(embedder: "Embedder", report: "Report", folder: Path, name: str) -> None:
    """Add the figures, and the folder by this name, to the MLflow run that the Embedder comes from, if it names one."""
    provenance = embedder.manifest.provenance
    if not provenance.get("mlflow_run_id") or not provenance.get("tracking_uri"):
        return
    from trainer.tracking import Tracker, TrackingConfig

    settings = TrackingConfig(uri=provenance["tracking_uri"])
    values = {f"evaluation/{name}": value for name, value in report.scalars().items()}
    with closing(Tracker(settings, warn, provenance["mlflow_run_id"])) as tracker:
        tracker.metrics(values, int(provenance["checkpoint_step"]), int(time.time() * 1000))
        tracker.artifact(folder, name)
