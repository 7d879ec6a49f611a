"""Where a data set lies: a folder, and its files by name. Runs without torch."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from trainer.errors import UserError


class Store(Protocol):
    """The files of one data set. Digests are SHA-256, sizes are in bytes."""

    address: str
    # A folder for what is made once from the shards, such as the indexes of an old data set; None: there is none.
    scratch: Path | None

    def read_bytes(self, name: str) -> bytes:
        """A small file, whole.

        Raises:
            OSError: it cannot be read; FileNotFoundError where there is none.
        """

    def path(self, name: str, size: int | None = None, sha256: str | None = None, url: str | None = None) -> Path:
        """A local path of the file `name`, or of the file at `url` (absolute, or relative to the manifest).

        `size` and `sha256` are what a copy is compared with; the file of a local folder is given out as it is.

        Raises:
            UserError: `url` names a place that cannot be read from.
        """

    def want(self, files: Iterable[tuple[str, int | None, str | None, str | None]]) -> None:
        """Say which files (name, size, sha256, url) are asked for next, so that they may be fetched ahead."""


class LocalStore:
    """A folder on this machine; its files are used where they lie."""

    def __init__(self, folder: Path) -> None:
        self.address = str(folder)
        self.scratch = folder if os.access(folder, os.W_OK) else None
        self._folder = folder

    def read_bytes(self, name: str) -> bytes:
        return (self._folder / name).read_bytes()

    def path(self, name: str, size: int | None = None, sha256: str | None = None, url: str | None = None) -> Path:
        if url is not None and "://" in url:
            raise UserError(f"'{name}' lies at '{url}', and only local files are read; copy it beside the manifest")
        return self._folder / (url or name)

    def want(self, files: Iterable[tuple[str, int | None, str | None, str | None]]) -> None:
        """Nothing to fetch."""


def open_store(address: str | Path) -> Store:
    """The store at an address: a folder."""
    return LocalStore(Path(address))
