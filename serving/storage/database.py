"""The SQLite file under a store: one owner, flushed to the disk, and refused where it lost what was acknowledged.

A store is up to four files: the database, SQLite's `-wal` and `-shm`, and the `-mark` (see `serving.storage.mark`).

Nothing is written before the files have been found to belong together. This matters because SQLite replays any
write-ahead log that it finds beside a database, an older one or another store's too.
"""

import contextlib
import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from serving.storage.mark import Mark, MarkDamaged, Reached, make_mark, mark_path, read_mark
from serving.storage.rows import Damage, GalleryRow, layout, read_gallery
from serving.storage.schema import APPLICATION_ID, VERSION, Target, create
from serving.storage.sealing import SECRET_BYTES
from trainer.atomic import sync
from trainer.errors import UserError

# A vector of 512 dimensions and its row take 2.1 KB, of which seven fit a page of 16 KiB (see docs/storage.md).
PAGE_BYTES = 16384
LOG_PAGES = 512  # SQLite folds the log into the file by itself from here on
RESTORE = "put back what is missing, or restore a backup and start once with --restored (see docs/storage.md)"


class Moved(OSError):
    """A file of an open store was removed or replaced."""


class Database:
    """The file of an open store, its mark, and two connections, of which each is used by who has its lock."""

    def __init__(self, target: Target, restored: bool) -> None:
        """Open or make the store at `target.path`.

        SQLite folds the log into the database when the last connection is closed, whatever database that is. So a
        connection that has found nothing wrong with the files, and cannot write, stays open until the others are
        closed: a refusal leaves the files as they were, to be put right.

        Args:
            restored: take the store as it is, and write its mark anew.

        Raises:
            UserError: it is in use, or refused.
            sqlite3.Error: it is damaged.
            OSError: a file cannot be made or written.
        """
        path, mark = target.path, mark_path(target.path)
        self._path = path
        self.write_lock, self.read_lock = threading.Lock(), threading.Lock()
        self.unfolded = True  # a kill may have come between a deletion and the folding of its log
        self.trusted = False  # found to be whole; only then is the log folded when it is closed
        self._guard: sqlite3.Connection | None = None  # none where the store is new
        with contextlib.ExitStack() as stack:
            stack.enter_context(_owned(target))
            if path.stat().st_size:
                self._guard = stack.enter_context(contextlib.closing(_connect(path, "ro")))
                _refuse_unsafe(self._guard, target, restored)
            self.writer = stack.enter_context(_connected(path))
            _bring_up_to_date(self.writer, target)
            self.reader = stack.enter_context(_connected(path))
            row = read_gallery(self.reader)
            self.uid, self.vault, reached = row.uid, target.vault, Reached(row.uid, row.revision)
            self.secret = target.vault.secret(row.secret, target.named)
            if restored:
                make_mark(mark, reached)
            self._mark = Mark(mark, reached)
            stack.callback(self._mark.close)
            self._mark.move(row.revision)  # the last change may have been committed, but neither noted nor acknowledged
            self._inodes = {file: _inode(file) for file in (path, Path(f"{path}-wal"), mark)}
            self._opened = stack.pop_all()

    def close(self) -> None:
        """Close the file; its log is folded into it. Idempotent."""
        with self.write_lock, self.read_lock:
            if self.trusted and self._guard:
                self._guard.close()
            self._opened.close()

    def check_in_place(self) -> None:
        """Raises Moved where a file is not: SQLite would go on writing into one that nobody can open any more."""
        for file, inode in self._inodes.items():
            if _inode(file) != inode:
                raise Moved(
                    f"the file '{file}' was removed or replaced while the store was open, so nothing more is written; "
                    "stop the service, put the file back, and start again"
                )

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing; on disk, and noted in the mark, when it is left without an exception."""
        with self.write_lock:
            self._note()  # what a disk error kept from being noted; the mark is never more than one change behind
            self.check_in_place()
            self.writer.execute("BEGIN IMMEDIATE")
            try:
                yield self.writer
                self.writer.execute("COMMIT")
            finally:
                if self.writer.in_transaction:
                    self.writer.execute("ROLLBACK")
            self._note()
            self.trusted = True

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The reader, and nobody else's."""
        with self.read_lock:
            yield self.reader

    @contextlib.contextmanager
    def another(self) -> Iterator[sqlite3.Connection]:
        """A reader for one who takes long."""
        with contextlib.closing(_connect(self._path, "ro")) as connection:
            yield connection

    def _note(self) -> None:
        (revision,) = self.writer.execute("SELECT revision FROM gallery").fetchone()
        if revision != self._mark.reached.revision:
            self._mark.move(revision)

    def fold_log(self) -> None:
        """Move the log into the file and empty it, so that erased rows do not stay in old frames.

        Where a disk error or another program's reader keeps it from doing so, the next call does it.
        """
        with self.write_lock, self.read_lock, contextlib.suppress(sqlite3.Error):
            if self.unfolded:
                (busy, _, _) = self.writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                self.unfolded = bool(busy)


