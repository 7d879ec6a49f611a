"""The command line, `hypersphere`. Each command imports what it needs, so that `--help` and `serve` stay light."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from serving.plot_commands import plot_app
from serving.serve_command import serve
from trainer.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Train embeddings of very many identities, and serve them: **who is this, or is it nobody we know?**\n\n"
    "The order of a first use: `data import`, `train`, `export`, `evaluate`, `calibrate`, `serve`.",
)
data_app = typer.Typer(no_args_is_help=True, help="Turn images into WebDataset shards, and check them.")
app.add_typer(data_app, name="data")
app.add_typer(plot_app, name="plot")

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)

ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file; without it, the defaults.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Override single keys, e.g. `run.epochs=5`."),
]
EmbedderOption = Annotated[Path, typer.Option("--embedder", "-e", help="Folder that `export` wrote.")]
DataOption = Annotated[Path, typer.Option("--data", "-d", help="Folder that `data import` wrote.")]


def main() -> None:
    """Run the command line; input that cannot be used is one line on stderr and exit code 2."""
    try:
        app()
    except UserError as error:
        err.print(f"[bold red]error:[/] {_plain(str(error))}", highlight=False)
        sys.exit(2)


@data_app.command("import")
def data_import(
    source: Annotated[Path | None, typer.Argument(help="Zip or folder; glyphs need none.")] = None,
    *,
    kind: Annotated[Literal["omniglot", "folder", "glyphs"], typer.Option(help="Layout of the source.")],
    out_folder: Annotated[Path, typer.Option("--out", help="New folder for shards and manifest.json.")],
    source_option: Annotated[Path | None, typer.Option("--source", help="The same as the argument SOURCE.")] = None,
    holdout_alphabets: Annotated[
        int | None, typer.Option(help="omniglot: whole alphabets held out for validation.")
    ] = None,
    holdout_share: Annotated[float, typer.Option(help="folder, glyphs: share of the identities held out.")] = 0.1,
    max_bad: Annotated[float, typer.Option(help="Share of unreadable images past which the import fails.")] = 0.01,
    min_samples: Annotated[int, typer.Option(help="Leave out identities with fewer images.")] = 1,
    samples_per_shard: Annotated[int, typer.Option(help="Images in one tar file.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Chooses what is held out, and the order.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Import images as WebDataset shards with a manifest.

    **omniglot**: the official layout, from a zip or folder, from `$OMNIGLOT_ZIP`, or downloaded. Identity = character.
    **folder**: one folder per identity, any format that Pillow reads. **glyphs**: rendered from installed fonts.

    Example: `hypersphere data import faces/ --kind folder --out data/faces --holdout-share 0.1`
    """
    from serving.terminal import progress
    from trainer.data.importers.run import ImportOptions, run_import

    options = ImportOptions(
        holdout_alphabets=holdout_alphabets,
        holdout_share=holdout_share,
        max_bad=max_bad,
        min_samples=min_samples,
        seed=seed,
        samples_per_shard=samples_per_shard,
        overwrite=overwrite,
    )
    with progress(out) as show:
        manifest = run_import(kind, source or source_option, out_folder, options, show)
    for name, split in manifest.splits.items():
        out.print(f"{name}: {split.samples} images of {len(split.classes)} identities in {len(split.shards)} shards")
    for bad in manifest.bad[:20]:
        err.print(f"left out: {_plain(bad.name)}: {_plain(bad.reason)}", highlight=False)
    if manifest.bad:
        err.print(f"{len(manifest.bad)} unreadable images were left out; all are named in {out_folder}/manifest.json")


@data_app.command("verify")
def data_verify(folder: Annotated[Path, typer.Argument(help="Folder that `data import` wrote.")]) -> None:
    """Read every shard again and compare it with the manifest's digests."""
    from serving.terminal import progress
    from trainer.data.index import verify
    from trainer.data.manifest import Manifest

    with progress(out) as show:
        verify(folder, Manifest.read(folder), show)
    out.print(f"{folder}: every shard is as it was written")


