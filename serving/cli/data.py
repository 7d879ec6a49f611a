"""`hypersphere data`: images to WebDataset shards, and shards checked."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serving.cli import curate
from serving.cli.embedder import ConfigOption, Overrides
from serving.cli.terminal import err, out, progress
from trainer.errors import UserError

if TYPE_CHECKING:
    from trainer.data.manifest import Manifest

app = typer.Typer(no_args_is_help=True, help="Turn images into WebDataset shards, and check them.")


def _source_is_an_argument(value: str | None) -> None:
    if value is not None:
        raise UserError(f"--source is no option: write the source as a word, 'hypersphere data import {value} ...'")


@app.command("import")
def import_(
    source: Annotated[str | None, typer.Argument(help="Folder, file or address; glyphs and speech need none.")] = None,
    *,
    kind: Annotated[str, typer.Option(help="folder, list, tars, recordio, arrays, speech, omniglot or glyphs.")],
    to: Annotated[str, typer.Option("--out", help="New folder on this machine for shards and manifest.json.")],
    holdout_alphabets: Annotated[int | None, typer.Option(help="omniglot: whole alphabets held out.")] = None,
    holdout_share: Annotated[float, typer.Option(help="Share of the identities held out (not of omniglot).")] = 0.1,
    max_bad: Annotated[float, typer.Option(help="Share of unreadable images past which the import fails.")] = 0.01,
    min_samples: Annotated[int, typer.Option(help="Leave out identities with fewer images.")] = 1,
    samples_per_shard: Annotated[int, typer.Option(help="Images in one tar file; fewer where they exceed 1 GiB.")] = (
        10_000
    ),
    max_side: Annotated[int | None, typer.Option(help="Store larger images with this many pixels a side.")] = None,
    check: Annotated[bool, typer.Option(help="Decode every image, to leave out those that are damaged.")] = True,
    jobs: Annotated[int | None, typer.Option(help="Processes that write shards; by default one a core.")] = None,
    label_field: Annotated[str, typer.Option(help="tars: the field of .json with the label, instead of .cls.")] = "cls",
    labels: Annotated[str | None, typer.Option(help="arrays: file with a label for each row, .npy or .csv.")] = None,
    detector: Annotated[str | None, typer.Option(help="Folder: store the largest face of each image, aligned.")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="tars: index them where they lie, copy none.")] = False,
    seed: Annotated[int, typer.Option(help="Chooses what is held out, and the order.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    _: Annotated[str | None, typer.Option("--source", hidden=True, callback=_source_is_an_argument)] = None,
) -> None:
    """Import images as WebDataset shards with a manifest.

    **folder**: one folder per identity, any format that Pillow reads. **omniglot**: the official layout, from a zip or
    folder, from `$OMNIGLOT_ZIP`, or downloaded; identity = character. **glyphs**: rendered from installed fonts.
    **list**: a CSV or Parquet file with the columns path or url, and label. **tars**: WebDataset tars of others, from
    here or an address. **recordio**: InsightFace's train.rec. **arrays**: vectors or spectrograms in a .npy file (with
    `--labels`) or a Parquet file. **speech**: WAV files in a folder per speaker, as spectrograms; without a source the
    speakers are synthesised by espeak-ng.

    An import that was interrupted goes on where it was when the same command is given again.

    Example: `hypersphere data import faces/ --kind folder --out data/faces --holdout-share 0.1`
    """
    from trainer.data.importers import ImportOptions
    from trainer.data.importers.run import run_import

    options = ImportOptions(
        holdout_alphabets, holdout_share, max_bad, min_samples, seed, samples_per_shard, overwrite,
        jobs=jobs, check=check, max_side=max_side, label_field=label_field, labels=labels, in_place=in_place,
        detector=detector,
    )  # fmt: skip
    with progress() as show:
        manifest = run_import(kind, source, to, options, show)
    _tell(manifest, to)


def _tell(manifest: "Manifest", to: str) -> None:
    for name, split in manifest.splits.items():
        out.print(f"{name}: {split.samples} samples of {split.identities} identities in {len(split.shards)} shards")
    for bad in manifest.bad[:20]:
        err.print(f"left out: {bad.name}: {bad.reason}")
    if manifest.bad:
        err.print(f"{len(manifest.bad)} were left out; all are named in {to}/manifest.json")
    if shared := manifest.provenance.get("images_of_several_identities"):
        err.print(f"images that several identities have: {shared}")


@app.command()
def verify(data: curate.Set) -> None:
    """Read every shard, index and table again and compare them with the manifest's digests."""
    from trainer.data.manifest import Manifest
    from trainer.data.remote import shown
    from trainer.data.verify import verify as verify_files

    with progress() as show:
        verify_files(Manifest.read(data), show)
    out.print(f"{shown(data)}: every shard is as it was written")


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
