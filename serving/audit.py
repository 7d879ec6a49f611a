"""Whether a store holds what was written to it: SQLite's own checks, and the checksums of its rows."""

import contextlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from serving.rows import Damage, checksum

STEPS_A_QUESTION = 100_000  # SQLite's steps, a few milliseconds


@contextlib.contextmanager
def interruptible(connection: sqlite3.Connection, stopping: Callable[[], bool]) -> Iterator[None]:
    """Within it, a statement ends with sqlite3.OperationalError soon after `stopping` begins to return true."""
    connection.set_progress_handler(lambda: int(stopping()), STEPS_A_QUESTION)
    try:
        yield
    finally:
        connection.set_progress_handler(None, 0)


def check_structure(connection: sqlite3.Connection) -> None:
    """Read every page: trees, free pages, indexes against their tables, references. Raises Damage."""
    (verdict,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if verdict != "ok":
        raise Damage(" ".join(str(verdict).split()))  # one line
    orphan = connection.execute("PRAGMA foreign_key_check").fetchone()
    if orphan is not None:
        raise Damage(f"row {orphan[1]} of '{orphan[0]}' belongs to nobody")


def check_subject(row: Sequence[Any]) -> None:
    """Raises Damage where `id, digest, created, name, checksum` do not fit."""
    if checksum(*row[:-1]) != row[-1]:
        raise Damage(f"subject number {row[0]} does not have its checksum")


def check_subjects(connection: sqlite3.Connection) -> None:
    """Raises Damage where a subject does not have its checksum."""
    for row in connection.execute("SELECT id, digest, created, name, checksum FROM subjects WHERE digest IS NOT NULL"):
        check_subject(row)


def check_outcomes(connection: sqlite3.Connection) -> None:
    """Raises Damage where a remembered answer does not have its checksum."""
    for *values, seal in connection.execute("SELECT key, request, outcome, created, checksum FROM idempotency"):
        if checksum(*values) != seal:
            raise Damage("the answer under an idempotency key does not have its checksum")
