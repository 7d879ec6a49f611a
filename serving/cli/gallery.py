"""`hypersphere gallery`: its file looked after, copied, moved to another model, and brought under another key."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serving.cli.terminal import out, progress, warn

if TYPE_CHECKING:
    from serving.upkeep import Stats

_TOLD = 10  # refusals that are printed

app = typer.Typer(no_args_is_help=True, help="Look after the file of a gallery.")
Store = Annotated[Path, typer.Option("--store", help="SQLite file of the gallery.")]
File = Annotated[Path, typer.Option("--out", "-o", help="New file.")]
Key = Annotated[
    Path | None,
    typer.Option("--encryption-key-file", envvar="HYPERSPHERE_ENCRYPTION_KEY_FILE", help="Of an encrypted gallery."),
]
GALLERY = Path("gallery.sqlite")


@app.command()
def stats(store: Store = GALLERY) -> None:
    """What the gallery holds. The service may be running.

    Example: `hypersphere gallery stats --store faces.sqlite`
    """
    from serving.upkeep import stats as of

    _tell(of(store), store)


@app.command()
def verify(store: Store = GALLERY, key: Key = None) -> None:
    """Read everything and compare it with its checksums. The service must be stopped; its start does the same."""
    from serving.storage.sealing import read_key
    from serving.upkeep import verify as examine

    with progress() as show:
        found = examine(store, lambda done, total: show("reading", done, total), read_key(key))
    _tell(found, store)
    out.print("nothing is wrong")


@app.command()
def backup(to: File, store: Store = GALLERY) -> None:
    """Copy the gallery to a new file, in one state, whole or not at all. The service may be running.

    The copy holds names and vectors, and those that are erased later: protect it, and delete it in time.

    Example: `hypersphere gallery backup --store faces.sqlite --out faces-monday.sqlite`
    """
    from serving.upkeep import backup as copy

    with progress() as show:
        found = copy(store, to, lambda done, total: show("copying", done, total))
    _tell(found, to)


@app.command()
def restore(copy: Annotated[Path, typer.Argument(metavar="BACKUP")], store: Store = GALLERY, key: Key = None) -> None:
    """Make a gallery of a backup. What was changed after it is lost, deletions included: erase those people again.

    Example: `hypersphere gallery restore faces-monday.sqlite --store faces.sqlite`
    """
    from serving.storage.sealing import read_key
    from serving.upkeep import restore as remake

    with progress() as show:
        found = remake(copy, store, lambda done, total: show("copying", done, total), read_key(key))
    _tell(found, store)


@app.command()
def export(to: File, store: Store = GALLERY, key: Key = None) -> None:
    """Write all samples as Parquet: subject, time, embedding, and what came with them. The service may be running.

    The file is not encrypted, whatever the gallery is.

    Example: `hypersphere gallery export --store faces.sqlite --out faces.parquet`
    """
    from serving.storage.sealing import read_key
    from serving.upkeep import export as write

    with progress() as show:
        count = write(store, to, lambda done, total: show("writing", done, total), read_key(key))
    out.print(f"{count} samples in '{to}'")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What export wrote.")],
    store: Store = GALLERY,
    max_samples: Annotated[int, typer.Option(help="Of one subject.", min=1)] = 100,
    key: Key = None,
) -> None:
    """Add the samples of an export, to a new gallery or to one of the same model. The service must be stopped.

    Example: `hypersphere gallery import faces.parquet --store other.sqlite`
    """
    from serving.storage.sealing import read_key
    from serving.upkeep import import_ as read

    with progress() as show:
        found, refused = read(file, store, max_samples, lambda done, total: show("adding", done, total), read_key(key))
    _left_out(refused)
    _tell(found, store)


@app.command()
def migrate(
    to: File,
    embedder: Annotated[Path, typer.Option(help="Folder of the model to move to.")],
    store: Store = GALLERY,
    detector: Annotated[Path | None, typer.Option(help="Folder of a detector, as `serve --detector` takes it.")] = None,
    jobs: Annotated[int, typer.Option(help="Images that are decoded at the same time.", min=1, max=256)] = 2,
    key: Key = None,
) -> None:
    """Fill a new gallery, of another model, from the images that `serve --keep-images` kept. The service may run on.

    The old gallery stays as it is. Samples without an image are left out, and told.

    Example: `hypersphere gallery migrate --store faces.sqlite --embedder runs/b/embedder --out faces-b.sqlite`
    """
    from serving.moving import migrate as move
    from serving.storage.sealing import read_key

    with progress() as show:
        found, refused = move(
            store, embedder, to, jobs, lambda done, total: show("embedding", done, total), detector, read_key(key)
        )
    _left_out(refused)
    _tell(found, to)


def _left_out(refused: list[str]) -> None:
    for text in refused[:_TOLD]:
        warn(text)
    if refused:
        warn(f"{len(refused)} samples were left out")


@app.command()
def key(to: File) -> None:
    """Make the key of an encrypted gallery: `serve --encryption-key-file` makes the gallery under it.

    Keep a copy elsewhere than the backups: without the key the gallery cannot be read.
    """
    from serving.storage.sealing import make_key

    make_key(to)
    out.print(f"a new key in '{to}'")


@app.command()
def rekey(
    new: Annotated[Path, typer.Argument(metavar="FILE", help="What `hypersphere gallery key` made.")],
    store: Store = GALLERY,
    key: Key = None,
) -> None:
    """Bring an encrypted gallery under another key, at once or not at all. The service must be stopped.

    Example: `hypersphere gallery rekey new.key --store faces.sqlite --encryption-key-file old.key`
    """
    from serving.storage.sealing import needed_key
    from serving.upkeep import change_key

    count = change_key(store, needed_key(key), needed_key(new))
    out.print(f"the keys of {count} subjects are under the key of '{new}'")


def _tell(found: "Stats", path: Path) -> None:
    out.print(f"{path}: {found.subjects} subjects with {found.samples} samples, {found.bytes / 1e6:.1f} MB")
    out.print(f"samples of a subject: median {found.median:g}, most {found.most}; with their image: {found.images}")
    out.print(f"places of erased samples: {found.free}")
    out.print(f"model {found.model_id}, dimension {found.dimension}, {found.revision} changes")
