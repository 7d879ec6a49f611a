"""MXNet's RecordIO: records by their offset, read without mxnet. All numbers are little-endian.

record    uint32 magic, uint32 (flag << 29 | length), `length` bytes, zeros up to a multiple of four. A record that
          holds the magic number itself is cut there into a first (flag 1), middle (2) and last (3) part, without
          the number; a whole one has flag 0.
content   uint32 n, float32 label, uint64 id, uint64 id2; then, where n > 0, n float32 labels that count instead of
          the one; then the image file.
"""

import os
import struct
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from trainer.data.image import MAX_BYTES
from trainer.errors import UserError

_MAGIC = 0xCED7230A
_PART = struct.Struct("<II")
_CONTENT = struct.Struct("<IfQQ")
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)
_LENGTH = (1 << 29) - 1
_MAX_LABELS = 4096
_MAX_RECORD = MAX_BYTES + 1 + _CONTENT.size + 4 * _MAX_LABELS
_PEEK = _CONTENT.size + 4  # what tells the label


class RecordHead(NamedTuple):
    """What a record says before its image.

    Attributes:
        labels: how many follow (0: the one in the fixed place counts).
        label: the first.
        image: bytes of the image file.
    """

    labels: int
    label: float
    image: int

    @property
    def describes(self) -> bool:
        """A record of InsightFace's that holds a range of keys and no image."""
        return self.image == 0 and self.labels >= 2


class Records:
    """The records of a .rec file by their offset; safe to use from several threads.

    Raises (all methods, and the making of one):
        UserError: the file cannot be read, is cut off, or holds something else at that offset.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"cannot read '{path}': {error.strerror}; make it readable") from error
        weakref.finalize(self, os.close, self._handle)
        self.size = os.fstat(self._handle).st_size

    def offsets(self) -> Iterator[int]:
        """Where each record begins, found by walking over the file: for files without an .idx."""
        offset, expected = 0, (_WHOLE, _FIRST)
        while offset < self.size:
            flag, length = self._part(offset, expected)
            if flag in (_WHOLE, _FIRST):
                yield offset
            expected = (_WHOLE, _FIRST) if flag in (_WHOLE, _LAST) else (_MIDDLE, _LAST)
            offset += _PART.size + _padded(length)

    def head(self, offset: int) -> RecordHead:
        """What a record says before its image; of most records only the first bytes are read."""
        flag, length = self._part(offset, (_WHOLE, _FIRST))
        whole = flag == _WHOLE
        content = self._read(offset + _PART.size, min(length, _PEEK)) if whole else self._content(offset)
        return self._head(content, length if whole else len(content), offset)

    def image(self, offset: int) -> bytes:
        """The image file in a record."""
        content = self._content(offset)
        head = self._head(content, len(content), offset)
        return content[len(content) - head.image :]

    def _head(self, content: bytes, length: int, offset: int) -> RecordHead:
        if len(content) < _CONTENT.size:
            raise self._foreign(offset)
        labels, label, _, _ = _CONTENT.unpack_from(content)
        image = length - _CONTENT.size - 4 * labels
        if image < 0 or labels > _MAX_LABELS:
            raise self._foreign(offset)
        if labels:
            (label,) = struct.unpack_from("<f", content, _CONTENT.size)
        return RecordHead(labels, label, image)

    def _content(self, offset: int) -> bytes:
        """A record's content, its parts joined by the number that parted them."""
        parts: list[bytes] = []
        total = 0
        start, expected = offset, (_WHOLE, _FIRST)
        while True:
            flag, length = self._part(offset, expected)
            total += length + 4
            if total > _MAX_RECORD:
                raise UserError(
                    f"the record at byte {start} of '{self._path}' has {total} bytes or more; at most {_MAX_RECORD} "
                    "are read: store its image smaller"
                )
            parts.append(self._read(offset + _PART.size, length))
            if flag in (_WHOLE, _LAST):
                return struct.pack("<I", _MAGIC).join(parts)
            offset, expected = offset + _PART.size + _padded(length), (_MIDDLE, _LAST)

    def _part(self, offset: int, expected: tuple[int, ...]) -> tuple[int, int]:
        """Flag and length of the part at an offset."""
        magic, word = _PART.unpack(self._read(offset, _PART.size))
        flag, length = word >> 29, word & _LENGTH
        if magic != _MAGIC or flag not in expected:
            raise self._foreign(offset)
        if offset + _PART.size + length > self.size:
            raise self._cut_off(offset)
        return flag, length

    def _read(self, offset: int, size: int) -> bytes:
        data = os.pread(self._handle, size, offset) if 0 <= offset <= self.size else b""
        if len(data) < size:
            raise self._cut_off(offset)
        return data

    def _cut_off(self, offset: int) -> UserError:
        return UserError(
            f"'{self._path}' ends at byte {self.size}, inside the record at byte {offset}; fetch it again, "
            "with the .idx that belongs to it"
        )

    def _foreign(self, offset: int) -> UserError:
        return UserError(
            f"'{self._path}' has no record at byte {offset}; give a RecordIO file with the .idx that belongs to it"
        )


def _padded(length: int) -> int:
    return -(-length // 4) * 4
