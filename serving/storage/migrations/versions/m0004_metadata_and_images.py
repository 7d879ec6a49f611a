"""Metadata, quality and images of what is enrolled; and of each subject the revision of its last change."""

import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from alembic import op

from serving.storage import rows
from serving.storage.migrations import raw_connection

revision, down_revision = "0004", "0003"

UNKNOWN = bytes.fromhex("000000000000f87f")  # a quality: NaN as a double, its low byte first


def upgrade() -> None:
    """Raises Damage where a row, or all of them together, do not have their checksum."""
    for table in ("subjects", "samples"):
        op.execute(f"ALTER TABLE {table} RENAME TO old_{table}")
    for statement in (
        """CREATE TABLE subjects (
            id INTEGER PRIMARY KEY, digest BLOB, created INTEGER NOT NULL, updated INTEGER NOT NULL,
            revision INTEGER NOT NULL, key BLOB NOT NULL, checksum BLOB NOT NULL, name BLOB NOT NULL
        ) STRICT""",
        """CREATE TABLE samples (
            id INTEGER PRIMARY KEY, subject_id INTEGER NOT NULL REFERENCES subjects (id), created INTEGER NOT NULL,
            sample_id BLOB NOT NULL, quality BLOB NOT NULL, checksum BLOB NOT NULL, vector BLOB NOT NULL
        ) STRICT""",
        """CREATE TABLE metadata (
            id INTEGER PRIMARY KEY, owner INTEGER NOT NULL, checksum BLOB NOT NULL, content BLOB NOT NULL
        ) STRICT""",
        """CREATE TABLE images (
            id INTEGER PRIMARY KEY, owner INTEGER NOT NULL, checksum BLOB NOT NULL, content BLOB NOT NULL
        ) STRICT""",
        """CREATE TABLE attributes (
            attribute INTEGER NOT NULL, subject_id INTEGER NOT NULL, PRIMARY KEY (attribute, subject_id)
        ) STRICT, WITHOUT ROWID""",
    ):
        op.execute(statement)
    _carry_over(raw_connection())
    for statement in (
        "DROP TABLE old_samples",
        "DROP TABLE old_subjects",
        "CREATE UNIQUE INDEX subjects_by_digest ON subjects (digest) WHERE digest IS NOT NULL",
        "CREATE INDEX samples_of_subject ON samples (subject_id)",
        "CREATE INDEX metadata_of_owner ON metadata (owner)",
        "CREATE INDEX images_of_owner ON images (owner)",
    ):
        op.execute(statement)


def _carry_over(connection: sqlite3.Connection) -> None:
    """The rows of the third schema into the tables of the fourth. All get the revision that the gallery is at."""
    row, before = rows.read_gallery(connection), list[bytes]()
    revision = rows.NOBODY + row.revision
    connection.executemany(
        "INSERT INTO subjects VALUES (?, ?, ?, ?, ?, x'', ?, ?)", _subjects(connection, revision, before)
    )
    connection.executemany(
        "INSERT INTO samples (subject_id, created, sample_id, quality, checksum, vector) VALUES (?, ?, ?, ?, ?, ?)",
        _samples(connection, before),
    )
    if rows.xor(before) != row.content:
        raise rows.Damage("its rows are sound, but not all of them the right ones")
    after = "SELECT checksum FROM subjects WHERE id <> ? UNION ALL SELECT checksum FROM samples"
    content = rows.xor(seal for (seal,) in connection.execute(after, (rows.NOBODY,)))
    rows.write_gallery(connection, replace(row, content=content))


def _subjects(connection: sqlite3.Connection, revision: int, before: list[bytes]) -> Iterator[tuple[Any, ...]]:
    for number, digest, created, name, seal in connection.execute(
        "SELECT id, digest, created, name, checksum FROM old_subjects ORDER BY id"
    ):
        if digest is not None:
            rows.check(f"subject number {number}", number, digest, created, name, seal)
            before.append(seal)
        values = number, digest, created, created, revision
        new = rows.NOTHING if number == rows.NOBODY else rows.checksum(*values, b"", name)
        yield *values, new, name


def _samples(connection: sqlite3.Connection, before: list[bytes]) -> Iterator[tuple[Any, ...]]:
    for place, *values, name, vector, seal in connection.execute(
        "SELECT old_samples.id, subject_id, old_samples.created, sample_id, name, vector, old_samples.checksum "
        "FROM old_samples CROSS JOIN old_subjects ON old_subjects.id = subject_id "
        "WHERE subject_id <> ? ORDER BY old_samples.id",
        (rows.NOBODY,),
    ):
        rows.check(f"sample number {place}", *values, name, vector, seal)
        before.append(seal)
        yield *values, UNKNOWN, rows.checksum(*values, UNKNOWN, name, vector), vector
