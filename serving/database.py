"""The SQLite file under a store: one owner at a time, flushed to the disk, with a schema in numbered steps.

`PRAGMA user_version` holds the number of steps that a file has been through. A step that was released is never changed;
a new one is added after it.
"""

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from trainer.errors import UserError

APPLICATION_ID = 0x48595053  # "HYPS", in the header of the SQLite file: tells a store from any other database

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        # One row a gallery. `revision` counts acknowledged changes; the index carries the number it has reached.
        """CREATE TABLE galleries (
            id INTEGER PRIMARY KEY,
            name TEXT NOT NULL UNIQUE,
            model_id TEXT NOT NULL,
            dimension INTEGER NOT NULL CHECK (dimension > 0),
            subjects INTEGER NOT NULL DEFAULT 0 CHECK (subjects >= 0),
            samples INTEGER NOT NULL DEFAULT 0 CHECK (samples >= 0),
            revision INTEGER NOT NULL DEFAULT 0,
            created TEXT NOT NULL
        ) STRICT""",
        # AUTOINCREMENT: a number is never given twice, so pages ordered by it neither repeat nor skip a subject.
        """CREATE TABLE subjects (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            gallery_id INTEGER NOT NULL REFERENCES galleries (id) ON DELETE CASCADE,
            external_id TEXT NOT NULL,
            created TEXT NOT NULL,
            UNIQUE (gallery_id, external_id)
        ) STRICT""",
        # `checksum` covers the subject's and the sample's id and the vector: a changed byte in any of them is found.
        """CREATE TABLE samples (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            subject_id INTEGER NOT NULL REFERENCES subjects (id) ON DELETE CASCADE,
            sample_id TEXT NOT NULL UNIQUE,
            vector BLOB NOT NULL,
            checksum BLOB NOT NULL,
            created TEXT NOT NULL
        ) STRICT""",
        "CREATE INDEX samples_of_subject ON samples (subject_id)",
        # What a change under an Idempotency-Key answered; written in the change's own transaction.
        """CREATE TABLE idempotency (
            key TEXT PRIMARY KEY,
            request BLOB NOT NULL,
            outcome TEXT NOT NULL,
            created TEXT NOT NULL
        ) STRICT, WITHOUT ROWID""",
        "CREATE INDEX idempotency_by_age ON idempotency (created)",
    ),
)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[int]:
    """Hold `path`.lock against other processes; the operating system lets go of it when this one ends, however."""
    try:
        file = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UserError(
            f"the store '{path}' cannot be used: {error.strerror}; --store takes a file in a folder that can be written"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield file
    except BlockingIOError as error:
        raise UserError(
            f"the store '{path}' is in use by another process; stop that one, or give --store another file"
        ) from error
    finally:
        os.close(file)


def create(path: Path) -> None:
    """Make an empty file readable by its owner only, and flush the folder: SQLite does not flush that entry itself."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        raise UserError(
            f"the store '{path}' cannot be written: {error.strerror}; --store takes a file in a folder that can be "
            "written"
        ) from error


@contextlib.contextmanager
def connect(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection in autocommit mode, usable from any thread by one at a time. Changes nothing in a foreign file.

    Raises:
        UserError: the file is another program's database.
    """
    with contextlib.closing(
        sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
    ) as connection:
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        tables = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        if application != APPLICATION_ID and (application or tables):
            raise UserError(f"'{path}' is another program's database, not a gallery's store; give --store a new file")
        for pragma in (
            "journal_mode=WAL",
            "synchronous=FULL",  # flush the log at every commit; NORMAL can lose acknowledged changes in a power cut
            "foreign_keys=ON",
            "secure_delete=ON",
            "fullfsync=ON",
            "trusted_schema=OFF",
            "cell_size_check=ON",
        ):
            connection.execute(f"PRAGMA {pragma}")
        yield connection


def verify(connection: sqlite3.Connection, path: Path) -> None:
    """Read the structure of every page.

    Raises:
        UserError: the file is damaged.
    """
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise UserError(f"the store '{path}' is damaged ({verdict}); restore it from a backup")


def migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Bring the schema up to date, one transaction a step."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise UserError(
            f"the store '{path}' has schema {version}, but this version of Hypersphere knows only up to "
            f"{len(MIGRATIONS)}; use the version that wrote it, or a newer one"
        )
    for number, statements in enumerate(MIGRATIONS[version:], version + 1):
        connection.execute("BEGIN IMMEDIATE")
        for statement in (f"PRAGMA application_id = {APPLICATION_ID}", *statements, f"PRAGMA user_version = {number}"):
            connection.execute(statement)
        connection.execute("COMMIT")
