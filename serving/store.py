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
import time
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from serving import rows
from serving.changes import (
    BulkEnrolment,
    Deletion,
    Enrolment,
    IdempotencyKey,
    KeyReused,
    Piece,
    State,
    StoreError,
    SubjectFull,
    SubjectRow,
    SubjectUnknown,
)
from serving.database import Database, Moved
from serving.migrations import Target
from trainer.errors import UserError

ROWS_A_READ = 1024
SAMPLES = (
    "SELECT samples.id, subject_id, samples.created, sample_id, name, vector, samples.checksum "
    # CROSS JOIN: in this order. SQLite would rather walk the subjects and sort, for every piece anew.
    "FROM samples CROSS JOIN subjects ON subjects.id = subject_id "
)
BULK = frozenset({"items", "gallery_size"})  # what is remembered of an enrolment of many
Vectors = NDArray[np.float32]


Outcome = TypeVar("Outcome", Enrolment, Deletion)


class Store:
    """A gallery's subjects and samples in SQLite. All methods may be called from several threads.

    Every method raises StoreError when the disk or the database fails, and every one that takes a key KeyReused where
    the key stands for another request.
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
        self._keep_ms = round(key_hours * 3_600_000)
        try:
            self._database = Database(Target(path, Path(os.path.realpath(path)), model_id, dimension, _now()), restored)
        except sqlite3.Error as error:
            raise UserError(
                f"the store '{path}' cannot be opened: {error}; it must be a Hypersphere store on a disk that can be "
                "written: check the path, or restore the file from a backup (see docs/storage.md)"
            ) from error
        except OSError as error:
            raise UserError(
                f"the store '{path}' cannot be used: {error.strerror}; --store takes a file in a folder that can be "
                "written, with room for it"
            ) from error
        self._secret = self._database.secret

    def close(self) -> None:
        """Close the file; its log is folded into it. Idempotent."""
        self._database.close()

    def state(self) -> State:
        """Counts and revision as last committed, in O(1)."""
        return State(*self._read("SELECT subjects, samples, revision FROM gallery")[0])

    def check(self) -> State:
        """The state, after making sure that the files are where they were, and after what a disk error left undone."""
        state = self.state()
        with self._database.write_lock, self._failures():
            self._database.check_in_place()
        self._database.fold_log()
        return state

    def verify(self, stopping: Callable[[], bool] = lambda: False) -> None:
        """Read everything but the vectors, which `samples` checks. Readers wait meanwhile.

        Raises:
            UserError: the store is damaged.
            StoreError: the disk failed, or `stopping` returned true.
        """
        with self._database.read_lock, self._failures(UserError):
            rows.verify(self._database.reader, stopping)

    def enrol(
        self, subject_id: str, vectors_BD: Vectors, max_samples: int = 100, key: IdempotencyKey | None = None
    ) -> Enrolment:
        """Add samples to a subject, which is created where it is new. The vectors' lengths are not looked at.

        Raises:
            SubjectFull: the subject would hold more than `max_samples`.
        """
        self._check_shape(vectors_BD)
        now = _now()
        with self._failures(), self._database.transaction() as connection:
            if done := self._done_before(Enrolment, connection, key, subject_id):
                return done
            done, seals = self._add(connection, subject_id, vectors_BD, max_samples, now)
            size = rows.count_change(connection, int(done.subject_created), len(vectors_BD), seals)
            done = replace(done, gallery_size=size)
            self._remember(connection, key, asdict(done), now)
            return done

    def enrol_many(
        self, items: Sequence[tuple[str, Vectors]], max_samples: int = 100, key: IdempotencyKey | None = None
    ) -> BulkEnrolment:
        """`enrol` for many subjects, in one change. An item that is refused leaves the others alone; a subject may come
        more than once."""
        for _, vectors_BD in items:
            self._check_shape(vectors_BD)
        now, results = _now(), list[Enrolment | SubjectFull]()
        with self._failures(), self._database.transaction() as connection:
            if found := self._remembered(connection, key):
                return BulkEnrolment.remembered(found, [subject_id for subject_id, _ in items])
            seals, subjects, samples = list[bytes](), 0, 0
            for subject_id, vectors_BD in items:
                try:
                    done, more = self._add(connection, subject_id, vectors_BD, max_samples, now)
                except SubjectFull as refusal:
                    results.append(refusal)
                    continue
                results.append(done)
                seals += more
                subjects, samples = subjects + done.subject_created, samples + len(vectors_BD)
            size = rows.count_change(connection, subjects, samples, seals)
            bulk = BulkEnrolment(tuple(results), size)
            self._remember(connection, key, bulk.to_remember(), now)
        return bulk

    def _add(
        self, connection: sqlite3.Connection, subject_id: str, vectors_BD: Vectors, max_samples: int, now: int
    ) -> tuple[Enrolment, list[bytes]]:
        """Write the samples; what was done, as far as it is known now, and the checksums of all new rows."""
        number, held = rows.find_subject(connection, self._secret, subject_id)
        if held + len(vectors_BD) > max_samples:
            raise SubjectFull(subject_id, held, len(vectors_BD), max_samples)
        seals = list[bytes]()
        if number is None:
            number, seal = rows.add_subject(connection, self._secret, subject_id, now)
            seals.append(seal)
        sample_ids, more = rows.add_samples(connection, number, subject_id, vectors_BD, now)
        done = Enrolment(subject_id, sample_ids, bool(seals), held + len(more), 0, number=number)
        return done, [*seals, *more]

    def _check_shape(self, vectors_BD: Vectors) -> None:
        if vectors_BD.ndim != 2 or vectors_BD.shape[1] != self.dimension or not len(vectors_BD):
            raise ValueError(f"vectors of shape {vectors_BD.shape}; the gallery takes [B >= 1, {self.dimension}]")

    def delete(self, subject_id: str, key: IdempotencyKey | None = None) -> Deletion:
        """Erase a subject and its samples: their rows are overwritten, in the file and in its log.

        Raises:
            SubjectUnknown: nobody of that id is enrolled.
        """
        now = _now()
        with self._failures(), self._database.transaction() as connection:
            if done := self._done_before(Deletion, connection, key, subject_id):
                return done
            known_by = rows.name_digest(self._secret, subject_id)
            row = connection.execute("SELECT id, checksum FROM subjects WHERE digest = ?", (known_by,)).fetchone()
            if row is None:
                raise SubjectUnknown(f"no subject '{subject_id}' is enrolled; GET /v1/subjects lists them")
            seals = rows.erase_subject(connection, row[0], now)
            rows.count_change(connection, -1, -len(seals), [row[1], *seals])
            done = Deletion(subject_id, len(seals))
            self._remember(connection, key, asdict(done), now)
            self._database.unfolded = True
        self._database.fold_log()
        return done

    def recall(self, key: IdempotencyKey, subject_id: str) -> Enrolment | None:
        """What an enrolment of `subject_id` under this key did, if it was done; spares embedding the images again."""
        with self._database.read_lock, self._failures():
            return self._done_before(Enrolment, self._database.reader, key, subject_id)

    def subjects(self, after: int, limit: int) -> list[SubjectRow]:
        """At most `limit` subjects behind position `after` (0: from the start), in order of enrolment."""
        found = self._read(
            "SELECT id, digest, created, name, checksum, (SELECT count(*) FROM samples WHERE subject_id = subjects.id) "
            "FROM subjects WHERE id > ? AND digest IS NOT NULL ORDER BY id LIMIT ?",
            (after, limit),
        )
        with self._failures():
            for row in found:
                rows.check(f"subject number {row[0]}", *row[:5])
        return [SubjectRow(row[0], row[3].decode(), row[5], _text(row[2])) for row in found]

    def samples(self, settled: bool = False) -> Iterator[Piece]:
        """Every sample, in pieces: subject ids, sample ids (16 bytes each), vectors [B, D], subjects' numbers.

        Args:
            settled: nobody writes meanwhile, so in the end all of it together must be what the gallery's row says.

        Raises:
            UserError: a sample does not have its checksum, or there are too few, too many, or other ones.
        """
        seals = self._read("SELECT checksum FROM subjects WHERE digest IS NOT NULL") if settled else []
        position, count, content = 0, 0, rows.xor(seal for (seal,) in seals)
        while found := self._read(
            SAMPLES + "WHERE samples.id > ? AND subject_id <> ? ORDER BY samples.id LIMIT ?",
            (position, rows.NOBODY, ROWS_A_READ),
        ):
            yield self._piece(found)
            position, count = found[-1][0], count + len(found)
            content = rows.xor((content, *(row[-1] for row in found)))
        if settled:
            with self._database.read_lock, self._failures(UserError):
                row = rows.read_gallery(self._database.reader)
                if (row.samples, row.content) != (count, content):
                    raise rows.Damage(
                        f"it counts {row.samples} samples and gave {count}, not all of them the right ones"
                    )
            self._database.trusted = True

    def samples_of(self, subject_id: str) -> Piece | None:
        """As a piece of `samples`, all of one subject; None where nobody of that id is enrolled."""
        found = self._read(
            SAMPLES + "WHERE subject_id = (SELECT id FROM subjects WHERE digest = ?) ORDER BY samples.id",
            (rows.name_digest(self._secret, subject_id),),
        )
        return self._piece(found) if found else None

    def _piece(self, found: list[Any]) -> Piece:
        with self._failures(UserError):
            for place, *row in found:
                rows.check(f"sample number {place}", *row)
                if len(row[4]) != 4 * self.dimension:
                    raise rows.Damage(f"sample number {place} has not the length of a vector")
        vectors_BD = np.frombuffer(b"".join(row[5] for row in found), "<f4").reshape(len(found), self.dimension)
        names, sample_ids = [row[4].decode() for row in found], [row[3] for row in found]
        return Piece(names, sample_ids, vectors_BD.astype(np.float32), np.array([row[1] for row in found], np.int64))

    def _read(self, sql: str, values: Sequence[object] = ()) -> list[Any]:
        with self._database.read_lock, self._failures():
            return self._database.reader.execute(sql, values).fetchall()

    def _done_before(
        self, kind: type[Outcome], connection: sqlite3.Connection, key: IdempotencyKey | None, subject_id: str
    ) -> Outcome | None:
        """What a change of this subject under this key did, if it was done."""
        found = self._remembered(connection, key, {field.name for field in fields(kind)} - rows.FORGOTTEN)
        return None if found is None else kind(**found | {"subject_id": subject_id, "replayed": True})

    def _remembered(
        self, connection: sqlite3.Connection, key: IdempotencyKey | None, names: Set[str] = BULK
    ) -> dict[str, Any] | None:
        """What a change under this key answered, if it was done: these values."""
        found = rows.recall(connection, self._secret, key.key, _now() - self._keep_ms) if key else None
        if key is None or found is None:
            return None
        request, done = found
        if request != rows.digest(self._secret, b"request", key.request) or done.keys() != names:
            raise KeyReused(
                f"the idempotency key '{key.key}' was used for another request; a key stands for one request: "
                "choose a new one"
            )
        return done

    def _remember(
        self, connection: sqlite3.Connection, key: IdempotencyKey | None, done: dict[str, Any], now: int
    ) -> None:
        """Keep what a change answered, in its transaction, and forget what is too old. Does nothing without a key."""
        if key is not None:
            connection.execute("DELETE FROM idempotency WHERE created <= ?", (now - self._keep_ms,))
            row = rows.outcome(self._secret, key.key, key.request, done, now)
            connection.execute("INSERT INTO idempotency VALUES (?, ?, ?, ?, ?)", row)

    @contextlib.contextmanager
    def _failures(self, damage: type[Exception] = StoreError) -> Iterator[None]:
        """SQLite's and the disk's errors as StoreError, damage as `damage`."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte is the class of an error
            if isinstance(error, rows.Damage) or code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
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


def _text(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds")


def _now() -> int:
    return time.time_ns() // 1_000_000
