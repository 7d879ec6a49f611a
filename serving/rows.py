"""The rows of a store: what they carry against damage and curiosity, and what a change does to them.

Every row that an answer or a decision is taken from has a checksum over all its values. The gallery's row also has
`content`, the checksums of all living rows XORed together: a row that is missing, doubled, or left over from another
time is found by it, even where counts agree. (Wegman and Carter, New hash functions and their use in authentication and
set equality, 1981, section on set equality.) Names and keys are looked up by digests under a secret of the store.
"""

import hashlib
import json
import sqlite3
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHECKSUM_BYTES = 16
NOTHING = bytes(CHECKSUM_BYTES)
# SQLite stores every number from here on in eight bytes. It is also the number of nobody, who owns the free places.
NOBODY = 1 << 47
FORGOTTEN = frozenset({"subject_id", "number"})  # of what a change answered
STEPS_A_QUESTION = 100_000  # SQLite's steps, a few milliseconds
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
        content: XOR of the checksums of all subjects and samples.
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


def checksum(*values: bytes | str | int) -> bytes:
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
    text = json.dumps({name: value for name, value in answer.items() if name not in FORGOTTEN}).encode()
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


def verify(connection: sqlite3.Connection, stopping: Callable[[], bool]) -> None:
    """Read every page (trees, free pages, indexes against their tables, references), and all rows but the samples'.

    Raises:
        Damage: something is not as it was written.
        sqlite3.OperationalError: soon after `stopping` began to return true.
    """
    connection.set_progress_handler(lambda: int(stopping()), STEPS_A_QUESTION)
    try:
        (verdict,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if verdict != "ok":
            raise Damage(" ".join(str(verdict).split()))  # one line
        orphan = connection.execute("PRAGMA foreign_key_check").fetchone()
        if orphan is not None:
            raise Damage(f"row {orphan[1]} of '{orphan[0]}' belongs to nobody")
        for row in connection.execute(
            "SELECT id, digest, created, name, checksum FROM subjects WHERE digest IS NOT NULL"
        ):
            check(f"subject number {row[0]}", *row)
        for row in connection.execute("SELECT key, request, outcome, created, checksum FROM idempotency"):
            check("the answer under an idempotency key", *row)
    finally:
        connection.set_progress_handler(None, 0)


def find_subject(connection: sqlite3.Connection, secret: bytes, subject_id: str) -> tuple[int | None, int]:
    """The subject's number, None where nobody has the name; and its samples."""
    found = connection.execute(
        "SELECT id, (SELECT count(*) FROM samples WHERE subject_id = subjects.id) FROM subjects WHERE digest = ?",
        (name_digest(secret, subject_id),),
    ).fetchone()
    return found or (None, 0)


def add_subject(connection: sqlite3.Connection, secret: bytes, subject_id: str, now: int) -> tuple[int, bytes]:
    """A new subject's number and checksum."""
    known_by, name = name_digest(secret, subject_id), subject_id.encode()
    (last,) = connection.execute("SELECT max(id) FROM subjects").fetchone()  # rows of erased subjects stay
    seal = checksum(last + 1, known_by, now, name)
    connection.execute(
        "INSERT INTO subjects (id, digest, created, checksum, name) VALUES (?, ?, ?, ?, ?)",
        (last + 1, known_by, now, seal, name),
    )
    return last + 1, seal


def add_samples(
    connection: sqlite3.Connection, number: int, subject_id: str, vectors_BD: NDArray[np.float32], now: int
) -> tuple[list[str], list[bytes]]:
    """Write samples of the subject `number`, into free places first; their ids and checksums."""
    free = connection.execute("SELECT id FROM samples WHERE subject_id = ? LIMIT ?", (NOBODY, len(vectors_BD)))
    rows: list[tuple[int | None, int, int, bytes, bytes, bytes]] = []
    for place, vector_D in zip_longest([place for (place,) in free], vectors_BD):  # None: behind the last row
        sample_id, blob = uuid.uuid4().bytes, vector_D.astype("<f4").tobytes()
        rows.append((place, number, now, sample_id, checksum(number, now, sample_id, subject_id, blob), blob))
    connection.executemany(
        "INSERT INTO samples (id, subject_id, created, sample_id, checksum, vector) VALUES (?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (id) DO UPDATE SET subject_id = excluded.subject_id, created = excluded.created, "
        "sample_id = excluded.sample_id, checksum = excluded.checksum, vector = excluded.vector",
        rows,
    )
    return [str(uuid.UUID(bytes=row[3])) for row in rows], [row[4] for row in rows]


def erase_subject(connection: sqlite3.Connection, number: int, now: int) -> list[bytes]:
    """Overwrite a subject's rows where they stand (`serving.migrations` says why); the checksums of its samples."""
    seals = connection.execute("SELECT checksum FROM samples WHERE subject_id = ?", (number,)).fetchall()
    connection.execute(
        "UPDATE samples SET subject_id = ?, created = ?, sample_id = zeroblob(length(sample_id)), "
        "checksum = zeroblob(length(checksum)), vector = zeroblob(length(vector)) WHERE subject_id = ?",
        (NOBODY, now, number),
    )
    connection.execute(
        "UPDATE subjects SET digest = NULL, created = 0, checksum = x'', name = x'' WHERE id = ?", (number,)
    )
    return [seal for (seal,) in seals]


def count_change(connection: sqlite3.Connection, subjects: int, samples: int, seals: Sequence[bytes]) -> int:
    """One change more: counts, and the checksums of rows that came or went. The subjects that there are now."""
    row = read_gallery(connection)
    total, content = row.subjects + subjects, xor((row.content, *seals))
    row = replace(row, subjects=total, samples=row.samples + samples, revision=row.revision + 1, content=content)
    write_gallery(connection, row)
    return total


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
