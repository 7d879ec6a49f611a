"""A folder by its address, on a disk or in a bucket: its files are read, written whole or not at all, and removed."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote, urlsplit

from trainer.atomic import fresh_file, sync
from trainer.data import remote

Bytes = bytes | memoryview


@dataclass(frozen=True)
class Folder:
    """A folder that need not be there yet. Names of files are relative to it and may go through further folders.

    Nothing is ever renamed, which a bucket cannot do: what consists of several files is there when its last one is.

    On a disk what fails is an OSError; in a bucket a UserError, after patient tries (see `data.remote`).

    Attributes:
        address: a Path on a disk, a str in a bucket.
    """

    address: Path | str

    @classmethod
    def at(cls, address: Path | str) -> "Folder":
        """The folder of an address such as `runs/one`, `file:///runs/one` or `s3://bucket/one`."""
        text = remote.text_of(address)
        if text.startswith("file://"):
            return cls(Path(unquote(urlsplit(text).path)))
        return cls(text.rstrip("/") if remote.is_remote(text) else Path(text))

    def __truediv__(self, name: str) -> "Folder":
        address = self.address
        return Folder(address / name if isinstance(address, Path) else remote.join(address, name))

    def __str__(self) -> str:
        """For messages: without user, password and query."""
        return remote.shown(self.address)

    @property
    def name(self) -> str:
        """Its own, without the folders that it is in."""
        return str(self).rpartition("/")[2]

    def read(self, name: str) -> bytes:
        """A file's content; FileNotFoundError where there is none."""
        address = self.address
        if isinstance(address, Path):
            return (address / name).read_bytes()
        try:
            return remote.get(remote.join(address, name))
        except remote.NotThere as error:
            raise FileNotFoundError(2, str(error), f"{self}/{name}") from None

    def write(self, name: str, pieces: str | Sequence[Bytes]) -> None:
        """Write a file, in place of one that is there; text as UTF-8, or bytes in pieces, one after the other."""
        pieces = [pieces.encode()] if isinstance(pieces, str) else pieces
        address = self.address
        if not isinstance(address, Path):
            remote.put(remote.join(address, name), b"".join(pieces))
            return
        path = address / name
        _make(path.parent)
        with fresh_file(path) as file:
            for piece in pieces:
                file.write(piece)

    def sizes(self) -> dict[str, int]:
        """The bytes of all files in it, also in folders below; none, where there is no such folder."""
        address = self.address
        if not isinstance(address, Path):
            return remote.below(address)
        found = {}
        for parent, _, names in os.walk(address):
            for path in (Path(parent, name) for name in names):
                with suppress(FileNotFoundError):  # it went in the meantime
                    found[path.relative_to(address).as_posix()] = path.lstat().st_size
        return found

    def remove(self, names: Iterable[str]) -> None:
        """Remove these files in their order, and folders below that are empty then; those that are gone, too."""
        address = self.address
        for name in names:
            if not isinstance(address, Path):
                remote.remove(remote.join(address, name))
                continue
            (address / name).unlink(missing_ok=True)
            for parent in list((address / name).relative_to(address).parents)[:-1]:
                with suppress(OSError):  # it is not empty
                    (address / parent).rmdir()


@contextmanager
def written_here(folder: Folder, last: str) -> Iterator[Path]:
    """A folder on this machine to write into: `folder` itself on a disk; else another, of which the bucket has all
    files, and no others, when the block ends without an exception.

    Args:
        last: the file that makes the folder what it is: it goes first and comes last.
    """
    if isinstance(folder.address, Path):
        yield folder.address
        return
    with TemporaryDirectory() as scratch:
        yield (here := Path(scratch) / folder.name)
        fresh = Folder(here)
        folder.remove([last])
        for name in sorted(fresh.sizes(), key=lambda name: (name == last, name)):
            folder.write(name, [fresh.read(name)])
        folder.remove(folder.sizes().keys() - fresh.sizes().keys())


def _make(folder: Path) -> None:
    """With the folders that it is in, all of them on the disk when this returns."""
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)
