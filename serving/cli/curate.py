"""`hypersphere data check`, `merge`, `split`, `clean`: data sets looked after, without rewriting a shard."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from serving.cli.terminal import err, out, progress, warn
from trainer.errors import UserError

if TYPE_CHECKING:
    from trainer.data.curate.check import Check
    from trainer.data.manifest import Manifest

_TOLD = 20  # faults that are printed; check.json has all
_BAR = 40  # characters of the longest bar

Set = Annotated[str, typer.Argument(metavar="SET", help="Folder or address of a data set.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="New folder; its shards stay where they are.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")]
SplitName = Annotated[str, typer.Option(help="The split that is worked on; the others stay as they are.")]


def check(
    data: Set,
    *,
    to: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the report; default SET-check.")] = None,
    distance: Annotated[int, typer.Option(help="Bits of 256 in which near duplicates may differ, up to 12.")] = 12,
    jobs: Annotated[int | None, typer.Option(help="Processes that decode; default: one a core.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Chooses the samples that are drawn.")] = 0,
) -> None:
    """Examine a data set: every digest, count and image, the balance, and images that occur twice.

    **Wrong** (exit code 1): a file that is not as it was written, a sample that cannot be decoded, and the same file in
    two identities or in two splits. **For you to judge**: near duplicates in two identities or splits, found by a
    perceptual hash. The report has check.json, duplicates.csv and two sheets, samples.png and duplicates.png.

    Example: `hypersphere data check data/faces --out faces-report`
    """
    from trainer.data.curate.check import check as examine
    from trainer.data.curate.report import write_report
    from trainer.data.remote import shown

    with progress() as show:
        found = examine(data, distance=distance, jobs=jobs, progress=show)
    for name in found.balance:
        _print_balance(found, name)
    for fault in found.faults[:_TOLD]:
        err.print(f"wrong: {fault}")
    files = write_report(found, to or _beside(shown(data)), seed)
    out.print(f"equal files: {len(found.equal)} pairs in two identities or splits, {found.equal_within} inside one")
    out.print(f"near duplicates: {len(found.near)} pairs in two identities or splits, {found.near_within} inside one")
    out.print(f"written: {', '.join(map(str, files))}")
    if found.wrong:
        warn(f"{shown(data)}: {len(found.faults)} faults, {len(found.equal)} equal files in two identities or splits")
        raise typer.Exit(1)
    out.print(f"{shown(data)}: nothing is wrong")


def merge(
    data: Annotated[list[str], typer.Argument(metavar="SET SET...", help="Two data sets or more.")],
    *,
    to: Out,
    identities: Annotated[
        Literal["disjoint", "shared"],
        typer.Option(help="Are identities of one name different persons, who must not occur, or the same?"),
    ] = "disjoint",
    prefix: Annotated[bool, typer.Option("--prefix", help="Put the set's name before each identity's.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Join data sets into one: splits of one name are put together.

    Nothing is copied: OUT has a manifest, indexes and tables, and points to the sets' shards. Identities of the first
    set keep their labels.

    Example: `hypersphere data merge data/studio data/street --out data/both --identities shared`
    """
    from trainer.data.curate.merge import merge as join

    _print_splits(join(data, to, shared=identities == "shared", prefix=prefix, overwrite=overwrite), to)


def split(
    data: Set,
    *,
    to: Out,
    by: Annotated[str, typer.Option(help="identity, sample, or the name of an attribute.")] = "identity",
    holdout: Annotated[float, typer.Option(help="Share that is held out, between 0 and 1.")] = 0.1,
    values: Annotated[str, typer.Option(help="Values of the attribute to hold out, with commas; else drawn.")] = "",
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    of: Annotated[str, typer.Option("--split", help="The split that is drawn from.")] = "train",
    into: Annotated[str, typer.Option(help="Name of the new split.")] = "val",
    overwrite: Overwrite = False,
) -> None:
    """Hold out part of a split as a new split.

    By **identity**: whole identities, to measure on persons who were not trained on. By **sample**: some samples of
    each identity. By an **attribute**, such as the camera: all samples with one value go to one side. Nothing is
    copied.

    Example: `hypersphere data split data/faces --out data/faces-drawn --holdout 0.1 --by identity --into test`
    """
    from trainer.data.curate.holdout import hold_out

    named = [value.strip() for value in values.split(",") if value.strip()]
    manifest = hold_out(
        data, to, by=by, share=holdout, values=named, seed=seed, split=of, into=into, overwrite=overwrite
    )
    _print_splits(manifest, to)


