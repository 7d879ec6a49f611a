"""The tables beside a manifest: the classes of a split, and its samples ordered by class. Runs without torch.

Both are memory-mapped, so that all processes of a machine share their pages and opening reads almost nothing. At 10M
identities and 100M samples a classes table takes about 25 bytes a class and its name, by-class positions 8 bytes a
sample.
"""

import hashlib
import json
import mmap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, field_validator

from trainer.atomic import fresh_file
from trainer.data.arrays import NOT_NPY
from trainer.errors import UserError
from trainer.strict import Strict

_REMEDY = "import the data again, or fetch this file anew"
# Rows are looked up here and there. The system would read megabytes around each, and count them to the process:
# 256 places of an 800 MB table took 0.73 s from the disk, and take 0.014 s so.
_LOOKED_UP = mmap.MADV_RANDOM
_CHUNK = 100_000  # names that are turned into text at a time


class TableFile(Strict):
    """A file beside the manifest. `bytes` and `sha256` are of the whole file."""

    file: str
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    _plain = field_validator("file")(lambda value: plain_name(value))

    @classmethod
    def of(cls, path: Path) -> "TableFile":
        """The entry of a finished file."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(file=path.name, bytes=path.stat().st_size, sha256=digest)


def plain_name(value: str) -> str:
    """A manifest's name of a file in its own folder.

    Raises:
        ValueError: it has a folder, or is none.
    """
    if value in ("", ".", "..") or "/" in value or "\0" in value:
        raise ValueError(f"'{value}' must be a plain file name")
    return value


class Classes(Sequence[str]):
    """The identities of a split: `classes[label]` is a name. Names are made into text one by one, as they are asked."""

    def __init__(self, table: pa.Table) -> None:
        self._names = _whole(table["name"])
        if self._names.type not in (pa.string(), pa.large_string()) or self._names.null_count:
            raise TypeError(f"the names are {self._names.type} with {self._names.null_count} gaps, not text")
        self._counts, self._ends, self._by_size = (_values(table[name]) for name in ("samples", "end", "by_size"))

    @classmethod
    def of(cls, names: Sequence[str], counts: Sequence[int]) -> "Classes":
        """Classes in memory."""
        return cls(classes_table(_texts(names), np.array(counts, np.int64)))

    @classmethod
    def open(cls, path: Path) -> "Classes":
        """Map a classes table into memory.

        Raises:
            UserError: it is missing, damaged, or lacks a column.
        """
        try:
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            mapped.madvise(_LOOKED_UP)
            table = pa.ipc.open_file(pa.py_buffer(mapped)).read_all()
            table.validate()
            return cls(table)
        except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
            raise UserError(f"'{path}' is not a table of classes: {error}; {_REMEDY}") from error

    def check(self, where: Path | str, samples: int) -> None:
        """Compare the columns with each other, and with the number of samples of the split. Reads all of the table.

        Raises:
            UserError: names that are not UTF-8, or counts, ends or an order that do not fit together; begins `where`.
        """
        counts, fault = self._counts, ""
        try:
            self._names.validate(full=True)
        except pa.ArrowException as error:
            fault = f"a name that is no text ({error})"
        if len(counts) and not (counts.min() >= 0 and counts.max() <= samples and counts.sum() == samples):
            fault = f"counts that are not those of {samples} samples"
        elif not np.array_equal(self._ends, np.cumsum(counts)):
            fault = "ends that are not the sums of its counts"
        elif not np.array_equal(self._by_size, np.argsort(-counts, kind="stable")):
            fault = "an order by size that is not that of its counts"
        if fault:
            raise UserError(f"'{where}' has {fault}; {_REMEDY}")

    def __len__(self) -> int:
        return len(self._counts)

    @overload
    def __getitem__(self, label: int) -> str: ...
    @overload
    def __getitem__(self, label: slice) -> list[str]: ...
    def __getitem__(self, label: int | slice) -> str | list[str]:
        names = self._names[label] if isinstance(label, slice) else self._names.slice(range(len(self))[label], 1)
        try:
            names.validate(full=True)  # of these alone: Arrow believes a file that its names lie inside of it
        except pa.ArrowException as error:
            raise UserError(f"a table of classes has names that are no text ({error}); {_REMEDY}") from error
        found: list[str] = names.to_pylist()
        return found if isinstance(label, slice) else found[0]

    def names(self) -> list[str]:
        """All names: 100 bytes of memory each."""
        return self[:]

    def counts(self) -> NDArray[np.int64]:
        """Samples of each class."""
        return self._counts

    def ends(self) -> NDArray[np.int64]:
        """Samples of each class and all before it: where its part of the by-class positions ends."""
        return self._ends

    def by_size(self) -> NDArray[np.int64]:
        """Labels by falling number of samples, equal ones by label."""
        return self._by_size

    def digest(self) -> str:
        """SHA-256 of the names in order, as the JSON list that Python writes."""
        return _names_digest(self._names)


class ClassesFile(TableFile):
    """A classes table. `names_sha256` tells whether two sets have the same names at the same labels."""

    names_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


def classes_table(
    names: pa.Array, counts: NDArray[np.int64], attributes: Mapping[str, pa.Array] | None = None
) -> pa.Table:
    """The columns of a classes table; row = label.

    Args:
        names: of the identities.
        counts: samples of each.
        attributes: further columns.

    Raises:
        UserError: an attribute has the name of one of the table's own columns.
    """
    columns = {
        "name": names.cast(pa.large_string()),
        "samples": _column(counts),
        "end": _column(np.cumsum(counts)),
        "by_size": _column(np.argsort(-counts, kind="stable")),
    }
    if taken := columns.keys() & (attributes or {}).keys():
        raise UserError(f"an attribute of identities must not be called '{min(taken)}'; rename it in the list")
    return pa.table({**columns, **(attributes or {})})


def write_classes(
    path: Path,
    names: Iterable[str] | pa.Array,
    counts: NDArray[np.int64],
    attributes: Mapping[str, pa.Array] | None = None,
) -> ClassesFile:
    """Write a classes table as an Arrow file whole or not at all; arguments as of `classes_table`."""
    names = names if isinstance(names, pa.Array) else _texts(names)
    table = classes_table(names, counts, attributes)
    with fresh_file(path) as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table.combine_chunks(), max_chunksize=max(1, len(table)))
    return ClassesFile(**TableFile.of(path).model_dump(), names_sha256=_names_digest(names))


def by_class(labels: Iterable[NDArray[np.unsignedinteger]], classes: Classes, out: NDArray[np.int64]) -> None:
    """Fill `out` with the positions of the samples by label, then position. Memory: 8 bytes a class and one chunk.

    Args:
        labels: of all samples in order of position, in chunks (one a shard).
        classes: whose counts say where each class begins.
        out: int64 [samples].

    Raises:
        UserError: the labels are not those that the classes count.
    """
    place = classes.ends() - classes.counts()  # where the next sample of each class goes
    position = 0
    for chunk in labels:
        wrong = chunk[chunk >= len(classes)]
        if len(wrong):
            raise UserError(f"the shards hold label {wrong[0]}, but the manifest has {len(classes)} classes; {_REMEDY}")
        order = np.argsort(chunk, kind="stable")
        found, firsts, counts = np.unique(chunk[order], return_index=True, return_counts=True)
        if (over := np.flatnonzero(place[found] + counts > classes.ends()[found])).size:
            _disagree(classes, int(found[over[0]]), "more")
        inside = np.arange(len(chunk)) - np.repeat(firsts, counts)
        out[np.repeat(place[found], counts) + inside] = position + order
        place[found] += counts
        position += len(chunk)
    if (under := np.flatnonzero(place < classes.ends())).size:
        _disagree(classes, int(under[0]), "fewer")


def write_by_class(path: Path, labels: Iterable[NDArray[np.unsignedinteger]], classes: Classes) -> TableFile:
    """Write the by-class positions of a split whole or not at all; arguments as of `by_class`."""
    with fresh_file(path) as file:
        out = np.lib.format.open_memmap(file.name, mode="w+", dtype="<i8", shape=(int(classes.ends()[-1]),))
        by_class(labels, classes, out)
        out.flush()
    return TableFile.of(path)


def open_by_class(path: Path, samples: int) -> NDArray[np.int64]:
    """Map by-class positions into memory.

    Raises:
        UserError: they are missing, damaged, or of another number of samples.
    """
    try:
        mapped: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, *NOT_NPY) as error:
        raise UserError(f"'{path}' is not a table of positions: {error}; {_REMEDY}") from error
    if mapped.shape != (samples,) or mapped.dtype != np.int64:
        raise UserError(f"'{path}' holds {mapped.dtype} {mapped.shape}, not int64 ({samples},); {_REMEDY}")
    mapped.base.madvise(_LOOKED_UP)
    positions: NDArray[np.int64] = mapped
    return positions


def samples_of_class(classes: Classes, label: int, samples: int) -> tuple[int, int]:
    """How many samples a class has, and where its part of the by-class positions ends, looked up in the table alone.

    Raises:
        UserError: they do not lie within the split's samples, or there is no such class.
    """
    if 0 <= label < len(classes):
        count, end = int(classes.counts()[label]), int(classes.ends()[label])
        if 0 <= count <= end <= samples:
            return count, end
    raise UserError(
        f"the table of classes contradicts itself, or the {samples} samples of the split, at label {label}; run "
        f"'hypersphere data verify', and {_REMEDY}"
    )


def positions_of(name: str, found: NDArray[np.int64], samples: int) -> NDArray[np.int64]:
    """What the by-class positions have for the class `name`, once it is known to lie within the split's samples.

    Raises:
        UserError: it does not.
    """
    if (wrong := found[(found < 0) | (found >= samples)]).size:
        raise UserError(
            f"the by-class positions say that class '{name}' has a sample at {wrong[0]}, but the split has {samples} "
            f"samples; run 'hypersphere data verify', and {_REMEDY}"
        )
    return found


def _disagree(classes: Classes, label: int, word: str) -> None:
    raise UserError(
        f"the shards hold {word} samples of class '{classes[label]}' than the {classes.counts()[label]} that the "
        f"manifest says; {_REMEDY}"
    )


def _names_digest(names: pa.Array) -> str:
    digest = hashlib.sha256(b"[")
    for start in range(0, len(names), _CHUNK):
        text = json.dumps(names[start : start + _CHUNK].to_pylist())[1:-1]
        digest.update((", " if start else "").encode() + text.encode())
    digest.update(b"]")
    return digest.hexdigest()


# Arrow's own ways from and to numpy import pandas where it is installed: 0.5 s and 50 MB.
def _texts(names: Iterable[str]) -> pa.Array:
    coded = [name.encode() for name in names]
    ends = np.cumsum([0, *map(len, coded)], dtype=np.int64)
    return pa.LargeStringArray.from_buffers(len(coded), pa.py_buffer(ends), pa.py_buffer(b"".join(coded)))


def _column(values: NDArray[np.int64]) -> pa.Array:
    whole = np.ascontiguousarray(values, np.int64)
    return pa.Array.from_buffers(pa.int64(), len(whole), [None, pa.py_buffer(whole)])


def _values(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """A column of whole numbers as it lies in memory or in the mapped file."""
    if column.type != pa.int64() or column.null_count:
        raise TypeError(f"a column of {column.type} where int64 without gaps is wanted")
    array = _whole(column)
    return np.frombuffer(array.buffers()[1], np.int64, len(array), 8 * array.offset)


def _whole(column: pa.ChunkedArray) -> pa.Array:
    """A column in one piece; as it lies in the file where the file has one batch."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
