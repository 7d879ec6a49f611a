"""What a change does to the rows of a store, within a transaction of its caller."""

import sqlite3
import uuid
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from serving.migrations import NOBODY
from serving.rows import checksum, digest, read_gallery, write_gallery, xor


def name_digest(secret: bytes, subject_id: str) -> bytes:
    """What a subject is found by."""
    return digest(secret, b"name", subject_id.encode())


def find_or_add_subject(
    connection: sqlite3.Connection, secret: bytes, subject_id: str, now: int
) -> tuple[int, bool, list[bytes]]:
    """The subject's number; whether it was made just now, and then its checksum."""
    known_by = name_digest(secret, subject_id)
    row = connection.execute("SELECT id FROM subjects WHERE digest = ?", (known_by,)).fetchone()
    if row is not None:
        return row[0], False, []
    (last,) = connection.execute("SELECT max(id) FROM subjects").fetchone()  # rows of erased subjects stay
    name = subject_id.encode()
    values = (last + 1, known_by, now)
    seal = checksum(*values, name)
    connection.execute(
        "INSERT INTO subjects (id, digest, created, checksum, name) VALUES (?, ?, ?, ?, ?)", (*values, seal, name)
    )
    return values[0], True, [seal]


def add_samples(
    connection: sqlite3.Connection, number: int, subject_id: str, vectors_BD: NDArray[np.float32], now: int
) -> tuple[tuple[str, ...], list[bytes]]:
    """Write samples of the subject `number`, into free places first; their ids and checksums."""
    free = connection.execute("SELECT id FROM samples WHERE subject_id = ? LIMIT ?", (NOBODY, len(vectors_BD)))
    places = [place for (place,) in free]
    rows: list[tuple[int | None, int, int, bytes, bytes, bytes]] = []
    sample_ids = []
    for row, vector_D in enumerate(vectors_BD):
        sample_id, blob = uuid.uuid4(), vector_D.astype("<f4").tobytes()
        seal = checksum(number, now, sample_id.bytes, subject_id, blob)
        place = places[row] if row < len(places) else None  # None: behind the last row
        rows.append((place, number, now, sample_id.bytes, seal, blob))
        sample_ids.append(str(sample_id))
    connection.executemany(
        "INSERT INTO samples (id, subject_id, created, sample_id, checksum, vector) VALUES (?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (id) DO UPDATE SET subject_id = excluded.subject_id, created = excluded.created, "
        "sample_id = excluded.sample_id, checksum = excluded.checksum, vector = excluded.vector",
        rows,
    )
    return tuple(sample_ids), [row[4] for row in rows]


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
    row = replace(
        row,
        subjects=row.subjects + subjects,
        samples=row.samples + samples,
        revision=row.revision + 1,
        content=xor((row.content, *seals)),
    )
    write_gallery(connection, row)
    return row.subjects