def clean(
    data: Set,
    *,
    to: Out,
    embedder: Annotated[Path | None, typer.Option("--embedder", "-e", help="Folder that `export` wrote.")] = None,
    lists: Annotated[Path | None, typer.Option(help="Instead: OUT of an earlier call, its lists edited.")] = None,
    of: Annotated[str, typer.Option("--split", help="The split that is cleaned.")] = "train",
    distance: Annotated[float, typer.Option(help="Robust standard deviations that make a suspect.")] = 5.0,
    alike: Annotated[float, typer.Option(help="Similarity of classes that may be one person; 1: as one is.")] = 0.9,
    join: Annotated[bool, typer.Option("--join", help="Make the listed pairs of classes one identity each.")] = False,
    threads: Annotated[int, typer.Option(help="CPU threads of the model.")] = 2,
    overwrite: Overwrite = False,
) -> None:
    """Leave out samples whose label is likely wrong, and list classes that are likely one person.

    A suspect is far from the other samples of its identity, for that identity, and nearer to another one. OUT has a
    manifest without the suspects, suspects.csv and twins.csv with the most likely first, and a sheet of each. Nothing
    is copied. Look at the sheets, take lines out of the lists that are right after all, and call again with `--lists`.

    Examples: `hypersphere data clean data/faces --embedder runs/one/embedder --out data/faces-clean`,
    then `hypersphere data clean data/faces --lists data/faces-clean --out data/faces-final --join`
    """
    from trainer.data.curate.clean import clean as search
    from trainer.data.curate.clean import clean_by_lists
    from trainer.data.manifest import Manifest

    if lists is not None and embedder is None:
        found = clean_by_lists(data, lists, to, split=of, join=join, overwrite=overwrite)
    elif embedder is not None and lists is None:
        from trainer.assess import embed_split
        from trainer.data.curate.view import keep
        from trainer.embedder import Embedder

        keep(to, [embedder])
        opened = Embedder.open(embedder, threads)
        with progress() as show:
            found = search(
                data, to, lambda part: embed_split(opened, part, show), split=of, deviations=distance, alike=alike,
                join=join, overwrite=overwrite, progress=show,
            )  # fmt: skip
    else:
        raise UserError("data clean needs either --embedder, to search with, or --lists, to go by; give one of them")
    what = "made one identity each" if join else "listed (--join makes each one identity)"
    out.print(f"{len(found.suspects)} samples left out; {len(found.twins)} pairs of classes {what}")
    _print_splits(Manifest.read(to), to)


def _beside(data: str) -> Path:
    """Where the report of a set goes: beside a folder; here, where the set is far away."""
    name = data.rstrip("/")
    return Path(f"{name.rpartition('/')[2] if '://' in name else os.path.abspath(name)}-check")


def _print_splits(manifest: "Manifest", folder: Path) -> None:
    for name, entry in manifest.splits.items():
        out.print(f"{name}: {entry.samples} samples of {entry.identities} identities in {len(entry.shards)} shards")
    out.print(f"written: {folder}")


def _print_balance(found: "Check", split: str) -> None:
    """A histogram of samples per identity."""
    balance = found.balance[split]
    out.print(
        f"{split}: {balance.samples} samples of {balance.identities} identities; "
        f"{balance.fewest} to {balance.most} each, {balance.median:g} in the median"
    )
    longest = max(number for _, _, number in balance.bins)
    for low, high, number in balance.bins:
        if high < balance.fewest:
            continue
        span = str(low) if low == high else f"{low}-{high}"
        out.print(f"{span:>15} {'█' * -(-number * _BAR // longest)} {number}")
