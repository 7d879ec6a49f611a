"""Rows that never move, checksums over whole rows, digests in place of names and keys."""

import hashlib
import json
import secrets
import sqlite3
import uuid
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from alembic import op

from serving.storage import rows
from serving.storage.migrations import raw_connection, target
from serving.storage.schema import Target

revision, down_revision = "0002", "0001"


def upgrade() -> None:
    """Raises Damage where a sample does not have the checksum that it was written with."""
    for table in ("subjects", "samples", "idempotency"):
        op.execute(f"ALTER TABLE {table} RENAME TO old_{table}")
    for statement in (
        """CREATE TABLE gallery (
            id INTEGER PRIMARY KEY CHECK (id = 1), uid BLOB NOT NULL, secret BLOB NOT NULL,
            model_id TEXT NOT NULL, dimension INTEGER NOT NULL,
            subjects INTEGER NOT NULL, samples INTEGER NOT NULL, revision INTEGER NOT NULL,
            content BLOB NOT NULL, layout BLOB NOT NULL, created INTEGER NOT NULL, checksum BLOB NOT NULL
        ) STRICT""",
        # Erased: without a digest, all else empty. Numbers order the list of subjects and are never given twice.
        """CREATE TABLE subjects (
            id INTEGER PRIMARY KEY, digest BLOB,
            created INTEGER NOT NULL, checksum BLOB NOT NULL, name BLOB NOT NULL
        ) STRICT""",
        """CREATE TABLE samples (
            id INTEGER PRIMARY KEY, subject_id INTEGER NOT NULL REFERENCES subjects (id),
            created INTEGER NOT NULL, sample_id BLOB NOT NULL, checksum BLOB NOT NULL, vector BLOB NOT NULL
        ) STRICT""",
        # What a change under an Idempotency-Key answered; written in the change's own transaction.
        """CREATE TABLE idempotency (
            key BLOB PRIMARY KEY, request BLOB NOT NULL, outcome BLOB NOT NULL,
            created INTEGER NOT NULL, checksum BLOB NOT NULL
        ) STRICT, WITHOUT ROWID""",
    ):
        op.execute(statement)
    _carry_over(raw_connection(), target())
    for statement in (
        *(f"DROP TABLE {table}" for table in ("old_samples", "old_subjects", "old_idempotency", "galleries")),
        "CREATE UNIQUE INDEX subjects_by_digest ON subjects (digest) WHERE digest IS NOT NULL",
        "CREATE INDEX samples_of_subject ON samples (subject_id)",
        "CREATE INDEX idempotency_by_age ON idempotency (created)",
    ):
        op.execute(statement)


def _carry_over(connection: sqlite3.Connection, target: Target) -> None:
    """The rows of the first schema into the tables of the second, and the gallery's row."""
    old = connection.execute("SELECT subjects, samples, revision, created FROM galleries").fetchone()
    subjects, samples, revision, created = old or (0, 0, 0, None)
    secret = secrets.token_bytes(32)
    connection.execute("INSERT INTO subjects VALUES (?, NULL, 0, x'', x'')", (rows.NOBODY,))
    connection.executemany("INSERT INTO subjects VALUES (?, ?, ?, ?, ?)", _old_subjects(connection, secret))
    connection.executemany(
        "INSERT INTO samples (subject_id, created, sample_id, checksum, vector) VALUES (?, ?, ?, ?, ?)",
        _old_samples(connection),
    )
    connection.executemany("INSERT INTO idempotency VALUES (?, ?, ?, ?, ?)", _old_outcomes(connection, secret))
    seals = "SELECT checksum FROM subjects WHERE id <> ? UNION ALL SELECT checksum FROM samples"
    row = rows.GalleryRow(
        uid=secrets.token_bytes(16),
        secret=secret,
        model_id=target.model_id,
        dimension=target.dimension,
        subjects=subjects,
        samples=samples,
        revision=revision,
        content=rows.xor(seal for (seal,) in connection.execute(seals, (rows.NOBODY,))),
        layout=rows.NOTHING,
        created=_milliseconds(created) if created else target.now,
    )
    rows.write_gallery(connection, row)


def _old_subjects(connection: sqlite3.Connection, secret: bytes) -> Iterator[tuple[Any, ...]]:
    for number, name, text in connection.execute("SELECT id, external_id, created FROM old_subjects ORDER BY id"):
        values = (rows.NOBODY + number, rows.name_digest(secret, name), _milliseconds(text))
        yield (*values, rows.checksum(*values, name.encode()), name.encode())


def _old_samples(connection: sqlite3.Connection) -> Iterator[tuple[Any, ...]]:
    for number, name, sample_id, vector, was, text in connection.execute(
        "SELECT subject_id, external_id, sample_id, vector, checksum, old_samples.created "
        "FROM old_samples CROSS JOIN old_subjects ON old_subjects.id = subject_id ORDER BY old_samples.id"
    ):
        if was != hashlib.blake2b(f"{name}\0{sample_id}\0".encode() + vector, digest_size=16).digest():
            raise rows.Damage(f"sample '{sample_id}' does not have its checksum")
        values = (rows.NOBODY + number, _milliseconds(text), uuid.UUID(sample_id).bytes)
        yield (*values, rows.checksum(*values, name.encode(), vector), vector)


def _old_outcomes(connection: sqlite3.Connection, secret: bytes) -> Iterator[tuple[Any, ...]]:
    for key, request, answer, text in connection.execute("SELECT key, request, outcome, created FROM old_idempotency"):
        yield rows.outcome(secret, key, request, json.loads(answer), _milliseconds(text))


def _milliseconds(text: str) -> int:
    return round(datetime.fromisoformat(text).timestamp() * 1000)
