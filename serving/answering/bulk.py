"""Bodies of bulk enrolments: lines of JSON, or one line of JSON and the embeddings as bytes.

What makes the body unreadable refuses all of it, with the number of the line; what is wrong with one item refuses that.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from serving.errors import ApiError, invalid
from serving.storage.changes import Attached
from serving.wire import requests
from serving.wire.parsing import Sent, read_json

Model = TypeVar("Model", bound=requests.Request)
MAX_LINE_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Item:
    """A subject, its embeddings as they were sent, and the model that is said to have made them."""

    subject_id: str
    embeddings: NDArray[np.float32] | Sequence[Sequence[float]]
    model_id: str | None
    attached: Attached


def items(sent: Sent, dimension: int) -> Iterator[Item]:
    """The items of a body, which is read as they are taken.

    Raises:
        ApiError: the body is not what its content type says, or holds too many embeddings.
    """
    document = sent.document or b""
    if sent.kind == "application/octet-stream":
        yield from _from_bytes(document, dimension)
        return
    count = 0
    for number, line in _lines(document):
        item = _line(requests.BulkItem, line, number)
        count += len(item.embeddings)
        if count > requests.MAX_BULK:
            raise _too_many(count)
        attached = Attached(item.metadata, item.qualities, item.sample_metadata)
        yield Item(item.subject_id, item.embeddings, item.model_id, attached)
    if not count:
        raise invalid(("", "no item was sent; send one JSON object a line"))


def _lines(document: bytes) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers; each is copied only when it is taken."""
    start = number = blank = 0
    while start < len(document):
        end = document.find(b"\n", start)
        line = document[start : end if end >= 0 else len(document)]
        start, number = start + len(line) + 1, number + 1
        if line.strip():
            yield number, line
            continue
        blank += 1
        if blank > requests.MAX_BULK:
            raise invalid((f"line {number}", f"more than {requests.MAX_BULK} lines are blank; leave them out"))


def _from_bytes(document: bytes, dimension: int) -> Iterator[Item]:
    line, _, rest = document.partition(b"\n")
    header = _line(requests.BulkHeader, line, 1)
    expected = 4 * dimension * len(header.subject_ids)
    if len(rest) != expected:
        told = f"{len(rest)} bytes follow the first line; {len(header.subject_ids)} embeddings of {dimension} take "
        raise invalid(("", f"{told}{expected}"))
    rows = np.frombuffer(rest, "<f4").reshape(-1, 1, dimension)
    for column in ("metadata", "qualities", "sample_metadata"):
        if len(sent := getattr(header, column)) not in (0, len(rows)):
            raise invalid((column, f"{len(sent)} were sent for {len(rows)} embeddings; send one for each, or none"))
    for place, (name, row) in enumerate(zip(header.subject_ids, rows, strict=True)):
        attached = Attached(
            header.metadata[place] if header.metadata else None,
            header.qualities[place : place + 1],
            header.sample_metadata[place : place + 1],
        )
        yield Item(name, row, header.model_id, attached)


def _line(model: type[Model], line: bytes, number: int) -> Model:
    if len(line) > MAX_LINE_BYTES:
        raise invalid((f"line {number}", f"it has {len(line)} bytes; at most {MAX_LINE_BYTES} are read"))
    try:
        return read_json(model, line)
    except ApiError as error:
        raise ApiError(error.status, error.code, f"line {number}: {error.message}", error.details) from error


def _too_many(count: int) -> ApiError:
    return invalid(("", f"{count} embeddings or more were sent; at most {requests.MAX_BULK} fit one request"))
