"""The members of a tar file, from its headers alone: ustar, GNU's and PAX's long names. Runs without torch and numpy.

Made for archives of strangers. Names are never used as paths, but whoever unpacks the same archive would: so one whose
names climb out is refused. The walk reads 512 bytes a member and jumps over the content.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple
from zlib import adler32

from trainer.errors import UserError

BLOCK = 512
_END = bytes(BLOCK)
_AFTER_END = 2**16  # bytes behind the end that are looked at: writers fill up to 10 KiB, some to 32
_MAX_NAME = 2**16  # bytes of a long name
_MAX_HEADER = 2**20  # bytes of a header that describes the next one
_REMEDY = "fetch it anew, or pack it again"
_REGULAR, _FOLDER, _LABEL = b"0\x007", b"5", b"V"
_LONG_NAME, _LONG_LINK, _PAX_GLOBAL = b"L", b"K", b"g"
_DESCRIBES = _LONG_NAME + _LONG_LINK + _PAX_GLOBAL + b"x"
_REFUSED = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a character device", b"4": "a block device", b"6": "a FIFO",
    b"S": "a sparse file", b"M": "a part of a file that began in another volume",
}  # fmt: skip
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_PAX_RECORD = re.compile(rb"([0-9]{1,7}) ([^=\n]+)=")


class TarMember(NamedTuple):
    """A regular file in the archive: `size` bytes of content from byte `offset` on."""

    name: str
    offset: int
    size: int


def members(file: BinaryIO, archive: str) -> Iterator[TarMember]:
    """The regular files of a tar, in its order; folders are passed over.

    Args:
        file: seekable; a buffer of 64 KiB makes the walk over small members several times as fast.
        archive: what messages call it, behind the word shard.

    Raises:
        UserError: the archive is compressed, cut off or damaged (named with the byte), or holds a path that climbs out
            of it, a link, a device or anything else that is no plain file.
    """
    end = file.seek(0, 2)
    offset = 0
    common, extended = _Extended(), _Extended()
    while True:
        file.seek(offset)
        header = file.read(BLOCK)
        if header == _END:
            _check_end(file, archive, offset)
            return
        _check(header, archive, offset)
        kind, size = header[156:157], _number(header[124:136], archive, offset)
        if kind in _DESCRIBES:
            content = _content(file, size, archive, offset)
            (common if kind == _PAX_GLOBAL else extended).read(kind, content, archive, offset)
        else:
            name = _text(extended.path or common.path or _name(header))
            if kind not in _REGULAR or ".." in name or name.startswith("/") or extended.path or extended.sparse:
                _refuse(name, kind, extended.sparse, archive)
            size = extended.size if extended.size is not None else size if common.size is None else common.size
            if kind not in _REGULAR:
                size = 0
            if offset + BLOCK + size > end:
                raise UserError(f"shard '{archive}' is cut off at byte {end}, inside {name[:300]!r}; {_REMEDY}")
            if kind in _REGULAR and not name.endswith("/"):  # before ustar, a slash at the end made a folder
                yield TarMember(name.removeprefix("./"), offset + BLOCK, size)
            extended = _Extended()
        offset += BLOCK + -(-size // BLOCK) * BLOCK


@dataclass(slots=True)
class _Extended:
    """What headers before a member say about it: its path and size, and that it is sparse."""

    path: bytes | None = None
    size: int | None = None
    sparse: bool = False

    def read(self, kind: bytes, content: bytes, archive: str, offset: int) -> None:
        """Take over a long name, or PAX records: "<length> <keyword>=<value>\\n", the length being the record's."""
        if kind in (_LONG_NAME, _LONG_LINK):
            self.path = content.partition(b"\0")[0] if kind == _LONG_NAME else self.path
            return
        position = 0
        while position < len(content):
            head = _PAX_RECORD.match(content, position)
            stop = position + int(head[1]) if head else 0
            if head is None or not head.end() < stop <= len(content) or content[stop - 1 : stop] != b"\n":
                raise _damaged(archive, offset)
            keyword, value = head[2], content[head.end() : stop - 1]
            if keyword == b"path":
                self.path = value.partition(b"\0")[0]
            elif keyword == b"size":
                if not value.isdigit() or len(value) > 20:
                    raise _damaged(archive, offset)
                self.size = int(value)
            elif keyword.startswith(b"GNU.sparse"):
                self.sparse = True
            position = stop


