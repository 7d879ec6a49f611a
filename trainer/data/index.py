"""The index file of a shard: where each sample lies, its label and its checksum, memory-mapped. Runs without torch.

Little-endian. A header of 64 bytes (`_HEADER`: magic, version, size of a record, samples, bytes of the tar, bytes of
the keys, number of the first key), then a record of 24 bytes a sample, then the samples' keys, one after the other, in
UTF-8. The shards of an import have no keys there: theirs are the samples' numbers, counted on from the first key's.
"""

import hashlib
import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.atomic import write_file
from trainer.errors import UserError

RECORD = np.dtype(
    [
        ("offset", "<u8"),  # of the payload in the tar, in bytes
        ("size", "<u4"),  # of the payload, in bytes
        ("label", "<u4"),
        ("crc", "<u4"),  # CRC-32 of the payload, as zlib computes it
        ("key_end", "<u4"),  # where the sample's key ends among the keys; it begins where the last one ends
    ]
)
_MAGIC, _VERSION = b"HSINDEX2", 1
_HEADER = struct.Struct("<8sIIQQQQ16x")
_REMEDY = "import the data again, or fetch this index anew"


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """The samples of one shard, in its order.

    Attributes:
        records: one `RECORD` a sample.
        keys: of the samples, one after the other; empty where they are numbers.
        first: number of the first key, where they are numbers.
        tar_bytes: size of the shard.
    """

    records: NDArray[Any]
    keys: memoryview
    first: int
    tar_bytes: int

    @property
    def samples(self) -> int:
        return len(self.records)

    @property
    def labels(self) -> NDArray[np.uint32]:
        """The label of each sample: a view, not a copy."""
        labels: NDArray[np.uint32] = self.records["label"]
        return labels

    def key(self, row: int) -> str:
        """The sample's name in its tar, without suffix."""
        if not self.keys:
            return f"{self.first + row:09d}"
        ends = self.records["key_end"]
        return str(self.keys[int(ends[row - 1]) if row else 0 : int(ends[row])], "utf-8", "replace")


def make_index(records: NDArray[Any], keys: Sequence[str] | int, tar_bytes: int) -> ShardIndex:
    """An index in memory, of samples in the shard's order.

    Args:
        records: `RECORD`s; `key_end` is filled in here.
        keys: of the samples; or the number of the first one, where they count on from it as `%09d`.
        tar_bytes: size of the shard.
    """
    if isinstance(keys, int):
        return ShardIndex(records, memoryview(b""), keys, tar_bytes)
    coded = [key.encode() for key in keys]
    records["key_end"] = np.cumsum([len(key) for key in coded])
    return ShardIndex(records, memoryview(b"".join(coded)), 0, tar_bytes)


def write_index(path: Path, index: ShardIndex) -> str:
    """Write an index file whole or not at all; its SHA-256. The same index gives the same bytes."""
    header = _HEADER.pack(
        _MAGIC, _VERSION, RECORD.itemsize, index.samples, index.tar_bytes, len(index.keys), index.first
    )
    content = b"".join([header, index.records.tobytes(), index.keys])
    write_file(path, content)
    return hashlib.sha256(content).hexdigest()


def open_index(path: Path) -> ShardIndex:
    """Map an index file into memory; nothing but its header is read.

    Raises:
        UserError: the file is missing, or is not a whole index.
    """
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size or not header.startswith(_MAGIC):
                raise UserError(f"'{path}' is not the index of a shard; {_REMEDY}")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"index '{path}' cannot be read: {error.strerror}; {_REMEDY}") from error
    _, version, record, samples, tar_bytes, key_bytes, first = _HEADER.unpack(header)
    if (version, record) != (_VERSION, RECORD.itemsize):
        raise UserError(f"index '{path}' has version {version}, and only {_VERSION} is read; {_REMEDY}")
    ends = _HEADER.size + samples * RECORD.itemsize
    if len(mapped) != ends + key_bytes:
        raise UserError(
            f"index '{path}' has {len(mapped)} bytes, but its header promises {ends + key_bytes}; {_REMEDY}"
        )
    records = np.frombuffer(mapped, RECORD, samples, _HEADER.size)
    return ShardIndex(records, memoryview(mapped)[ends:], first, tar_bytes)
