"""`hypersphere train` and `submit`: a training run here or on a cluster."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from serving.cli.terminal import TrainingView, fail, out, warn

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Override single keys, e.g. `run.epochs=5`."),
]
ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file; without it, the defaults.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in run.out.")]


def train(overrides: Overrides = None, config: ConfigOption = None, resume: Resume = False) -> None:
    """Train on Ray workers: on the cluster at `$RAY_ADDRESS` or `scaling.address`, else on this machine.

    Example: `hypersphere train --config configs/demo.yaml run.epochs=3 loss=cosface`
    """
    from trainer.config import load
    from trainer.launch import TrainingFailed
    from trainer.run import start

    try:
        with TrainingView(out) as view:
            folder = start(load(config, overrides), resume, view.record, warn)
    except TrainingFailed as error:
        fail(str(error), "the training failed")
        raise typer.Exit(1) from error
    out.print(f"checkpoints are in {folder / 'checkpoints'}; next: hypersphere export --run {folder}", highlight=False)


def submit(
    overrides: Overrides = None,
    *,
    address: Annotated[str, typer.Option(help="Dashboard of the Ray cluster, http://HEAD:8265.")],
    config: ConfigOption = None,
    resume: Resume = False,
    command: Annotated[str, typer.Option(help="The program on the cluster.")] = "hypersphere",
) -> None:
    """Send a training run to a cluster through Ray Jobs, follow its log, and exit with its status.

    Relative paths in the config are taken from this folder, so they must mean the same on the cluster.
    """
    from trainer.config import load
    from trainer.launch import submit as send
    from trainer.run import resolved

    job = send(address, resolved(load(config, overrides)), command, ["--resume"] if resume else [])
    out.print(f"job {job.identity} is on {address}; stop it with: ray job stop --address {address} {job.identity}")
    for part in job.log():
        sys.stdout.write(part)
        sys.stdout.flush()
    status = job.status()
    out.print(f"job {status}")
    raise typer.Exit(0 if status == "SUCCEEDED" else 1)
