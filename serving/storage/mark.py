"""The high-water mark of a store: the number of its last acknowledged change, in a small file beside the database.

SQLite takes a write-ahead log that is missing, cut or damaged for one that ended earlier, and says nothing. A database
that has seen fewer changes than its mark says has lost some.

The file has two slots, each in a sector of its own: magic, the store's uid, revision, CRC-32. They are written in
turns, in place, and flushed, so a power cut tears at most the slot that was being written, and the other one is at most
one change behind. Nothing is allocated in a write, so a full disk does not stop it.

At its end it says whether the store was ever served to those with a key only: it goes wherever the store goes.
"""

import contextlib
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from trainer.atomic import write_file

SLOT = struct.Struct("<8s16sQ")  # and four bytes of CRC-32
MAGIC = b"HYPSMARK"
SECTOR = 4096
KEYS = b"KEYS"  # the last bytes of a store's that was served to those with a key


class MarkDamaged(ValueError):
    """The file is not one that a store wrote: neither slot can be read, or it has another size."""


@dataclass(frozen=True)
class Reached:
    """A store, and the revision that it has acknowledged."""

    uid: bytes
    revision: int


def mark_path(store: Path) -> Path:
    return store.with_name(store.name + "-mark")


def read_mark(path: Path) -> Reached | None:
    """What the file says; None if there is none. Raises MarkDamaged where it is no mark, OSError where unreadable."""
    try:
        with path.open("rb") as file:
            content = file.read(2 * SECTOR + 1)
    except FileNotFoundError:
        return None
    if len(content) != 2 * SECTOR:
        raise MarkDamaged(f"it has not the {2 * SECTOR} bytes of a mark")
    slots = [slot for sector in (content[:SECTOR], content[SECTOR:]) if (slot := _unpack(sector))]
    if not slots or len({slot.uid for slot in slots}) > 1:
        raise MarkDamaged("its checksums do not fit")
    return max(slots, key=lambda slot: slot.revision)


def make_mark(path: Path, reached: Reached) -> None:
    """Write the file anew, whole or not at all. Raises OSError where the disk refuses."""
    write_file(path, 2 * _pack(reached).ljust(SECTOR, b"\0"))
    path.chmod(0o600)


def note_keys(path: Path) -> None:
    """Note that the store is served to those with a key only. Raises OSError."""
    handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(handle, KEYS, 2 * SECTOR - len(KEYS))
        os.fsync(handle)
    finally:
        os.close(handle)


def asked_for_keys(path: Path) -> bool:
    """Whether `note_keys` was called. Raises OSError where it is unreadable."""
    return path.read_bytes().endswith(KEYS)


class Mark:
    """An existing mark, opened to be moved on. Used by one thread at a time."""

    def __init__(self, path: Path, reached: Reached) -> None:
        """`reached`: what the file says, or is about to. Raises OSError where it cannot be written."""
        self.reached = reached
        self._file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # every write was flushed
            os.close(self._file)

    def move(self, revision: int) -> None:
        """Note that `revision` is reached. It is on the disk when this returns.

        Raises:
            OSError: the disk refused; `reached` stays as it was.
        """
        reached = Reached(self.reached.uid, revision)
        os.pwrite(self._file, _pack(reached), revision % 2 * SECTOR)
        os.fdatasync(self._file)
        self.reached = reached


def _pack(reached: Reached) -> bytes:
    slot = SLOT.pack(MAGIC, reached.uid, reached.revision)
    return slot + zlib.crc32(slot).to_bytes(4, "little")


def _unpack(sector: bytes) -> Reached | None:
    reached = Reached(*SLOT.unpack_from(sector)[1:])
    return reached if sector.startswith(_pack(reached)) else None
