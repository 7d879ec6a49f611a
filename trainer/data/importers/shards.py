"""One shard: a WebDataset tar and its index, each written whole or not at all."""

import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from trainer.atomic import fresh_file
from trainer.data.index import RECORD, make_index, open_index, write_index
from trainer.data.split import ShardEntry

if TYPE_CHECKING:
    from hashlib import _Hash

_BLOCK, _RECORD = 512, 10_240  # bytes; an archive ends with two empty blocks, and is filled up to a record
_AT_ONCE = 2**19  # bytes that are written and digested at a time
_NAME, _SIZE, _SUM = slice(0, 100), slice(124, 136), slice(148, 156)  # fields of a header
_json = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


def _blank_header() -> bytearray:
    """The header of an empty file without name, written by nobody at no time; its checksum field as it is summed."""
    member = tarfile.TarInfo()
    member.mode = 0o644
    header = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
    header[_SUM] = b" " * 8
    return header


_BLANK = bytes(_blank_header())
_BLANK_SUM = sum(_BLANK) - sum(_BLANK[_SIZE])


class Sample(NamedTuple):
    """A sample as a shard holds it.

    Attributes:
        number: its key, as `%09d`; rises within a shard.
        label: of its identity.
        identity, name, attributes: for its `.json`.
        suffix: the format of the payload: "png", "jpg" or "npy".
        payload: the file.
    """

    number: int
    label: int
    identity: str
    name: str
    attributes: dict[str, Any]
    suffix: str
    payload: bytes


def write_shard(folder: Path, name: str, samples: Iterable[Sample]) -> ShardEntry | None:
    """Write the tar `name` and its index into a folder; None, and no file, if there are no samples.

    A sample is three files: `<key>.cls` (the label, decimal), `<key>.json` (name of its source, its identity, and its
    attributes if it has any) and the payload. Times, owners and modes are fixed, members are in order of their names,
    and JSON is canonical: the same samples give the same bytes.
    """
    rows: list[tuple[int, int, int, int, int]] = []
    numbers: list[int] = []
    end = 0
    digest, waiting = hashlib.sha256(), bytearray()
    with fresh_file(folder / name) as file:
        for sample in samples:
            packed, inside = _pack(sample)
            rows.append((end + inside, len(sample.payload), sample.label, zlib.crc32(sample.payload), 0))
            numbers.append(sample.number)
            end += len(packed)
            waiting += packed
            if len(waiting) >= _AT_ONCE:
                _flush(waiting, file, digest)
        size = -(-(end + 2 * _BLOCK) // _RECORD) * _RECORD
        waiting += bytes(size - end)
        _flush(waiting, file, digest)
    if not rows:
        (folder / name).unlink()
        return None
    entry = ShardEntry(name=name, samples=len(rows), bytes=size, sha256=digest.hexdigest())
    unbroken = numbers[-1] - numbers[0] == len(numbers) - 1
    keys = numbers[0] if unbroken else [f"{number:09d}" for number in numbers]
    written = write_index(folder / entry.index_file, make_index(np.array(rows, RECORD), keys, entry.bytes))
    return entry.model_copy(update={"index_sha256": written})


def _flush(waiting: bytearray, file: BinaryIO, digest: "_Hash") -> None:
    file.write(waiting)
    digest.update(waiting)
    waiting.clear()


class KeptSample(NamedTuple):
    """A sample of a written shard."""

    number: int
    label: int
    suffix: str
    payload: bytes


def read_shard(folder: Path, entry: ShardEntry) -> Iterator[KeptSample]:
    """The samples of a shard that `write_shard` wrote."""
    index = open_index(folder / entry.index_file)
    with (folder / entry.name).open("rb") as file:
        for row, record in enumerate(index.records):
            start, size = int(record["offset"]), int(record["size"])
            block = os.pread(file.fileno(), _BLOCK + size, start - _BLOCK)  # the header first, for the name
            suffix = block[_NAME].rstrip(b"\0").rpartition(b".")[2].decode()
            yield KeptSample(int(index.key(row)), int(record["label"]), suffix, block[_BLOCK:])


def _pack(sample: Sample) -> tuple[bytes, int]:
    """The three members, and where in them the payload begins."""
    key = b"%09d." % sample.number
    label, payload = b"%d" % sample.label, sample.payload
    before = [*_member(key + b"cls", label)]
    after = [*_member(key + b"json", _describe(sample))]
    if sample.suffix > "json":
        before, after = before + after, []
    before.append(_header(key + sample.suffix.encode(), len(payload)))
    parts = [*before, payload, bytes(-len(payload) % _BLOCK), *after]
    return b"".join(parts), sum(map(len, before))


def _describe(sample: Sample) -> bytes:
    """The sample's `.json`: names in order, and no blanks."""
    if sample.attributes:
        found = {"attributes": sample.attributes, "identity": sample.identity, "name": sample.name}
        return _json(found).encode()
    text = f'{{"identity":{encode_basestring_ascii(sample.identity)},"name":{encode_basestring_ascii(sample.name)}}}'
    return text.encode()  # the same, five times as fast


def _member(name: bytes, content: bytes) -> tuple[bytes, bytes, bytes]:
    return _header(name, len(content)), content, bytes(-len(content) % _BLOCK)


def _header(name: bytes, size: int) -> bytes:
    """A member's header in ustar format: `_BLANK` with a name and a size (`tarfile` takes five times as long)."""
    digits = b"%011o\0" % size
    total = b"%06o\0 " % (_BLANK_SUM + sum(name) + sum(digits))
    return b"".join((name.ljust(100, b"\0"), _BLANK[100:124], digits, _BLANK[136:148], total, _BLANK[156:]))
