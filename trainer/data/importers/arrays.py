"""Import of vectors and spectrograms, from a .npy file with labels in another, or from a Parquet file."""

import os
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data.arrays import NOT_NPY, as_payload, content_of_shape
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
from trainer.data.importers.table import Nested, Table
from trainer.errors import UserError

_MAX_HEADER = 10_000  # bytes of a .npy file's header, which is parsed as Python


def list_arrays(source: str | None, options: ImportOptions, progress: Progress) -> Listing:
    """A row is a sample: [samples, dimension] are vectors, [samples, frequency, time] spectrograms.

    Args:
        source: a .npy file, whose labels are in the file `options.labels` (.npy, or a CSV or Parquet table with a
            column `label`, perhaps `split`, and attributes); or a .parquet file with these columns and one of lists.

    Raises:
        UserError: a file cannot be read or has another form; and from the entries: a row has no label.
    """
    if source is None or not os.path.isfile(source):
        raise UserError(f"SOURCE '{source or ''}' is not a file; give a .npy or .parquet file on this machine")
    if source.lower().endswith(".parquet"):
        if options.labels is not None:
            raise UserError(
                f"--labels {options.labels} is for .npy files; those of '{source}' are in its column 'label'"
            )
        table = Table(source)
        nested = Nested(table)
        listing = _listing(source, _labels_in(table, nested.column), nested.shape, nested.rows, options)
        listing.prepare = partial(_copy, nested)
        return listing
    rows = open_rows(source)
    if rows.dtype.kind not in "iuf":
        raise UserError(f"'{source}' holds {rows.dtype}; save the samples as an array of real numbers")
    if options.labels is None:
        raise UserError(f"'{source}' has no labels; name the file that holds them, .npy or .csv, with --labels")
    labels = _labels_of(options.labels) if _is_npy(options.labels) else _labels_in(Table(options.labels), None)
    return _listing(source, labels, rows.shape[1:], len(rows), options)


def read_arrays(source: str, options: ImportOptions) -> Read:
    """A place is the number of a row in a .npy file."""
    rows = open_rows(source)
    return lambda place: as_payload(rows[int(place)])


IMPORTER = Importer(list_arrays, read_arrays)


def open_rows(path: str) -> NDArray[Any]:
    """The rows of a .npy file, memory-mapped.

    Raises:
        UserError: it is not a .npy file with rows, or is cut off.
    """
    try:
        with warnings.catch_warnings(action="error"):
            rows: NDArray[Any] = np.lib.format.open_memmap(path, mode="r", max_header_size=_MAX_HEADER)
    except (OSError, *NOT_NPY) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"'{path}' is not a whole .npy file ({reason}); save it anew, numbers only") from error
    if rows.ndim < 1 or not len(rows):
        raise UserError(f"'{path}' has no rows; save one array with a row for each sample")
    return rows


class _Label(NamedTuple):
    label: object
    split: str | None = None
    attributes: dict[str, Any] | None = None


class _Labels(NamedTuple):
    """What stands beside the rows, in their order; `file` names it in messages."""

    rows: Iterable[_Label]
    file: str
    attributes: dict[str, str]


def _is_npy(path: str) -> bool:
    return path.lower().endswith(".npy")


def _labels_of(path: str) -> _Labels:
    labels = open_rows(path)
    if labels.ndim != 1 or labels.dtype.kind not in "iufUS":
        raise UserError(
            f"'{path}' holds {labels.dtype} of shape {labels.shape}; save labels as one row of numbers or text"
        )
    return _Labels(map(_Label, _values(labels)), path, {})


def _values(labels: NDArray[Any]) -> Iterator[object]:
    for start in range(0, len(labels), 10_000):  # few at a time: Python's values are larger
        for value in labels[start : start + 10_000].tolist():
            yield value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value


def _labels_in(table: Table, rows_column: str | None) -> _Labels:
    table.check_has("label")
    table.check_text("split")
    names = table.attributes(without=("label", "split", rows_column))
    columns = [name for name in ("label", "split", *names) if name in table.schema.names]

    def rows() -> Iterator[_Label]:
        for batch in table.batches(columns):
            values = {name: batch.column(name).to_pylist() for name in columns}
            splits = values.get("split", [None] * len(batch))
            for i, (label, split) in enumerate(zip(values["label"], splits, strict=True)):
                yield _Label(label, split or None, {name: values[name][i] for name in names} or None)

    return _Labels(rows(), table.shown, names)


def _listing(source: str, labels: _Labels, shape: tuple[int, ...], rows: int, options: ImportOptions) -> Listing:
    return Listing(
        entries=_entries(source, labels, rows),
        source=os.path.abspath(source),
        provenance={
            "source": os.path.basename(source),
        },
        content=content_of_shape(shape),
        shape=shape,
        attributes=labels.attributes,
    )


def _entries(source: str, labels: _Labels, rows: int) -> Iterator[Entry]:
    stamp = str(os.stat(source).st_mtime_ns)
    name = Path(source).stem
    for row, label in zip_longest(range(rows), labels.rows):
        if row is None or label is None:
            more = "more" if row is None else f"{row}, fewer"
            raise UserError(f"'{source}' has {rows} rows, but '{labels.file}' has {more}; give one label for each row")
        try:
            identity = identity_of(label.label)
        except WrongLabel as error:
            raise UserError(f"row {row} of '{labels.file}' has {error}; give it one, or leave the row out") from error
        yield Entry(identity, f"{name}/{row}", str(row), label.split, label.attributes, stamp=stamp)


def _copy(nested: Nested, folder: Path) -> str:
    path = folder / "rows.npy"
    nested.copy(path)
    return str(path)
