"""The durable truth of a gallery: one SQLite file.

What is promised: when `enrol` or `delete` returns, the change is in the write-ahead log and the log has been flushed to
the disk (`synchronous=FULL`), so it survives a kill and a power cut; under one idempotency key it is applied exactly
once; vectors of another `model_id` never enter.

One connection writes, another reads, each behind its own lock; readers do not wait for a writer's flush. One process
owns the file (an advisory lock beside it), since another one's index would miss the changes.
"""

import contextlib
import hashlib
import json
import sqlite3
import threading
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.database import connect, create, locked, migrate, verify
from trainer.errors import UserError

GALLERY = "default"
ROWS_A_READ = 4096


class StoreError(Exception):
    """The disk or the database failed. Nothing that was acknowledged is lost; what was asked is not acknowledged."""


class KeyReused(ValueError):
    """An idempotency key came again with another request."""


class SubjectUnknown(LookupError):
    """No subject of that id is enrolled."""


class SubjectFull(ValueError):
    """The subject would hold more samples than allowed."""


@dataclass(frozen=True)
class IdempotencyKey:
    """A client's key for one change, and the digest of the request that it stands for."""

    key: str
    request: bytes


@dataclass(frozen=True)
class Enrolment:
    """What an enrolment did. `gallery_size` counts subjects, right after it; `replayed`: it was done before."""

    subject_id: str
    sample_ids: tuple[str, ...]
    subject_created: bool
    subject_samples: int
    gallery_size: int
    replayed: bool = False


@dataclass(frozen=True)
class Deletion:
    """What a deletion did."""

    subject_id: str
    samples: int
    replayed: bool = False


@dataclass(frozen=True)
class SubjectRow:
    """A line of the list of subjects. `position` orders the list and is where the next page starts after."""

    position: int
    subject_id: str
    samples: int
    created: str


@dataclass(frozen=True)
class State:
    """How much a gallery holds, and the number of changes it has been through."""

    subjects: int
    samples: int
    revision: int


