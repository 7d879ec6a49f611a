"""`hypersphere plot`: figures of what the losses do to embeddings, for papers and for MLflow."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from trainer.figures.draw import Written

plot_app = typer.Typer(no_args_is_help=True, help="Draw the losses: what they do to embeddings, and their gradients.")

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)

OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder for the figures.")]


@plot_app.command()
def geometry(
    loss: Annotated[list[str] | None, typer.Option("--loss", help="Only this loss; may be repeated.")] = None,
    family: Annotated[
        list[str] | None, typer.Option("--family", help="Only softmax, margin, pair or centre; may be repeated.")
    ] = None,
    dimension: Annotated[
        list[int] | None, typer.Option("--dimension", help="2 or 3; may be repeated; default: both.")
    ] = None,
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

    from serving.terminal import progress
    from trainer.figures import draw as figures

    names = figures.check_losses(loss or [], family or [])
    torch.set_num_threads(1)  # matrices this small gain nothing from a second thread
    with progress(out) as show:
        written = figures.geometry(folder, names, dimension or [2, 3], steps=steps, seed=seed, show=show)
    _finish(folder, written)


@plot_app.command()
def gradients(folder: OutOption = Path("figures")) -> None:
    """Draw dL/dcos(theta) over theta for each margin, from the margins' own targets.

    Example: `hypersphere plot gradients --out figures`
    """
    from trainer.figures import draw as figures

    _finish(folder, figures.gradients(folder))


def _finish(folder: Path, written: "Written") -> None:
    for one in written.figures:
        out.print(" ".join(str(path) for path in one.files), highlight=False)
    out.print(f"captions and numbers are in {folder}", highlight=False)
    _track(written.files)


def _track(files: Sequence[Path]) -> None:
    """Log these files, and nothing else of their folder, to the active MLflow run, where there is one."""
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if not run_id:
        return
    from trainer.config import TrackingConfig
    from trainer.tracking import Tracker, absolute_uri

    uri = os.environ.get("MLFLOW_TRACKING_URI") or absolute_uri(TrackingConfig().uri, Path.cwd())
    troubles: list[str] = []
    tracker = Tracker(TrackingConfig(uri=uri), troubles.append, run_id)
    for path in files:
        tracker.artifact(path, "figures")
    tracker.close(None)
    for trouble in troubles:
        err.print(escape(trouble), style="yellow", highlight=False)
    if not troubles:
        out.print(f"logged to the MLflow run {run_id}", highlight=False)
