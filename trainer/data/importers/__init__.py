"""Importers: each hands over a Source, a list of samples and how to read one."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.data.image import read_file
from trainer.errors import UserError

_LITTER = {"thumbs.db", "desktop.ini", "__macosx"}  # what file managers leave behind


@dataclass(frozen=True, slots=True)
class Sample:
    """`identity` is the class, `name` tells a person where the image came from; a pair occurs once."""

    identity: str
    name: str


@dataclass(frozen=True, slots=True)
class Source:
    """Images to be imported.

    Attributes:
        samples: in an order that depends on the input alone.
        read: the file of `samples[i]`, in any format that `trainer.data.image` reads; called from several threads.
        held_out: identities of the validation split.
        provenance: for the manifest; nothing that changes from one run to the next.
        drop_duplicates: leave out files that are byte for byte an earlier one of the same identity.
    """

    samples: Sequence[Sample]
    read: Callable[[int], bytes]
    held_out: frozenset[str]
    provenance: dict[str, str]
    drop_duplicates: bool = False


def hold_out_share(identities: list[str], share: float, seed: int) -> frozenset[str]:
    """Choose `share` (0 to 1) of the identities, rounded, by the seed, so that neither split has just one identity.

    A split of one identity teaches and measures nothing: so at least two are held out and two are left, and of fewer
    than four none is held out. A share of 0 holds out none, one of 1 all.
    """
    total = len(identities)
    count = round(share * total)
    if 0 < share < 1:
        count = min(max(2, count), total - 2) if total >= 4 else 0
    return frozenset(choose(identities, count, seed))


def choose(names: list[str], count: int, seed: int) -> list[str]:
    """`count` of the names, by the seed; independent of the order in which the names come."""
    ordered = sorted(names)
    picked = np.random.default_rng([seed, 0x401D]).permutation(len(ordered))[:count]
    return sorted(ordered[i] for i in picked)


@contextmanager
def open_folder(source: Path | None, holdout_share: float, seed: int) -> Iterator[Source]:
    """The plainest importer: every folder below `source` that holds files is an identity, named by its path.

    Hidden files and the litter of file managers are passed over; folders without files are no identities; a file that
    is byte for byte another one of the same identity is left out. Links to files are followed, links to folders not.

    Raises:
        UserError: `source` is not a folder, holds files directly, or no images.
    """
    if source is None or not source.is_dir():
        raise UserError(f"SOURCE '{source or ''}' is not a folder; give one that holds a folder of images per identity")
    samples, paths = [], []
    for path in _files(source):
        relative = path.relative_to(source)
        samples.append(Sample(_text(relative.parent), _text(relative)))
        paths.append(path)
    if not samples:
        raise UserError(f"SOURCE '{source}' holds no files; give a folder that holds a folder of images per identity")
    yield Source(
        samples=samples,
        read=lambda row: read_file(paths[row], samples[row].name),
        held_out=hold_out_share(list({sample.identity for sample in samples}), holdout_share, seed),
        provenance={"source": source.resolve().name, "held_out": f"{holdout_share:g} of the identities"},
        drop_duplicates=True,
    )


def _files(source: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(source):
        folders[:] = sorted(name for name in folders if not _hidden(name))
        for name in sorted(name for name in names if not _hidden(name)):
            path = Path(folder, name)
            if path.parent == source:
                raise UserError(f"'{path}' lies directly in SOURCE; put every image into the folder of its identity")
            yield path


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _LITTER


def _text(path: Path) -> str:
    """A path as text that every file can hold; bytes that are no UTF-8 are written out as \\xNN."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")
