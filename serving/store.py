"""The durable truth of a gallery: one SQLite file.

What is promised: when `enrol` or `delete` returns, the change is in the write-ahead log, log and mark have been flushed
to the disk, and so it survives a kill and a power cut; under one idempotency key it is applied exactly once; vectors of
another `model_id` never enter; of what was erased, no byte is left in any file.

One connection writes, another reads, each behind its own lock; readers do not wait for a writer's flush. One process
owns the file, since another one's index would miss the changes.
"""

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.audit import check_outcomes, check_structure, check_subject, check_subjects, interruptible
from serving.changes import add_samples, count_change, erase_subject, find_or_add_subject, name_digest
from serving.database import Moved, opened
from serving.migrations import NOBODY, Target
from serving.outcomes import Outcomes
from serving.records import (
    Deletion,
    Enrolment,
    IdempotencyKey,
    KeyReused,
    State,
    StoreError,
    SubjectFull,
    SubjectRow,
    SubjectUnknown,
)
from serving.rows import NOTHING, Damage, checksum, read_gallery, xor
from trainer.errors import UserError

__all__ = [
    "Deletion",
    "Enrolment",
    "IdempotencyKey",
    "KeyReused",
    "State",
    "Store",
    "StoreError",
    "SubjectFull",
    "SubjectRow",
    "SubjectUnknown",
    "never",
]

ROWS_A_READ = 1024
SAMPLES = (
    "SELECT samples.id, name, sample_id, vector, subject_id, samples.created, samples.checksum "
    # CROSS JOIN: in this order. SQLite would rather walk the subjects and sort, for every piece anew.
    "FROM samples CROSS JOIN subjects ON subjects.id = subject_id "
)
Piece = tuple[list[str], list[bytes], NDArray[np.float32]]


def never() -> bool:
    return False


