"""The schema of a store, as a new one gets it. `PRAGMA user_version` is its number, `migrations` leads to it.

Erasure rests on the layout. When SQLite rebalances a tree it copies rows between pages, and the old copy can stay in
the unused part of a page, where `secure_delete` does not reach it. So nothing that must be erased ever moves: rows of
`subjects`, `samples`, `metadata` and `images` are appended and never deleted, and an erased one is overwritten where it
stands. Names are in one tree only; the indexes hold digests and numbers. A row has one length for ever (its numbers are
stored in eight and six bytes), so that an erased one of the last three tables is a free place that the next one takes
without a page being rearranged.
"""

import secrets
import sqlite3
from dataclasses import dataclass, field, replace
from pathlib import Path

from serving.storage import rows
from serving.storage.mark import Reached, make_mark, mark_path
from serving.storage.sealing import SECRET_BYTES, Vault

APPLICATION_ID = 0x48595053  # "HYPS", in the header of the SQLite file: tells a store from any other database
VERSION = 4
STATEMENTS = (
    """CREATE TABLE gallery (
            id INTEGER PRIMARY KEY CHECK (id = 1), uid BLOB NOT NULL, secret BLOB NOT NULL,
            model_id TEXT NOT NULL, dimension INTEGER NOT NULL,
            subjects INTEGER NOT NULL, samples INTEGER NOT NULL, revision INTEGER NOT NULL,
            content BLOB NOT NULL, layout BLOB NOT NULL, created INTEGER NOT NULL, checksum BLOB NOT NULL
        ) STRICT""",
    # Erased: without a digest, all else but number and revision zeros. Numbers order the list of subjects and are never
    # given twice. `key` is the subject's data key, wrapped, where the store is encrypted. `revision` is that of the
    # gallery at the subject's last change, and NOBODY, to be of one length.
    """CREATE TABLE subjects (
            id INTEGER PRIMARY KEY, digest BLOB, created INTEGER NOT NULL, updated INTEGER NOT NULL,
            revision INTEGER NOT NULL, key BLOB NOT NULL, checksum BLOB NOT NULL, name BLOB NOT NULL
        ) STRICT""",
    # `quality` is a double in eight bytes: SQLite stores 1.0 in none.
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
    # What subjects are filtered by: numbers that stand for a key of their metadata with its value.
    """CREATE TABLE attributes (
            attribute INTEGER NOT NULL, subject_id INTEGER NOT NULL, PRIMARY KEY (attribute, subject_id)
        ) STRICT, WITHOUT ROWID""",
    # What a change under an Idempotency-Key answered; written in the change's own transaction.
    """CREATE TABLE idempotency (
            key BLOB PRIMARY KEY, request BLOB NOT NULL, outcome BLOB NOT NULL,
            created INTEGER NOT NULL, checksum BLOB NOT NULL
        ) STRICT, WITHOUT ROWID""",
    "CREATE UNIQUE INDEX subjects_by_digest ON subjects (digest) WHERE digest IS NOT NULL",
    "CREATE INDEX samples_of_subject ON samples (subject_id)",
    "CREATE INDEX metadata_of_owner ON metadata (owner)",
    "CREATE INDEX images_of_owner ON images (owner)",
    "CREATE INDEX idempotency_by_age ON idempotency (created)",
)


@dataclass(frozen=True)
class Target:
    """The store that is opened: its file, as the operator calls it and where it is, and the model of its vectors."""

    named: Path
    path: Path
    model_id: str
    dimension: int
    now: int
    vault: Vault = field(default_factory=lambda: Vault(None))


def create(connection: sqlite3.Connection, target: Target) -> None:
    """Make an empty store, in one transaction; its mark is there before that is committed."""
    connection.execute("BEGIN IMMEDIATE")
    for statement in STATEMENTS:
        connection.execute(statement)
    connection.execute(
        "INSERT INTO subjects VALUES (?, NULL, 0, 0, ?, x'', ?, x'')", (rows.NOBODY, rows.NOBODY, rows.NOTHING)
    )
    row = rows.GalleryRow(
        uid=secrets.token_bytes(16),
        secret=target.vault.master.seal(b"secret", secrets.token_bytes(SECRET_BYTES)),
        model_id=target.model_id,
        dimension=target.dimension,
        subjects=0,
        samples=0,
        revision=0,
        content=rows.NOTHING,
        layout=rows.NOTHING,
        created=target.now,
    )
    rows.write_gallery(connection, row)
    make_mark(mark_path(target.path), Reached(row.uid, row.revision))
    commit(connection, VERSION)


def commit(connection: sqlite3.Connection, version: int) -> None:
    """End the transaction that brought the schema to this version."""
    if version >= 2:
        rows.write_gallery(connection, replace(rows.read_gallery(connection), layout=rows.layout(connection)))
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {version}")
    connection.execute("COMMIT")
