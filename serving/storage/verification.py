"""A store read through and compared with its checksums."""

import sqlite3
from collections.abc import Callable, Iterable

from serving.storage.documents import IMAGES, METADATA, OF_SAMPLE
from serving.storage.rows import NOBODY, Damage, check, checksum, xor

STEPS_A_QUESTION = 100_000  # SQLite's steps, a few milliseconds


def verify(
    connection: sqlite3.Connection,
    stopping: Callable[[], bool],
    attributes_of: Callable[[int], Iterable[int]] | None = None,
) -> None:
    """Read every page (trees, free pages, indexes against their tables, references), and all rows but the samples'.

    `attributes_of`: what a subject with this number is to be found by; None: leave that alone.

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
            "SELECT id, digest, created, updated, revision, key, name, checksum FROM subjects WHERE id <> ?", (NOBODY,)
        ):
            check(f"subject number {row[0]}", *row)
        for row in connection.execute("SELECT key, request, outcome, created, checksum FROM idempotency"):
            check("the answer under an idempotency key", *row)
        METADATA.verify(connection)
        IMAGES.verify(connection)
        if attributes_of is not None:
            _compare_attributes(connection, attributes_of)
    finally:
        connection.set_progress_handler(None, 0)


def _compare_attributes(connection: sqlite3.Connection, attributes_of: Callable[[int], Iterable[int]]) -> None:
    """Raises Damage where filters would find other subjects than those with the metadata."""
    described = connection.execute(
        "SELECT DISTINCT owner FROM metadata WHERE owner > ? AND owner < ?", (NOBODY, OF_SAMPLE)
    )
    right = xor(checksum(one, number) for (number,) in described for one in attributes_of(number))
    if right != xor(checksum(*row) for row in connection.execute("SELECT attribute, subject_id FROM attributes")):
        raise Damage("what subjects are filtered by is not what their metadata says")