class Store:
    """A gallery's subjects and samples in SQLite. All methods may be called from several threads.

    Every method raises StoreError when the disk or the database fails.
    """

    def __init__(
        self, path: Path, model_id: str, dimension: int, key_hours: float = 24.0, restored: bool = False
    ) -> None:
        """Open or create a store for vectors of `model_id`. O(1), unless an older schema has to be brought up to date.

        Args:
            path: the SQLite file; made with mode 0600 if missing.
            key_hours: how long an idempotency key is remembered.
            restored: the operator restored a backup: take the store as it is, though later changes are missing.

        Raises:
            UserError: the path cannot be used, is in use, is damaged, lost acknowledged changes, or holds vectors of
                another model.
        """
        self.path, self.model_id, self.dimension = path, model_id, dimension
        self._write_lock, self._read_lock = threading.Lock(), threading.Lock()
        target = Target(Path(os.path.realpath(path)), model_id, dimension, _now())
        with contextlib.ExitStack() as stack:
            try:
                self._database = stack.enter_context(opened(path, target, restored))
                self._secret = read_gallery(self._database.reader).secret
            except sqlite3.Error as error:
                raise UserError(
                    f"the store '{path}' cannot be opened: {error}; it must be a Hypersphere store on a disk that can "
                    "be written: check the path, or restore the file from a backup (see docs/storage.md)"
                ) from error
            except OSError as error:
                raise UserError(
                    f"the store '{path}' cannot be used: {error.strerror}; --store takes a file in a folder that "
                    "can be written, with room for it"
                ) from error
            self._opened = stack.pop_all()
        self._writer, self._reader = self._database.writer, self._database.reader
        self._outcomes = Outcomes(self._secret, round(key_hours * 3_600_000))
        self._unfolded = True  # a kill may have come between a deletion and the folding of its log

    def close(self) -> None:
        """Close the file; its log is folded into it. Idempotent."""
        with self._write_lock, self._read_lock:
            self._opened.close()

    def state(self) -> State:
        """Counts and revision as last committed, in O(1)."""
        return State(*self._read("SELECT subjects, samples, revision FROM gallery")[0])

    def check(self) -> State:
        """The state, after making sure that the files are where they were, and after what a disk error left undone."""
        state = self.state()
        with self._write_lock, self._failures():
            self._database.check_in_place()
        self._fold_log()
        return state

    def verify(self, stopping: Callable[[], bool] = never) -> None:
        """Read everything but the vectors, which `samples` checks. Readers wait meanwhile.

        Raises:
            UserError: the store is damaged.
            StoreError: the disk failed, or `stopping` returned true.
        """
        with self._read_lock, self._failures(UserError), interruptible(self._reader, stopping):
            check_structure(self._reader)
            check_subjects(self._reader)
            check_outcomes(self._reader)

    def enrol(
        self,
        subject_id: str,
        vectors_BD: NDArray[np.float32],
        max_samples: int = 100,
        key: IdempotencyKey | None = None,
    ) -> Enrolment:
        """Add samples to a subject, which is created where it is new.

        Raises:
            KeyReused: `key` stands for another request.
            SubjectFull: the subject would hold more than `max_samples`.
        """
        if vectors_BD.ndim != 2 or vectors_BD.shape[1] != self.dimension or not len(vectors_BD):
            raise ValueError(f"vectors of shape {vectors_BD.shape}; the gallery takes [B >= 1, {self.dimension}]")
        now = _now()
        with self._transaction() as connection:
            if key and (done := self._outcomes.enrolment(connection, key, subject_id, now)):
                return done
            number, created, seals = find_or_add_subject(connection, self._secret, subject_id, now)
            (held,) = connection.execute("SELECT count(*) FROM samples WHERE subject_id = ?", (number,)).fetchone()
            if held + len(vectors_BD) > max_samples:
                raise SubjectFull(
                    f"subject '{subject_id}' holds {held} samples and {len(vectors_BD)} more were sent; "
                    f"at most {max_samples} are allowed: send fewer, or delete the subject first"
                )
            sample_ids, more = add_samples(connection, number, subject_id, vectors_BD, now)
            size = count_change(connection, int(created), len(sample_ids), [*seals, *more])
            done = Enrolment(subject_id, sample_ids, created, held + len(sample_ids), size)
            self._outcomes.remember(connection, key, done, now)
            return done

    def delete(self, subject_id: str, key: IdempotencyKey | None = None) -> Deletion:
        """Erase a subject and its samples: their rows are overwritten, in the file and in its log.

        Raises:
            KeyReused: `key` stands for another request.
            SubjectUnknown: nobody of that id is enrolled.
        """
        now = _now()
        with self._transaction() as connection:
            if key and (done := self._outcomes.deletion(connection, key, subject_id, now)):
                return done
            row = connection.execute(
                "SELECT id, checksum FROM subjects WHERE digest = ?", (name_digest(self._secret, subject_id),)
            ).fetchone()
            if row is None:
                raise SubjectUnknown(f"no subject '{subject_id}' is enrolled; GET /v1/subjects lists them")
            seals = erase_subject(connection, row[0], now)
            count_change(connection, -1, -len(seals), [row[1], *seals])
            done = Deletion(subject_id, len(seals))
            self._outcomes.remember(connection, key, done, now)
            self._unfolded = True
        self._fold_log()
        return done

    def recall(self, key: IdempotencyKey, subject_id: str) -> Enrolment | None:
        """What an enrolment of `subject_id` under this key did, if it was done; spares embedding the images again.

        Raises:
            KeyReused: `key` stands for another request.
        """
        with self._read_lock, self._failures():
            return self._outcomes.enrolment(self._reader, key, subject_id, _now())

    def subjects(self, after: int, limit: int) -> list[SubjectRow]:
        """At most `limit` subjects behind position `after` (0: from the start), in order of enrolment."""
        rows = self._read(
            "SELECT id, digest, created, name, checksum, (SELECT count(*) FROM samples WHERE subject_id = subjects.id) "
            "FROM subjects WHERE id > ? AND digest IS NOT NULL ORDER BY id LIMIT ?",
            (after, limit),
        )
        with self._failures():
            for row in rows:
                check_subject(row[:5])
        return [SubjectRow(row[0], row[3].decode(), row[5], _text(row[2])) for row in rows]

    def samples(self, settled: bool = False) -> Iterator[Piece]:
        """Every sample, in pieces: subject ids, sample ids (16 bytes each), vectors [B, D].

        Args:
            settled: nobody writes meanwhile, so in the end all of it together must be what the gallery's row says.

        Raises:
            UserError: a sample does not have its checksum, or there are too few, too many, or other ones.
        """
        position, count, content = 0, 0, self._subject_content() if settled else NOTHING
        while rows := self._read(
            SAMPLES + "WHERE samples.id > ? AND subject_id <> ? ORDER BY samples.id LIMIT ?",
            (position, NOBODY, ROWS_A_READ),
        ):
            yield self._piece(rows)
            position, count = rows[-1][0], count + len(rows)
            content = xor((content, *(row[-1] for row in rows)))
        if settled:
            with self._read_lock, self._failures(UserError):
                row = read_gallery(self._reader)
                if (row.samples, row.content) != (count, content):
                    raise Damage(f"it counts {row.samples} samples and gave {count}, not all of them the right ones")
            self._database.trusted = True

    def samples_of(self, subject_id: str) -> Piece | None:
        """As a piece of `samples`, all of one subject; None where nobody of that id is enrolled."""
        rows = self._read(
            SAMPLES + "WHERE subject_id = (SELECT id FROM subjects WHERE digest = ?) ORDER BY samples.id",
            (name_digest(self._secret, subject_id),),
        )
        return self._piece(rows) if rows else None

    def _piece(self, rows: list[Any]) -> Piece:
        with self._failures(UserError):
            for place, name, sample_id, blob, number, created, seal in rows:
                if checksum(number, created, sample_id, name, blob) != seal or len(blob) != 4 * self.dimension:
                    raise Damage(f"sample number {place} does not have its checksum")
        vectors_BD = np.frombuffer(b"".join(row[3] for row in rows), "<f4").reshape(len(rows), self.dimension)
        return [row[1].decode() for row in rows], [row[2] for row in rows], vectors_BD.astype(np.float32)

    def _subject_content(self) -> bytes:
        return xor(seal for (seal,) in self._read("SELECT checksum FROM subjects WHERE digest IS NOT NULL"))

    def _read(self, sql: str, values: Sequence[object] = ()) -> list[Any]:
        with self._read_lock, self._failures():
            return self._reader.execute(sql, values).fetchall()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing; on disk, and noted in the mark, when it is left without an exception."""
        with self._write_lock, self._failures():
            self._note()  # what a disk error kept from being noted; the mark is never more than one change behind
            self._database.check_in_place()
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            finally:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
            self._note()
            self._database.trusted = True

    def _note(self) -> None:
        (revision,) = self._writer.execute("SELECT revision FROM gallery").fetchone()
        if revision != self._database.mark.reached.revision:
            self._database.mark.move(revision)

    def _fold_log(self) -> None:
        """Move the log into the file and empty it, so that erased rows do not stay in old frames.

        Where a disk error or another program's reader keeps it from doing so, the next deletion or `check` does it; the
        deletion itself is durable either way.
        """
        with self._write_lock, self._read_lock, contextlib.suppress(sqlite3.Error):
            if self._unfolded:
                (busy, _, _) = self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                self._unfolded = bool(busy)

    @contextlib.contextmanager
    def _failures(self, damage: type[Exception] = StoreError) -> Iterator[None]:
        """SQLite's and the disk's errors as StoreError, damage as `damage`."""
        try:
            yield
        except sqlite3.Error as error:
            if _is_damage(error):
                raise damage(
                    f"the store '{self.path}' is damaged: {error}; restore the file from a backup (see docs/storage.md)"
                ) from error
            name = getattr(error, "sqlite_errorname", type(error).__name__)
            raise StoreError(f"the store failed ({name}: {error}); nothing was changed") from error
        except Moved as error:
            raise StoreError(str(error)) from error
        except OSError as error:
            raise StoreError(
                f"the mark of the store '{self.path}' cannot be written ({error}); nothing was acknowledged"
            ) from error


def _is_damage(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte is the class of an error
    return isinstance(error, Damage) or code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _now() -> int:
    return time.time_ns() // 1_000_000


def _text(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds")
