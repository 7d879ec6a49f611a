"""Import from a list, CSV or Parquet: `path` or `url`, `label`, perhaps `split`; other columns are attributes."""

import os
import stat
from array import array
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from trainer.data.image import MAX_BYTES
from trainer.data.importers import (
    Entry,
    Importer,
    ImportOptions,
    Listing,
    Progress,
    Read,
    WrongLabel,
    identity_of,
)
from trainer.data.importers.folder import read_regular, text
from trainer.data.importers.table import Table
from trainer.data.remote import fetch_small, is_remote, join, shown
from trainer.errors import UserError

_NAMED = 20  # missing files that a message names
_CONNECTIONS = 16  # that each process reads addresses with


def list_list(source: str | None, options: ImportOptions, progress: Progress) -> Listing:
    """An identity is a label. Paths that are not absolute start at the list's folder.

    Args:
        source: a .csv, .tsv or .parquet file, here or at any fsspec address; its columns have names. Of `path` and
            `url` the first is used; both may hold paths and addresses. Attributes of a CSV file are text.

    Raises:
        UserError: the list cannot be read or lacks a column; and from its entries: a row has no label or path, two rows
            name one file, or files are missing, and then the message names them, up to a limit.
    """
    table = Table(source or "")
    where = "url" if "url" in table.schema.names and "path" not in table.schema.names else "path"
    table.check_has(where)
    table.check_has("label")
    table.check_text(where, "split")
    listing = Listing(
        entries=(),
        source=table.address,
        provenance={
            "source": os.path.basename(table.shown),
        },
        attributes=table.attributes(without=(where, "label", "split")),
    )
    listing.entries = _entries(table, where, listing)
    return listing


def read_list(source: str, options: ImportOptions) -> Read:
    """A place is a path or an address, as it stands in the list."""

    def read(place: str) -> bytes:
        path = _resolve(place, source)
        return fetch_small(path, MAX_BYTES) if is_remote(path) else read_regular(path, text(place))

    return read


IMPORTER = Importer(list_list, read_list)


def _resolve(place: str, source: str) -> str:
    if is_remote(place):
        return place
    if is_remote(source):
        return join(source, f"../{place}")
    return os.path.join(os.path.dirname(source), place)


def _same(place: str) -> str:
    """The same for places that are written differently but name one file, such as a.jpg and ./a.jpg."""
    return place if is_remote(place) else str(PurePosixPath(place))


def _entries(table: Table, where: str, listing: Listing) -> Iterator[Entry]:
    checks = _Checks(table.shown)
    for row in _rows(table, where, list(listing.attributes)):
        if not row.place:
            raise UserError(f"row {row.number} of '{table.shown}' has no {where}; fill it in, or leave the row out")
        try:
            identity = identity_of(row.label)
        except WrongLabel as error:
            raise UserError(
                f"row {row.number} of '{table.shown}' ('{shown(row.place)}') has {error}; give it one, or leave it out"
            ) from error
        checks.count(_same(row.place))
        entry = Entry(identity, text(shown(row.place)), row.place, row.split or None, row.attributes)
        path = _resolve(row.place, table.address)
        if is_remote(path):
            listing.threads = _CONNECTIONS
            yield entry
        elif status := checks.status(path, row.place):
            yield entry._replace(size=status.st_size, stamp=str(status.st_mtime_ns))
    checks.finish(table, where)


class _Row(NamedTuple):
    number: int
    place: str | None
    label: object
    split: str | None
    attributes: dict[str, str | int | float | bool | None] | None


def _rows(table: Table, where: str, attributes: list[str]) -> Iterator[_Row]:
    """The rows, numbered from 1 after the line with the names."""
    split = "split" if "split" in table.schema.names else None
    number = 0
    for batch in table.batches([where, "label", *([split] if split else []), *attributes]):
        columns = {name: batch.column(name).to_pylist() for name in batch.schema.names}
        for i, (place, label) in enumerate(zip(columns[where], columns["label"], strict=True)):
            number += 1
            values = {name: columns[name][i] for name in attributes} or None
            yield _Row(number, place, label, columns[split][i] if split else None, values)


class _Checks:
    """What can only be said when the whole list is read: missing files, and files that are listed twice."""

    def __init__(self, table: str) -> None:
        self._table = table
        self._hashes = array("q")  # of the files: 8 bytes a row
        self._missing: list[str] = []
        self._missing_count = 0

    def count(self, file: str) -> None:
        self._hashes.append(hash(file))

    def status(self, path: str, place: str) -> os.stat_result | None:
        """Of a plain file; anything else is noted as missing."""
        try:
            status = os.stat(path)
            if stat.S_ISREG(status.st_mode):
                return status
        except (OSError, ValueError):  # ValueError: a NUL in the path
            pass
        self._missing_count += 1
        if len(self._missing) < _NAMED:
            self._missing.append(text(place))
        return None

    def finish(self, table: Table, where: str) -> None:
        """Raise what was found."""
        if self._missing_count:
            more = self._missing_count - len(self._missing)
            raise UserError(
                f"{self._missing_count} of {len(self._hashes)} files in '{self._table}' are missing or no plain files: "
                f"{', '.join(self._missing)}{f' and {more} more' if more else ''}; paths start at the list's folder"
            )
        hashes = np.sort(np.frombuffer(self._hashes, np.int64))
        suspects = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
        if suspects:
            self._name_the_first(table, where, suspects)

    def _name_the_first(self, table: Table, where: str, suspects: set[int]) -> None:
        first: dict[str, _Row] = {}
        for row in _rows(table, where, []):
            if row.place and hash(_same(row.place)) in suspects:
                before = first.setdefault(_same(row.place), row)
                if before is not row:
                    raise UserError(
                        f"rows {before.number} and {row.number} of '{self._table}' name the same file, "
                        f"'{text(shown(row.place))}' (labels '{before.label}' and '{row.label}'); list each file once"
                    )
