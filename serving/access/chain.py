"""The files of an audit log: lines of JSON, each with the SHA-256 of the line before it; read, verified, searched.

A folder holds `000001.jsonl`, `000002.jsonl` ... (the oldest may be moved away), `key`, which hides the subjects' ids,
and `head`: the number and hash of a line that was on the disk at most a second ago, in two slots that are written in
turns and authenticated with the key. A log that is shorter than its head says, or another one, was cut or rewritten.
"""

import hashlib
import hmac
import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.atomic import write_file
from trainer.errors import UserError

NOTHING = "0" * 64  # the hash before the first line
SLOT = struct.Struct("<8sQ32s")  # and 32 bytes of HMAC
MAGIC, SECTOR = b"HYAUDIT1", 4096
PSEUDONYM = 32  # hexadecimal digits


@dataclass(frozen=True)
class Head:
    """The last line: its number, counted through all files, and its hash."""

    number: int = 0
    hash: str = NOTHING


@dataclass(frozen=True)
class Place:
    """Where a page begins: a file's number and an offset in it."""

    file: int = 0
    offset: int = 0


def line(entry: dict[str, Any], head: Head) -> tuple[bytes, Head]:
    """An entry as the line that comes after `head`, and the new head."""
    whole = {"n": head.number + 1, **entry, "prev": head.hash}
    text = json.dumps(whole, separators=(",", ":"), ensure_ascii=True).encode()
    return text + b"\n", Head(head.number + 1, hashlib.sha256(text).hexdigest())


def pseudonym(key: bytes, collection: str, subject_id: str) -> str:
    """What stands for a subject: whoever has the folder's key can find one, nobody can read one out."""
    return hmac.digest(key, f"{collection}\0{subject_id}".encode(), hashlib.sha256).hex()[:PSEUDONYM]


def files(folder: Path) -> list[Path]:
    """In their order."""
    return sorted(path for path in folder.glob("*.jsonl") if path.stem.isdecimal())


def read_key(folder: Path) -> bytes:
    """Raises UserError where the folder is no audit log, or its key is lost."""
    try:
        key = bytes.fromhex((folder / "key").read_text().strip())
    except (OSError, ValueError) as error:
        raise UserError(f"'{folder}' is not an audit log, or its file 'key' is lost: {error}") from error
    if len(key) != 32:
        raise UserError(f"'{folder / 'key'}' has not the 64 hexadecimal digits of a key; put the right one back")
    return key


def make_folder(folder: Path) -> None:
    """A new, empty log; for its owner alone."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = os.urandom(32)
    write_file(folder / "head", 2 * pack(Head(), key).ljust(SECTOR, b"\0"))
    (folder / "head").chmod(0o600)
    write_file(folder / "key", key.hex())  # comes last: a folder with a key is whole
    (folder / "key").chmod(0o600)


def pack(head: Head, key: bytes) -> bytes:
    slot = SLOT.pack(MAGIC, head.number, bytes.fromhex(head.hash))
    return slot + hmac.digest(key, slot, hashlib.sha256)


def read_head(folder: Path, key: bytes) -> Head:
    """Raises UserError where neither slot is one that the service wrote."""
    try:
        content = (folder / "head").read_bytes()
    except OSError as error:
        raise UserError(f"the head of the audit log '{folder}' cannot be read: {error.strerror}") from error
    found = []
    for sector in (content[:SECTOR], content[SECTOR:]):
        slot, seal = sector[: SLOT.size], sector[SLOT.size : SLOT.size + 32]
        if len(slot) == SLOT.size and hmac.compare_digest(hmac.digest(key, slot, hashlib.sha256), seal):
            _, number, digest = SLOT.unpack(slot)
            found.append(Head(number, digest.hex()))
    if not found:
        raise UserError(f"the head of the audit log '{folder}' is damaged or forged; only the chain can be verified")
    return max(found, key=lambda head: head.number)


def entries(folder: Path) -> Iterator[tuple[Path, int, bytes]]:
    """File, line number in it, and the line without its end. A piece at the very end is being written, and left out."""
    for path in (every := files(folder)):
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if not text.endswith(b"\n") and path == every[-1]:
                    return
                yield path, number, text.rstrip(b"\n")


def verify(folder: Path) -> tuple[Head, int]:
    """The last line, and the number of the first that is still there.

    Raises:
        UserError: names the first line that is broken, or says that the log was cut.
    """
    marked, head, first = read_head(folder, read_key(folder)), Head(), 0
    for path, number, text in entries(folder):
        place = f"line {number} of '{path}'"
        entry = _parse(text)
        if entry is None:
            raise UserError(f"the audit log is broken at {place}: it is not a line that the service wrote")
        if not first:
            first, head = entry["n"], Head(entry["n"] - 1, entry["prev"] if entry["n"] > 1 else NOTHING)
        if entry["n"] != head.number + 1 or entry["prev"] != head.hash:
            raise UserError(
                f"the audit log is broken at {place}: the line before it was changed, or lines between were removed"
            )
        head = Head(entry["n"], hashlib.sha256(text).hexdigest())
        if head.number == marked.number and head != marked:
            raise UserError(f"the audit log is broken at {place}: it is not the line that the head was written for")
    if head.number < marked.number:
        raise UserError(
            f"the audit log '{folder}' was cut: it ends with line {head.number}, but line {marked.number} was written"
        )
    return head, first


def find(folder: Path, collection: str, subject_id: str) -> Iterator[bytes]:
    """The lines about a subject."""
    wanted = pseudonym(read_key(folder), collection, subject_id).encode()
    for _, _, text in entries(folder):
        if wanted in text and (entry := _parse(text)) and wanted.decode() in entry.get("subjects", ()):
            yield text


def page(folder: Path, start: Place, limit: int) -> tuple[list[dict[str, Any]], Place]:
    """So many entries from `start` on, and where the next page begins. Raises ValueError where no line begins there."""
    found, place = list[dict[str, Any]](), start
    for path in files(folder):
        if (at := int(path.stem)) < place.file:
            continue
        place = Place(at, place.offset if at == place.file else 0)
        with path.open("rb") as file:
            if place.offset:
                file.seek(min(place.offset - 1, file.seek(0, os.SEEK_END)))
                if file.read(1) != b"\n":
                    raise ValueError("no line begins there")
            for text in file:
                if len(found) == limit or not text.endswith(b"\n"):
                    return found, place
                if (entry := _parse(text)) is None:
                    raise UserError(f"the audit log is broken in '{path.name}'; run `hypersphere audit verify`")
                found.append(entry)
                place = Place(at, place.offset + len(text))
    return found, place


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(text)
        whole = isinstance(entry["n"], int) and isinstance(entry["prev"], str)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return entry if whole else None


def last(paths: Sequence[Path]) -> Head | None:
    """The last whole line of the last file that has one; None where there is none, or it is not the service's."""
    for path in reversed(paths):
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 2**20))
            lines = file.read().split(b"\n")[:-1]
        if lines:
            entry = _parse(lines[-1])
            return None if entry is None else Head(entry["n"], hashlib.sha256(lines[-1]).hexdigest())
    return Head()
