"""A folder of images: one folder per identity, at any depth."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.data.image import read_file
from trainer.data.importers import Sample, Source, hold_out_share
from trainer.errors import UserError

_LITTER = {"thumbs.db", "desktop.ini", "__macosx"}  # what file managers leave behind


@contextmanager
def open_folder(source: Path | None, holdout_share: float, seed: int) -> Iterator[Source]:
    """Every folder that holds files is an identity, named by its path below `source`.

    Hidden files and the litter of file managers are passed over; folders without files are no identities; a file that
    is byte for byte another one of the same identity is left out. Links to files are followed, links to folders not.

    Raises:
        UserError: `source` is not a folder, holds files directly, or no images.
    """
    if source is None or not source.is_dir():
        raise UserError(f"SOURCE '{source or ''}' is not a folder; give one that holds a folder of images per identity")
    files = list(_files(source))
    if not files:
        raise UserError(f"SOURCE '{source}' holds no files; give a folder that holds a folder of images per identity")
    paths = [path for _, path in files]
    samples = [sample for sample, _ in files]
    identities = sorted({sample.identity for sample in samples})
    held_out = hold_out_share(identities, holdout_share, seed)
    yield Source(
        kind="folder",
        samples=samples,
        read=lambda row: read_file(paths[row], samples[row].name),
        held_out=held_out,
        provenance={"source": source.resolve().name, "held_out": f"{holdout_share:g} of the identities"},
        drop_duplicates=True,
    )


def _files(source: Path) -> Iterator[tuple[Sample, Path]]:
    for folder, folders, names in os.walk(source):
        folders[:] = sorted(name for name in folders if not _hidden(name))
        relative = Path(folder).relative_to(source)
        kept = sorted(name for name in names if not _hidden(name))
        if kept and relative == Path("."):
            raise UserError(
                f"'{source / kept[0]}' lies directly in SOURCE; put every image into the folder of its identity"
            )
        for name in kept:
            yield Sample(_text(relative), _text(relative / name)), Path(folder, name)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _LITTER


def _text(path: Path) -> str:
    """A path as text that every file can hold; bytes that are no UTF-8 are written out as \\xNN."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")