@app.command()
def train(
    overrides: Overrides = None,
    config: ConfigOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in run.out.")] = False,
) -> None:
    """Train on Ray workers: on the cluster at `$RAY_ADDRESS` or `scaling.address`, else on this machine.

    Example: `hypersphere train --config configs/demo.yaml run.epochs=3 loss=cosface`
    """
    from serving.commands import train_and_track
    from trainer.config import load
    from trainer.launch import TrainingFailed

    try:
        train_and_track(load(config, overrides), resume, out, err)
    except TrainingFailed as error:
        err.print(f"[bold red]the training failed:[/] {_plain(str(error))}", highlight=False)
        raise typer.Exit(1) from error


@app.command()
def submit(
    overrides: Overrides = None,
    *,
    address: Annotated[str, typer.Option(help="Dashboard of the Ray cluster, http://HEAD:8265.")],
    config: ConfigOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in run.out.")] = False,
    command: Annotated[str, typer.Option(help="The program on the cluster.")] = "hypersphere",
) -> None:
    """Send a training run to a cluster through Ray Jobs, follow its log, and exit with its status.

    Relative paths in the config are taken from this folder, so they must mean the same on the cluster.
    """
    import tempfile

    from serving.commands import resolved
    from trainer.config import load
    from trainer.launch import submit as submit_job

    status = ""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--resume"] if resume else []
        for part in submit_job(address, resolved(load(config, overrides)), command, arguments, Path(folder)):
            if part.startswith("\0"):
                status = part[1:]
            else:
                sys.stdout.write(part)
                sys.stdout.flush()
    out.print(f"job {status}")
    raise typer.Exit(0 if status == "SUCCEEDED" else 1)


@app.command()
def export(
    run: Annotated[Path, typer.Option("--run", "-r", help="The run's folder (run.out), or one checkpoint's.")],
    to: Annotated[Path | None, typer.Option("--out", "-o", help="New folder; default RUN/embedder.")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Data set for the parity check; default: the run's.")
    ] = None,
    register: Annotated[bool, typer.Option(help="Register it in MLflow with the alias champion.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Write the Embedder (ONNX and manifest) of a checkpoint, and check it against torch on real images."""
    from serving.commands import export_run

    manifest = export_run(run, to or run / "embedder", data, register, overwrite, err)
    out.print(f"embedder {manifest.model_id}: {manifest.dimension} dimensions, in {to or run / 'embedder'}")


@app.command()
def evaluate(
    embedder: EmbedderOption,
    data: DataOption,
    split: Annotated[str, typer.Option(help="Split to evaluate on.")] = "val",
    to: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for report.json and plots.")] = None,
    unenrolled: Annotated[float, typer.Option(help="Share of the identities not enrolled, for open-set errors.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Chooses who is not enrolled.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads of the model.")] = 2,
) -> None:
    """Measure an Embedder: verification, one-shot identification, and open-set errors; as text, JSON and plots."""
    from serving.commands import evaluate_embedder

    evaluate_embedder(embedder, data, split, to or embedder / "evaluation", unenrolled, seed, threads, out, err)


@app.command()
def calibrate(
    embedder: EmbedderOption,
    data: DataOption,
    split: Annotated[str, typer.Option(help="Split to calibrate on: identities that were not trained on.")] = "val",
    fpir: Annotated[float, typer.Option(help="Allowed share of strangers' searches that return somebody.")] = 0.01,
    fmr: Annotated[float, typer.Option(help="Allowed share of false matches in 1:1 verification.")] = 0.001,
    gallery_size: Annotated[
        int | None, typer.Option(help="Subjects in the gallery; default: those of the split.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads of the model.")] = 2,
) -> None:
    """Choose the thresholds for the error rates that you allow, and write them into the Embedder's manifest."""
    from serving.commands import calibrate_embedder

    calibrate_embedder(embedder, data, split, fpir, fmr, gallery_size, seed, threads, out)


app.command()(serve)


@app.command()
def losses(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False) -> None:
    """The table of all losses: names for the config, formulas, defaults and sources."""
    from serving.terminal import losses_table
    from trainer.losses import table

    if as_json:
        import json

        sys.stdout.write(json.dumps(table(), indent=1, ensure_ascii=False) + "\n")
    else:
        out.print(losses_table(table()))


def _plain(text: Any) -> str:
    from rich.markup import escape

    return escape(str(text))


if __name__ == "__main__":
    main()