class Store:
    """A gallery's subjects and samples in SQLite. All methods may be called from several threads.

    Every method raises StoreError when the disk or the database fails.
    """

    def __init__(self, path: Path, model_id: str, dimension: int, key_hours: float = 24.0) -> None:
        """Open or create a store for vectors of `model_id`.

        Args:
            path: the SQLite file; made with mode 0600 if missing.
            key_hours: how long an idempotency key is remembered.

        Raises:
            UserError: the path cannot be used, is in use, is damaged, or holds vectors of another model.
        """
        self.path, self.model_id, self.dimension = path, model_id, dimension
        self._key_hours = key_hours
        self._write_lock, self._read_lock = threading.Lock(), threading.Lock()
        with contextlib.ExitStack() as opened:
            opened.enter_context(locked(path))
            create(path)
            try:
                self._writer = opened.enter_context(connect(path))
                verify(self._writer, path)
                migrate(self._writer, path)
                self._reader = opened.enter_context(connect(path))
                self._gallery = self._pin()
                self._check_counts()
            except (sqlite3.Error, StoreError) as error:
                raise UserError(
                    f"the store '{path}' cannot be opened: {error}; it must be a Hypersphere store on a disk that can "
                    "be written: check the path, or restore the file from a backup"
                ) from error
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Close the file; its log is folded into it. Idempotent."""
        with self._write_lock, self._read_lock:
            self._opened.close()

    def state(self) -> State:
        """Counts and revision as last committed, in O(1)."""
        row = self._read("SELECT subjects, samples, revision FROM galleries WHERE id = ?", (self._gallery,))[0]
        return State(*row)

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
        with self._transaction() as connection:
            if (done := self._recall(connection, key)) is not None:
                return _enrolment(done)
            now = _now()
            row = connection.execute(
                "SELECT id FROM subjects WHERE gallery_id = ? AND external_id = ?", (self._gallery, subject_id)
            ).fetchone()
            created = row is None
            if row is None:
                row = connection.execute(
                    "INSERT INTO subjects (gallery_id, external_id, created) VALUES (?, ?, ?) RETURNING id",
                    (self._gallery, subject_id, now),
                ).fetchone()
            (held,) = connection.execute("SELECT count(*) FROM samples WHERE subject_id = ?", row).fetchone()
            if held + len(vectors_BD) > max_samples:
                raise SubjectFull(
                    f"subject '{subject_id}' holds {held} samples and {len(vectors_BD)} more were sent; "
                    f"at most {max_samples} are allowed: send fewer, or delete the subject first"
                )
            sample_ids = tuple(str(uuid.uuid4()) for _ in vectors_BD)
            blobs = [vector_D.astype("<f4").tobytes() for vector_D in vectors_BD]
            connection.executemany(
                "INSERT INTO samples (subject_id, sample_id, vector, checksum, created) VALUES (?, ?, ?, ?, ?)",
                [
                    (row[0], sample_id, blob, _checksum(subject_id, sample_id, blob), now)
                    for sample_id, blob in zip(sample_ids, blobs, strict=True)
                ],
            )
            size = self._count(connection, int(created), len(sample_ids))
            done_now = Enrolment(subject_id, sample_ids, created, held + len(sample_ids), size)
            self._remember(connection, key, asdict(done_now), now)
            return done_now

    def delete(self, subject_id: str, key: IdempotencyKey | None = None) -> Deletion:
        """Erase a subject and its samples; freed pages are overwritten with zeros, in the file and in its log.

        Raises:
            KeyReused: `key` stands for another request.
            SubjectUnknown: nobody of that id is enrolled.
        """
        with self._transaction() as connection:
            if (done := self._recall(connection, key)) is not None:
                return Deletion(done["subject_id"], done["samples"], replayed=True)
            row = connection.execute(
                "SELECT id FROM subjects WHERE gallery_id = ? AND external_id = ?", (self._gallery, subject_id)
            ).fetchone()
            if row is None:
                raise SubjectUnknown(f"no subject '{subject_id}' is enrolled; GET /v1/subjects lists them")
            samples = connection.execute("DELETE FROM samples WHERE subject_id = ?", row).rowcount
            connection.execute("DELETE FROM subjects WHERE id = ?", row)
            self._count(connection, -1, -samples)
            deletion = Deletion(subject_id, samples)
            self._remember(connection, key, asdict(deletion), _now())
        self._fold_log()
        return deletion

    def recall(self, key: IdempotencyKey) -> Enrolment | None:
        """What an enrolment under this key did, if it was done; spares embedding the images again.

        Raises:
            KeyReused: `key` stands for another request.
        """
        with self._read_lock, _failures():
            done = self._recall(self._reader, key)
        return None if done is None else _enrolment(done)

    def subjects(self, after: int, limit: int) -> list[SubjectRow]:
        """At most `limit` subjects behind position `after` (0: from the start), in order of enrolment."""
        rows = self._read(
            "SELECT id, external_id, (SELECT count(*) FROM samples WHERE subject_id = subjects.id), created "
            "FROM subjects WHERE gallery_id = ? AND id > ? ORDER BY id LIMIT ?",
            (self._gallery, after, limit),
        )
        return [SubjectRow(*row) for row in rows]

    def samples(self) -> Iterator[tuple[list[str], list[str], NDArray[np.float32]]]:
        """Every sample, in pieces: subject ids, sample ids, vectors [B, D]. The caller keeps writers away.

        Raises:
            UserError: a sample does not have its checksum.
        """
        position = 0
        while rows := self._read(
            "SELECT samples.id, external_id, sample_id, vector, checksum FROM samples "
            "JOIN subjects ON subjects.id = samples.subject_id "
            "WHERE gallery_id = ? AND samples.id > ? ORDER BY samples.id LIMIT ?",
            (self._gallery, position, ROWS_A_READ),
        ):
            for _, subject_id, sample_id, blob, checksum in rows:
                if checksum != _checksum(subject_id, sample_id, blob) or len(blob) != 4 * self.dimension:
                    raise UserError(
                        f"sample '{sample_id}' of subject '{subject_id}' in the store '{self.path}' does not have its "
                        "checksum: the file was damaged; restore it from a backup"
                    )
            position = rows[-1][0]
            vectors_BD = np.frombuffer(b"".join(row[3] for row in rows), "<f4").reshape(len(rows), self.dimension)
            yield [row[1] for row in rows], [row[2] for row in rows], vectors_BD.astype(np.float32)

    def _pin(self) -> int:
        """The gallery's row, made on first use; it belongs to one model for ever."""
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO galleries (name, model_id, dimension, created) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (name) DO NOTHING",
                (GALLERY, self.model_id, self.dimension, _now()),
            )
            gallery, model_id, dimension = connection.execute(
                "SELECT id, model_id, dimension FROM galleries WHERE name = ?", (GALLERY,)
            ).fetchone()
        if (model_id, dimension) != (self.model_id, self.dimension):
            raise UserError(
                f"the store '{self.path}' holds vectors of model {model_id} (dimension {dimension}), but the embedder "
                f"is model {self.model_id} (dimension {self.dimension}), and vectors of two models cannot be compared; "
                "serve the embedder that filled the store, or give --store a new file and enrol again"
            )
        return int(gallery)

    def _check_counts(self) -> None:
        state = self.state()
        found = self._read(
            "SELECT (SELECT count(*) FROM subjects WHERE gallery_id = ?1), (SELECT count(*) FROM samples "
            "JOIN subjects ON subjects.id = samples.subject_id WHERE gallery_id = ?1)",
            (self._gallery,),
        )[0]
        if found != (state.subjects, state.samples):
            raise UserError(
                f"the store '{self.path}' counts {state.subjects} subjects and {state.samples} samples but holds "
                f"{found[0]} and {found[1]}: it was damaged, or changed by another program; restore it from a backup"
            )

    def _count(self, connection: sqlite3.Connection, subjects: int, samples: int) -> int:
        (size,) = connection.execute(
            "UPDATE galleries SET subjects = subjects + ?, samples = samples + ?, revision = revision + 1 "
            "WHERE id = ? RETURNING subjects",
            (subjects, samples, self._gallery),
        ).fetchone()
        return int(size)

    def _recall(self, connection: sqlite3.Connection, key: IdempotencyKey | None) -> dict[str, Any] | None:
        if key is None:
            return None
        row = connection.execute(
            "SELECT request, outcome FROM idempotency WHERE key = ? AND created >= ?",
            (key.key, _now(-self._key_hours)),
        ).fetchone()
        if row is None:
            return None
        if row[0] != key.request:
            raise KeyReused(
                f"the idempotency key '{key.key}' was used for another request; a key stands for one request: "
                "choose a new one"
            )
        outcome: dict[str, Any] = json.loads(row[1])
        return outcome

    def _remember(
        self, connection: sqlite3.Connection, key: IdempotencyKey | None, outcome: dict[str, Any], now: str
    ) -> None:
        if key is None:
            return
        connection.execute("DELETE FROM idempotency WHERE created < ?", (_now(-self._key_hours),))
        connection.execute(
            "INSERT INTO idempotency (key, request, outcome, created) VALUES (?, ?, ?, ?)",
            (key.key, key.request, json.dumps(outcome), now),
        )

    def _read(self, sql: str, values: Sequence[object]) -> list[Any]:
        with self._read_lock, _failures():
            return self._reader.execute(sql, values).fetchall()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing; on disk when it is left without an exception."""
        with self._write_lock, _failures():
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            finally:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")

    def _fold_log(self) -> None:
        """Move the log into the file and empty it, so that erased vectors do not stay in old log frames.

        Where a disk error keeps it from doing so, the next one does it; the deletion itself is durable either way.
        """
        with self._write_lock, self._read_lock, contextlib.suppress(sqlite3.OperationalError):
            self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()


def _enrolment(done: dict[str, Any]) -> Enrolment:
    if "sample_ids" not in done:  # the key of a deletion; its request digest would have to collide
        raise KeyReused("the idempotency key was used for a deletion; choose a new one")
    enrolment = Enrolment(**{**done, "sample_ids": tuple(done["sample_ids"])})
    return replace(enrolment, replayed=True)


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """SQLite's errors as StoreError."""
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        raise StoreError(f"the store failed ({name}: {error}); nothing was changed") from error


def _checksum(subject_id: str, sample_id: str, vector: bytes) -> bytes:
    head = f"{subject_id}\0{sample_id}\0".encode()
    return hashlib.blake2b(head + vector, digest_size=16).digest()


def _now(hours: float = 0.0) -> str:
    return (datetime.now(UTC) + timedelta(hours=hours)).isoformat(timespec="milliseconds")