def _check_end(file: BinaryIO, archive: str, offset: int) -> None:
    """Archives that were put together by `cat` go on after the end of the first, where nobody would read them."""
    if file.read(_AFTER_END).strip(b"\0"):
        raise UserError(
            f"shard '{archive}' goes on after its end at byte {offset}, as archives do that were joined by 'cat'; give "
            "them one by one, or join them by 'tar --concatenate'"
        )


def _check(header: bytes, archive: str, offset: int) -> None:
    """A whole block whose sum is the one that it carries."""
    if len(header) < BLOCK:
        raise UserError(f"shard '{archive}' is cut off at byte {offset + len(header)}; {_REMEDY}")
    # Adler-32's lower half is the sum of the bytes plus one, modulo 65521, at 30 times the speed of `sum`. A header's
    # own sum counts the field that holds it as eight spaces.
    found = adler32(header[156:], adler32(b" " * 8, adler32(header[:148]))) & 0xFFFF
    digits = header[148:156].strip(b" \0")
    if not digits or digits.strip(b"01234567") or (int(digits, 8) + 1) % 65521 != found:
        if offset == 0:
            for magic, name in _COMPRESSED.items():
                if header.startswith(magic):
                    raise UserError(f"shard '{archive}' is compressed ({name}); unpack it to a plain tar first")
            raise UserError(f"shard '{archive}' is not a tar, or is damaged at byte 0; give a plain tar")
        raise _damaged(archive, offset)


def _number(field: bytes, archive: str, offset: int) -> int:
    """Octal digits or, with the highest bit set, a big-endian number (GNU, for 8 GiB and more)."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:])
    digits = field.strip(b" \0")
    if digits.strip(b"01234567"):
        raise _damaged(archive, offset)
    return int(digits or b"0", 8)


def _content(file: BinaryIO, size: int, archive: str, offset: int) -> bytes:
    """The content of a header that only describes the next one."""
    if size > _MAX_HEADER:
        raise UserError(
            f"shard '{archive}' has a header of {size} bytes at byte {offset}; at most {_MAX_HEADER} are read"
        )
    content = file.read(size)
    if len(content) < size:
        raise UserError(f"shard '{archive}' is cut off at byte {offset + BLOCK + len(content)}; {_REMEDY}")
    return content


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0":  # GNU's own format keeps times where ustar keeps the first part of long names
        prefix = header[345:500].partition(b"\0")[0]
        return prefix + b"/" + name if prefix else name
    return name


def _refuse(name: str, kind: bytes, sparse: bool, archive: str) -> None:
    if kind in _REFUSED or sparse:
        what = "a sparse file" if sparse else _REFUSED[kind]
        raise UserError(f"{name[:300]!r} in shard '{archive}' is {what}; pack plain files only")
    if kind not in _REGULAR + _FOLDER + _LABEL:
        raise UserError(f"{name[:300]!r} in shard '{archive}' is of the unknown type {kind!r}; pack plain files only")
    if len(name) > _MAX_NAME or name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise UserError(f"shard '{archive}' holds {name[:300]!r}, a path that leads out of it; do not use this archive")


def _text(name: bytes) -> str:
    """A name as text that every file can hold; bytes that are no UTF-8 are written out as \\xNN."""
    return name.decode("utf-8", "backslashreplace")


def _damaged(archive: str, offset: int) -> UserError:
    return UserError(f"shard '{archive}' is damaged at byte {offset}; {_REMEDY}")
