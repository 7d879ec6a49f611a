"""`hypersphere losses` and `plot`: the table of losses, and figures of what they do to embeddings."""

import json
import os
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from serving.cli.terminal import out, progress, warn

if TYPE_CHECKING:
    from trainer.figures.draw import Written

plot = typer.Typer(no_args_is_help=True, help="Draw the losses: what they do to embeddings, and their gradients.")

OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder for the figures.")]


def table(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False) -> None:
    """The table of all losses: names for the config, formulas, defaults and sources."""
    from trainer.losses import table as rows_of_all

    rows = rows_of_all()
    if as_json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    shown = Table()
    shown.add_column("name", no_wrap=True)  # what a config asks for: never cut
    for column in ("family", "formula", "defaults", "source"):
        shown.add_column(column, overflow="fold")
    for row in rows:
        defaults = ", ".join(f"{key}={value}" for key, value in row["defaults"].items())
        shown.add_row(row["name"], row["family"], row["formula"], defaults, row["source"])
    out.print(shown)


@plot.command()
def geometry(
    *,
    loss: Annotated[list[str] | None, typer.Option(help="Only this loss; may be repeated.")] = None,
    family: Annotated[
        list[str] | None, typer.Option(help="Only softmax, margin, pair or centre; may be repeated.")
    ] = None,
    dimension: Annotated[list[int] | None, typer.Option(help="2 or 3; may be repeated; default: both.")] = None,
    folder: OutOption = Path("figures"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each loss.")] = 600,
    seed: Annotated[int, typer.Option(min=0, help="Of the split, the first weights and the order.")] = 0,
) -> None:
    """Train 2-D and 3-D embeddings of scikit-learn's digits under each loss, and draw them.

    One figure a family: features, class centres and decision boundaries; with it histograms of the angles. Further
    psi and target-logit curves of all margins, and the table of binary decision boundaries. PDF, PNG, and the numbers
    as JSON. While an MLflow run is active (`MLFLOW_RUN_ID`), all of them are logged to it.

    Example: `hypersphere plot geometry --family margin --dimension 2 --out figures`
    """
    import torch

    from trainer.figures import draw as figures

    names = figures.check_losses(loss or [], family or [])
    torch.set_num_threads(1)  # matrices this small gain nothing from a second thread
    with progress() as show:
        written = figures.geometry(folder, names, dimension or [2, 3], steps=steps, seed=seed, show=show)
    _finish(folder, written)


@plot.command()
def gradients(folder: OutOption = Path("figures")) -> None:
    """Draw dL/dcos(theta) over theta for each margin, from the margins' own targets.

    Example: `hypersphere plot gradients --out figures`
    """
    from trainer.figures import draw as figures

    _finish(folder, figures.gradients(folder))


def _finish(folder: Path, written: "Written") -> None:
    """Name the figures, and log their files, no others of the folder, to the active MLflow run where there is one."""
    for one in written.figures:
        out.print(" ".join(map(str, one.files)))
    out.print(f"captions and numbers are in {folder}")
    if not (run_id := os.environ.get("MLFLOW_RUN_ID")):
        return
    from trainer.tracking import Tracker, TrackingConfig, absolute_uri

    uri = os.environ.get("MLFLOW_TRACKING_URI") or absolute_uri(TrackingConfig().uri, Path.cwd())
    troubles: list[str] = []
    with closing(Tracker(TrackingConfig(uri=uri), troubles.append, run_id)) as tracker:
        for path in written.files:
            tracker.artifact(path, "figures")
    for trouble in troubles:
        warn(trouble)
    if not troubles:
        out.print(f"logged to the MLflow run {run_id}")
