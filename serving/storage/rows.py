"""The rows of a store: what they carry against damage and curiosity.

Every row that an answer or a decision is taken from has a checksum over all its values. The gallery's row also has
`content`, the checksums of all rows but free places XORed together: a row that is missing, doubled, or left over from
another time is found by it, even where counts agree. (Wegman and Carter, New hash functions and their use in
authentication and set equality, 1981, section on set equality.) Names and keys are looked up by digests under a secret
of the store.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Any

CHECKSUM_BYTES = 16
NOTHING = bytes(CHECKSUM_BYTES)
# SQLite stores every number from here on in eight bytes. It is also the number of nobody, who owns the free places.
NOBODY = 1 << 47
GALLERY_COLUMNS = "uid, secret, model_id, dimension, subjects, samples, revision, content, layout, created"


class Damage(sqlite3.DatabaseError):
    """A row is not as it was written. SQLite did not notice, so it has no message of its own."""


@dataclass(frozen=True)
class GalleryRow:
    """The one row about the gallery.

    Attributes:
        uid: tells this store from any other.
        secret: key of the digests.
        revision: number of changes so far.
        content: XOR of the checksums of all subjects, samples, and rows of metadata and images.
        layout: checksum of the text of the schema, which SQLite does not protect.
        created: milliseconds since 1970, as every time in the store.
    """

    uid: bytes
    secret: bytes
    model_id: str
    dimension: int
    subjects: int
    samples: int
    revision: int
    content: bytes
    layout: bytes
    created: int


def checksum(*values: bytes | str | int | None) -> bytes:
    """Of the values in this order; each with its length, so that no two lists of values look alike."""
    parts: list[bytes] = []
    for value in values:
        part = value if isinstance(value, bytes) else str(value).encode()
        parts += (b"%d:" % len(part), part)
    return hashlib.blake2b(b"".join(parts), digest_size=CHECKSUM_BYTES).digest()


def check(what: str, *row: Any) -> None:
    """Raises Damage where the last value of a row is not the checksum of the others; `what`: the row, in words."""
    if checksum(*row[:-1]) != row[-1]:
        raise Damage(f"{what} does not have its checksum")


def xor(checksums: Iterable[bytes]) -> bytes:
    """Raises Damage where one is none."""
    total = 0
    for item in checksums:
        if not isinstance(item, bytes) or len(item) != CHECKSUM_BYTES:
            raise Damage("a checksum has not the length of one")
        total ^= int.from_bytes(item, "big")
    return total.to_bytes(CHECKSUM_BYTES, "big")


def digest(secret: bytes, purpose: bytes, value: bytes) -> bytes:
    """What is stored in place of a value that must not outlive its subject but has to be recognised."""
    return hashlib.blake2b(value, key=secret, person=purpose, digest_size=16).digest()


def name_digest(secret: bytes, subject_id: str) -> bytes:
    """What a subject is found by."""
    return digest(secret, b"name", subject_id.encode())


def outcome(secret: bytes, key: str, request: bytes, answer: dict[str, Any], now: int) -> tuple[Any, ...]:
    """The row of what a change answered. Its key and request are kept as digests, and the subject's name is not.

    Whoever asks again sends all three again.
    """
    text = json.dumps({name: value for name, value in answer.items() if name != "subject_id"}).encode()
    values = (digest(secret, b"key", key.encode()), digest(secret, b"request", request), text, now)
    return (*values, checksum(*values))


def layout(connection: sqlite3.Connection) -> bytes:
    """The checksum of all definitions of tables and indexes."""
    rows = connection.execute(
        "SELECT type, name, tbl_name, sql FROM sqlite_schema WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%' "
        "ORDER BY type, name"
    )
    return checksum(*(str(value) for row in rows for value in row))


def read_gallery(connection: sqlite3.Connection) -> GalleryRow:
    """The gallery's row. Raises Damage where it is missing or damaged."""
    row = connection.execute(f"SELECT {GALLERY_COLUMNS}, checksum FROM gallery").fetchone()
    check("the gallery's own row", *(row or (NOTHING,)))
    return GalleryRow(*row[:-1])


def write_gallery(connection: sqlite3.Connection, row: GalleryRow) -> None:
    values = astuple(row)
    marks = ", ".join("?" * (len(values) + 1))
    connection.execute(
        f"INSERT OR REPLACE INTO gallery (id, {GALLERY_COLUMNS}, checksum) VALUES (1, {marks})",
        (*values, checksum(*values)),
    )


def recall(connection: sqlite3.Connection, secret: bytes, key: str, since: int) -> tuple[bytes, dict[str, Any]] | None:
    """What was remembered under a key since a moment: the digest of the request, and what was answered but the name."""
    row = connection.execute(
        "SELECT key, request, outcome, created, checksum FROM idempotency WHERE key = ? AND created > ?",
        (digest(secret, b"key", key.encode()), since),
    ).fetchone()
    if row is None:
        return None
    check("the answer under an idempotency key", *row)
    return row[1], json.loads(row[2])
