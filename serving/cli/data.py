"""`hypersphere data`: images to WebDataset shards, and shards checked."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from serving.cli import curate
from serving.cli.embedder import ConfigOption, Overrides
from serving.cli.terminal import err, out, progress
from trainer.errors import UserError

app = typer.Typer(no_args_is_help=True, help="Turn images into WebDataset shards, and check them.")


def _source_is_an_argument(value: str | None) -> None:
    if value is not None:
        raise UserError(f"--source is no option: write the source as a word, 'hypersphere data import {value} ...'")


@app.command("import")
def import_(
    source: Annotated[Path | None, typer.Argument(help="Zip or folder; glyphs need none.")] = None,
    *,
    kind: Annotated[Literal["omniglot", "folder", "glyphs"], typer.Option(help="Layout of the source.")],
    to: Annotated[Path, typer.Option("--out", help="New folder for shards and manifest.json.")],
    holdout_alphabets: Annotated[int | None, typer.Option(help="omniglot: whole alphabets held out.")] = None,
    holdout_share: Annotated[float, typer.Option(help="folder, glyphs: share of the identities held out.")] = 0.1,
    max_bad: Annotated[float, typer.Option(help="Share of unreadable images past which the import fails.")] = 0.01,
    min_samples: Annotated[int, typer.Option(help="Leave out identities with fewer images.")] = 1,
    samples_per_shard: Annotated[int, typer.Option(help="Images in one tar file.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Chooses what is held out, and the order.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    _: Annotated[str | None, typer.Option("--source", hidden=True, callback=_source_is_an_argument)] = None,
) -> None:
    """Import images as WebDataset shards with a manifest.

    **omniglot**: the official layout, from a zip or folder, from `$OMNIGLOT_ZIP`, or downloaded. Identity = character.
    **folder**: one folder per identity, any format that Pillow reads. **glyphs**: rendered from installed fonts.

    Example: `hypersphere data import faces/ --kind folder --out data/faces --holdout-share 0.1`
    """
    from trainer.data.importers import ImportOptions
    from trainer.data.importers.run import run_import

    options = ImportOptions(holdout_alphabets, holdout_share, max_bad, min_samples, seed, samples_per_shard, overwrite)
    with progress() as show:
        manifest = run_import(kind, source, to, options, show)
    for name, split in manifest.splits.items():
        out.print(f"{name}: {split.samples} images of {split.identities} identities in {len(split.shards)} shards")
    for bad in manifest.bad[:20]:
        err.print(f"left out: {bad.name}: {bad.reason}")
    if manifest.bad:
        err.print(f"{len(manifest.bad)} unreadable images were left out; all are named in {to}/manifest.json")


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="Folder that `data import` wrote.")]) -> None:
    """Read every shard, index and table again and compare them with the manifest's digests."""
    from trainer.data.manifest import Manifest
    from trainer.data.verify import verify as verify_files

    with progress() as show:
        verify_files(Manifest.read(folder), show)
    out.print(f"{folder}: every shard is as it was written")


@app.command()
def preview(
    overrides: Overrides = None,
    *,
    config: ConfigOption = None,
    to: Annotated[Path, typer.Option("--out", "-o", help="PNG file.")] = Path("preview.png"),
    samples: Annotated[int, typer.Option(min=1, max=100, help="Rows of the sheet.")] = 8,
    versions: Annotated[int, typer.Option(min=1, max=20, help="Augmented versions of each sample.")] = 8,
) -> None:
    """Draw what a training run would see: samples as they are read, and as the config augments them.

    Example: `hypersphere data preview --config configs/vit.yaml augment.blur=0.3 --out preview.png`
    """
    from trainer.atomic import write_file
    from trainer.config import load
    from trainer.data.preview import preview as draw

    found = load(config, overrides)
    sheet = draw(found.data, found.augment, found.run.seed, samples=samples, versions=versions)
    try:
        write_file(to, sheet)
    except OSError as error:
        raise UserError(f"'{to}' cannot be written: {error.strerror}; give another --out") from error
    out.print(f"{to}: {samples} samples, each as it is read and in {versions} augmented versions")


for command in (curate.check, curate.merge, curate.split, curate.clean):
    app.command()(command)
