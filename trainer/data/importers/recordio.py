"""RecordIO as InsightFace packs it: train.rec with, where they are there, train.idx, train.lst and property.

    .idx      text, a line a record: "<key>\\t<offset>".
    .lst      text, a line an image: MXNet's "<key>\\t<label>\\t<path>" or InsightFace's "1\\t<path>\\t<label>".
    property  "<identities>,<height>,<width>".

InsightFace adds records without an image: the first says where the images end and the identities begin, and each
identity has one with the range of its images. They are passed over: every image carries its own label.
"""

from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

from trainer.data.importers import Entry, Importer, ImportOptions, Listing, Progress, Read, identity_of
from trainer.data.importers.records import RecordHead, Records
from trainer.errors import UserError

_MAX_LABEL = 2**24  # whole numbers up to here are exact as float32
_MAX_LINE = 2**16
_CHUNK = 4096


def list_recordio(source: str | None, options: ImportOptions, progress: Progress) -> Listing:
    """An identity is a label, named by its number with leading zeros, so that names sort as the numbers do.

    Args:
        source: a .rec file, or a folder that holds one.

    Raises:
        UserError: there is no such file, or it is damaged, or the files beside it do not belong to it.
    """
    path = _find(source)
    return Listing(
        entries=_entries(path),
        source=str(path.resolve()),
        provenance={"source": path.name},
    )


def read_recordio(source: str, options: ImportOptions) -> Read:
    """A place is the offset of a record."""
    records = Records(Path(source))
    return lambda place: records.image(int(place))


IMPORTER = Importer(list_recordio, read_recordio)


def _find(source: str | None) -> Path:
    path = Path(source or "")
    found = sorted(path.glob("*.rec")) if source and path.is_dir() else [path]
    if len(found) == 1 and found[0].suffix == ".rec" and found[0].is_file():
        return found[0]
    held = f" but a folder that holds {', '.join(file.name for file in found[:5]) or 'none'}" if path.is_dir() else ""
    raise UserError(f"SOURCE '{source or ''}' is not a .rec file{held}; name one .rec file on this machine")


def _entries(path: Path) -> Iterator[Entry]:
    records = Records(path)
    stamp = f"{records.size}:{path.stat().st_mtime_ns}"
    classes = _classes(path.with_name("property"))
    pairs = ((key, offset, records.head(offset)) for key, offset in _keyed_offsets(path, records))
    images = ((key, offset, head) for key, offset, head in pairs if not head.describes)
    for key, offset, head, name in _with_names(images, path):
        if not (head.label.is_integer() and 0 <= head.label < classes):
            raise UserError(
                f"the record with key {key} of '{path}' has label {head.label:g}, but labels are whole numbers from 0 "
                f"to {classes - 1}; pack the file again, or mend 'property' beside it"
            )
        yield Entry(identity_of(head.label), name, str(offset), size=head.image, stamp=stamp)


def _classes(path: Path) -> int:
    """How many identities there are, from the file `property` where it is there."""
    if not path.exists():
        return _MAX_LABEL
    with path.open("rb") as file:
        first = file.read(64).partition(b",")[0].strip()
    if not first.isdigit() or not 0 < int(first) <= _MAX_LABEL:
        raise UserError(
            f"'{path}' does not begin with a number of identities; write '<identities>,112,112', or remove it"
        )
    return int(first)


def _keyed_offsets(path: Path, records: Records) -> Iterable[tuple[int, int]]:
    """Key and offset of each record, in the order of the file."""
    index = path.with_suffix(".idx")
    if not index.exists():
        return enumerate(records.offsets())
    form = f"'{index}' is not an index of RecordIO, '<key> tab <offset>' a line"
    try:
        table = pa.csv.read_csv(
            index,
            pa.csv.ReadOptions(column_names=["key", "offset"]),
            pa.csv.ParseOptions(delimiter="\t", quote_char=False),
            pa.csv.ConvertOptions(column_types={"key": pa.int64(), "offset": pa.int64()}, null_values=[]),
        )
    except pa.ArrowInvalid as error:
        raise UserError(f"{form} ({error}); remove it to go without") from error
    keys, offsets = table["key"].to_numpy(), table["offset"].to_numpy()
    order = np.argsort(offsets, kind="stable")
    if (np.diff(offsets[order]) == 0).any():
        raise UserError(f"'{index}' names one record twice; remove it to go without")
    return _pairs(keys, offsets, order)


def _pairs(keys: NDArray[np.int64], offsets: NDArray[np.int64], order: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    for start in range(0, len(order), _CHUNK):  # a few as Python's numbers at a time: they are five times as large
        rows = order[start : start + _CHUNK]
        yield from zip(keys[rows].tolist(), offsets[rows].tolist(), strict=True)


def _with_names(
    images: Iterable[tuple[int, int, RecordHead]], path: Path
) -> Iterator[tuple[int, int, RecordHead, str]]:
    """The images with the paths in the list beside the file or, without one, with their keys as names."""
    listed = path.with_suffix(".lst")
    if not listed.exists():
        yield from ((key, offset, head, f"{path.stem}/{key}") for key, offset, head in images)
        return
    remedy = f"give the list that belongs to '{path.name}', or remove it to go without"
    for number, (image, line) in enumerate(zip_longest(images, _lines(listed)), 1):
        if image is None or line is None:
            fewer, more = (path, listed) if image is None else (listed, path)
            raise UserError(f"'{fewer}' has {number - 1} images, but '{more.name}' has more; {remedy}")
        key, offset, head = image
        if line.label != head.label or line.key not in (None, key):
            raise UserError(
                f"line {number} of '{listed}' gives label {line.label:g}"
                + ("" if line.key is None else f" and key {line.key}")
                + f", but the record there has label {head.label:g} and key {key}; {remedy}"
            )
        yield key, offset, head, line.path


class _Line(NamedTuple):
    key: int | None
    label: float
    path: str


def _lines(path: Path) -> Iterator[_Line]:
    """A list's lines: "<key> <label>... <path>", or InsightFace's "<0 or 1> <path> <label>...", parted by tabs."""
    with path.open(encoding="utf-8", errors="backslashreplace") as file:
        number = 0
        while text := file.readline(_MAX_LINE):
            number += 1
            first, *fields = text.rstrip("\r\n").split("\t")
            try:
                if len(fields) < 2:
                    raise ValueError("fewer than three fields")
                with_key = _is_number(fields[0])
                label = float(fields[0 if with_key else 1])
                yield _Line(int(first) if with_key else None, label, fields[-1 if with_key else 0])
            except ValueError as error:
                raise UserError(
                    f"line {number} of '{path}' is not 'key tab label tab path' ({error}); mend it, or remove the list"
                ) from error


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
