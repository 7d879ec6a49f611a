"""The schema of a store, in steps. `PRAGMA user_version` holds the number of steps that a file has been through.

A step that was released is never changed; a new one is added after it.

Erasure rests on the layout. When SQLite rebalances a tree it copies rows between pages, and the old copy can stay in
the unused part of a page, where `secure_delete` does not reach it. So nothing that must be erased ever moves: rows of
`subjects` and `samples` are appended and never deleted, and an erased one is overwritten where it stands. Names are in
one tree only; the index over them holds digests. A row of `samples` has one length for ever (its numbers are stored in
eight and six bytes), so an erased one is a free place that the next sample takes without a page being rearranged.
"""

import hashlib
import json
import secrets
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from serving import rows
from serving.mark import Reached, make_mark, mark_path

APPLICATION_ID = 0x48595053  # "HYPS", in the header of the SQLite file: tells a store from any other database


@dataclass(frozen=True)
class Target:
    """The store that is opened: its file, as the operator calls it and where it is, and the model of its vectors."""

    named: Path
    path: Path
    model_id: str
    dimension: int
    now: int


def m001_create_tables(connection: sqlite3.Connection, target: Target) -> None:
    for statement in (
        """CREATE TABLE galleries (
            id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, model_id TEXT NOT NULL,
            dimension INTEGER NOT NULL CHECK (dimension > 0),
            subjects INTEGER NOT NULL DEFAULT 0 CHECK (subjects >= 0),
            samples INTEGER NOT NULL DEFAULT 0 CHECK (samples >= 0),
            revision INTEGER NOT NULL DEFAULT 0, created TEXT NOT NULL
        ) STRICT""",
        """CREATE TABLE subjects (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            gallery_id INTEGER NOT NULL REFERENCES galleries (id) ON DELETE CASCADE,
            external_id TEXT NOT NULL, created TEXT NOT NULL, UNIQUE (gallery_id, external_id)
        ) STRICT""",
        """CREATE TABLE samples (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            subject_id INTEGER NOT NULL REFERENCES subjects (id) ON DELETE CASCADE,
            sample_id TEXT NOT NULL UNIQUE, vector BLOB NOT NULL, checksum BLOB NOT NULL, created TEXT NOT NULL
        ) STRICT""",
        "CREATE INDEX samples_of_subject ON samples (subject_id)",
        """CREATE TABLE idempotency (
            key TEXT PRIMARY KEY, request BLOB NOT NULL, outcome TEXT NOT NULL, created TEXT NOT NULL
        ) STRICT, WITHOUT ROWID""",
        "CREATE INDEX idempotency_by_age ON idempotency (created)",
    ):
        connection.execute(statement)


def m002_nothing_erased_stays(connection: sqlite3.Connection, target: Target) -> None:
    """Rows that never move, checksums over whole rows, digests in place of names and keys.

    Raises:
        Damage: a sample does not have the checksum that it was written with.
    """
    for table in ("subjects", "samples", "idempotency"):
        connection.execute(f"ALTER TABLE {table} RENAME TO old_{table}")
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
        connection.execute(statement)
    _carry_over(connection, target)
    for statement in (
        *(f"DROP TABLE {table}" for table in ("old_samples", "old_subjects", "old_idempotency", "galleries")),
        "CREATE UNIQUE INDEX subjects_by_digest ON subjects (digest) WHERE digest IS NOT NULL",
        "CREATE INDEX samples_of_subject ON samples (subject_id)",
        "CREATE INDEX idempotency_by_age ON idempotency (created)",
    ):
        connection.execute(statement)


def m003_mark_acknowledged_changes(connection: sqlite3.Connection, target: Target) -> None:
    """From here on a store has a mark: the file is there before this step is committed."""
    row = rows.read_gallery(connection)
    make_mark(mark_path(target.path), Reached(row.uid, row.revision))


MIGRATIONS: tuple[Callable[[sqlite3.Connection, Target], None], ...] = (
    m001_create_tables,
    m002_nothing_erased_stays,
    m003_mark_acknowledged_changes,
)


def migrate(connection: sqlite3.Connection, target: Target) -> bool:
    """Bring the schema up to date, one transaction a step; whether there was anything to do.

    Raises:
        Damage: a row that a step reads is not as it was written.
    """
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    for number, step in enumerate(MIGRATIONS[version:], version + 1):
        connection.execute("BEGIN IMMEDIATE")
        try:
            step(connection, target)
        except ValueError as error:  # a date, a UUID or a JSON text of the first schema, which had no checksums on them
            raise rows.Damage(f"a row cannot be read ({error})") from error
        if number >= 2:
            rows.write_gallery(connection, replace(rows.read_gallery(connection), layout=rows.layout(connection)))
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {number}")
        connection.execute("COMMIT")
    return version < len(MIGRATIONS)


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