@contextlib.contextmanager
def _owned(target: Target) -> Iterator[None]:
    """Hold the file itself against other processes, by whatever name they reach it; made with mode 0600 if missing.

    The descriptor is closed after SQLite's: closing any descriptor of a file drops the locks that SQLite has on it.
    """
    store, real, mark = f"the store '{target.named}'", target.path, mark_path(target.path)
    if mark.exists() and not (real.exists() and real.stat().st_size):
        raise UserError(
            f"{store} is missing or empty, but its mark '{mark}' says that it was not; {RESTORE}; to begin an empty "
            "gallery, remove the mark"
        )
    file = os.open(real, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process exits
        except BlockingIOError as error:
            raise UserError(
                f"{store} is in use by another process; stop that one, or give --store another file"
            ) from error
        held = os.fstat(file)
        if _inode(real) != (held.st_dev, held.st_ino):
            raise UserError(f"{store} was replaced while it was opened; start again")
        sync(real.parent)  # SQLite does not flush the entry of a new file
        yield
    finally:
        os.close(file)


@contextlib.contextmanager
def _connected(real: Path) -> Iterator[sqlite3.Connection]:
    """A connection in autocommit mode, usable from any thread by one at a time."""
    with contextlib.closing(_connect(real, "rw")) as connection:
        for pragma in (
            f"page_size={PAGE_BYTES}",  # of a new file only
            "journal_mode=WAL",
            "synchronous=FULL",  # flush the log at every commit; NORMAL can lose acknowledged changes in a power cut
            "foreign_keys=ON",
            "secure_delete=ON",
            "fullfsync=ON",
            "trusted_schema=OFF",
            "cell_size_check=ON",
            f"wal_autocheckpoint={LOG_PAGES}",
        ):
            connection.execute(f"PRAGMA {pragma}").fetchone()
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(f"PRAGMA user_version = {version}")  # fails where the file says that it must not be written
        connection.execute("ROLLBACK")
        yield connection


def _bring_up_to_date(connection: sqlite3.Connection, target: Target) -> None:
    """Make the tables of a new store, or lead those of an earlier version to the newest one."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version == 0:
        create(connection, target)
    elif version < VERSION:
        from serving.storage.migrations import migrate

        migrate(connection, target)
        connection.execute("VACUUM")  # without the pages of tables that a step dropped
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()


def _connect(real: Path, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(  # waits for other programs, which at most copy the store, but not for long
        f"{real.as_uri()}?mode={mode}", uri=True, isolation_level=None, check_same_thread=False, timeout=0.2
    )


def _refuse_unsafe(connection: sqlite3.Connection, target: Target, restored: bool) -> None:
    """Refuse another program's database, a newer schema, another model, and one that lacks acknowledged changes."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if application != APPLICATION_ID and (application or tables or version):
        raise UserError(
            f"'{target.named}' is another program's database, not a gallery's store; give --store a new file"
        )
    if not 0 <= version <= VERSION:
        raise UserError(
            f"the store '{target.named}' has schema {version}, but this version of Hypersphere knows only up to "
            f"{VERSION}; use the version that wrote it, or a newer one"
        )
    row = read_gallery(connection) if version >= 2 else None
    if version == VERSION and row is not None and row.layout != layout(connection):
        raise Damage("the definitions of its tables do not have their checksum")
    if row is not None or version == 1:
        target.vault.secret(row.secret if row else bytes(SECRET_BYTES), target.named)
    model = (row.model_id, row.dimension) if row else None
    if version == 1:
        model = connection.execute("SELECT model_id, dimension FROM galleries").fetchone()
    if model is not None and model != (target.model_id, target.dimension):
        raise UserError(
            f"the store '{target.named}' holds vectors of model {model[0]} (dimension {model[1]}), but the embedder "
            f"is model {target.model_id} (dimension {target.dimension}), and vectors of two models cannot be compared; "
            "serve the embedder that filled the store, or give --store a new file and enrol again"
        )
    if not restored:
        _refuse_loss(target, version, row)


def _refuse_loss(target: Target, version: int, row: GalleryRow | None) -> None:
    """Compare the database, as SQLite sees it with the log that it found, with the mark."""
    file, log = mark_path(target.path), Path(f"{target.path}-wal")
    store, mark = f"the store '{target.named}'", f"the mark '{file}' of the store '{target.named}'"
    try:
        reached = read_mark(file)
    except MarkDamaged as error:
        raise UserError(f"{mark} is damaged: {error}; {RESTORE}") from error
    except OSError as error:
        raise UserError(f"{mark} cannot be read: {error.strerror}") from error
    if reached is None:
        if version > 2:
            raise UserError(f"{mark} is missing; {RESTORE}")
        return
    if row is None and reached.revision == 0:
        return  # a kill came between the mark of a new store and its tables; nothing was acknowledged
    state = f"'{log}' is {'damaged or of another time' if log.exists() and log.stat().st_size else 'missing'}"
    if row is None:
        raise UserError(
            f"{store} is older than its mark '{file}', or its write-ahead log {state}; {reached.revision} changes were "
            f"acknowledged; {RESTORE}"
        )
    if reached.uid != row.uid:
        raise UserError(f"{store} and its mark '{file}' belong to different stores; {RESTORE}")
    if row.revision < reached.revision:
        raise UserError(
            f"{store} is at revision {row.revision}, but {reached.revision} changes were acknowledged: the database is "
            f"an older copy, or its write-ahead log {state}; {RESTORE}"
        )
    if row.revision > reached.revision + 1:
        raise UserError(
            f"{store} is at revision {row.revision}, but its mark '{file}' at {reached.revision}: the mark is an older "
            f"copy; {RESTORE}"
        )


def _inode(file: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def begun(path: Path) -> bool:
    """Whether anything was ever written into a store: False of what a creation leaves that was cut off.

    Raises:
        UserError: it cannot be read, or is another program's database.
    """
    if not path.exists() or not path.stat().st_size:
        return False
    with _looked_into(path) as connection:
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if application != APPLICATION_ID and (application or tables or version):
        raise UserError(f"'{path}' is another program's database, not a gallery's store; move it away")
    return bool(tables or version)


def pinned(path: Path) -> str | None:
    """The model whose vectors a store holds; None where it is not there or begun. O(1).

    Raises:
        UserError: it cannot be read.
    """
    if not begun(path):
        return None
    with _looked_into(path) as connection:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        table = "galleries" if version == 1 else "gallery"
        found = connection.execute(f"SELECT model_id FROM {table}").fetchone()
        return found[0] if found else None


@contextlib.contextmanager
def _looked_into(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that writes nothing. Raises UserError for what SQLite says against the file."""
    try:
        with contextlib.closing(_connect(path.resolve(), "ro")) as connection:
            yield connection
    except sqlite3.Error as error:
        raise UserError(f"the store '{path}' cannot be read: {error}; restore it from a backup") from error
