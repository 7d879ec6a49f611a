"""What is read from a store. `serving.storage.store` adds what changes it."""

import contextlib
import sqlite3
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from serving.storage import rows, verification
from serving.storage.changes import (
    Changed,
    Metadata,
    SampleRow,
    SampleUnknown,
    State,
    StoreError,
    SubjectRow,
    SubjectUnknown,
)
from serving.storage.database import Database, Moved
from serving.storage.documents import IMAGES, METADATA, OF_SAMPLE
from serving.storage.metadata import attributes, decode
from serving.storage.writing import QUALITY, SUBJECT, Subject
from trainer.errors import UserError

ROWS_A_READ = 1024
SAMPLES = (
    "SELECT samples.id, key, subject_id, samples.created, sample_id, quality, name, vector, samples.checksum "
    # CROSS JOIN: in this order. SQLite would rather walk the subjects and sort, for every piece anew.
    "FROM samples CROSS JOIN subjects ON subjects.id = subject_id "
)
COUNT = "(SELECT count(*) FROM samples WHERE samples.subject_id = subjects.id)"
Vectors = NDArray[np.float32]


class Piece(NamedTuple):
    """Samples, one entry each: 16 bytes of a UUID an id; quality NaN: unknown; the subjects' numbers never change."""

    subject_ids: list[str]
    sample_ids: list[bytes]
    vectors_BD: Vectors
    qualities_B: NDArray[np.float64]
    numbers_B: NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """A sample as it is stored: its place, owner, and values; the name and the key are its subject's."""

    place: int
    key: bytes
    number: int
    created: int
    sample_id: bytes
    quality: bytes
    name: bytes
    vector: bytes
    checksum: bytes


class Reader:
    """An open store, read. All methods may be called from several threads, and raise StoreError when the disk fails or
    what they read is damaged."""

    def __init__(self, path: Path, dimension: int, database: Database) -> None:
        self.path, self.dimension = path, dimension
        self._database, self._secret, self._vault = database, database.secret, database.vault

    @property
    def uid(self) -> bytes:
        """Tells this store from any other, 16 bytes."""
        return self._database.uid

    @property
    def encrypted(self) -> bool:
        return self._vault.encrypted

    def sign(self, value: bytes) -> bytes:
        """16 bytes that only this store can make of a value."""
        return rows.digest(self._secret, b"sign", value)

    def state(self) -> State:
        """Counts and revision as last committed, in O(1)."""
        return State(*self._read("SELECT subjects, samples, revision FROM gallery")[0])

    def verify(self, stopping: Callable[[], bool] = lambda: False, beside: bool = False) -> None:
        """Read everything but the vectors, which `samples` checks. Readers wait meanwhile.

        Args:
            beside: let nobody wait, for it or, where something is erased meanwhile, for the log to be emptied: then it
                ends as if `stopping` had returned true.

        Raises:
            UserError: the store is damaged.
            StoreError: the disk failed, or `stopping` returned true.
        """
        database = self._database
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._failures(UserError))
            reader = stack.enter_context(database.another() if beside else database.reading())

            def attributes_of(number: int) -> Iterator[int]:
                (key,) = reader.execute("SELECT key FROM subjects WHERE id = ?", (number,)).fetchone()
                return attributes(self._secret, decode(METADATA.get(reader, number, self._vault.box(key))))

            def ending() -> bool:
                return stopping() or (beside and database.unfolded)

            verification.verify(reader, ending, attributes_of)

    def subjects(self, after: int, limit: int, where: Metadata | None = None) -> list[SubjectRow]:
        """At most `limit` subjects behind position `after` (0: from the start), in order of enrolment.

        `where`: only those whose metadata has all these keys with these values.
        """
        with self._snapshot() as connection:
            tables, values = self._matching(where or {}, after)
            found = connection.execute(f"SELECT {SUBJECT}, {COUNT} {tables} LIMIT ?", (*values, limit)).fetchall()
            return [self._subject_row(connection, Subject(*row), count) for *row, count in found]

    def matching(self, where: Metadata) -> list[str]:
        """The ids of all subjects whose metadata has all these keys with these values."""
        tables, values = self._matching(where, 0)
        found = self._read(f"SELECT key, name {tables}", values)
        with self._failures():
            return [self._name(*row) for row in found]

    def names(self) -> Iterator[tuple[int, str]]:
        """The numbers and ids of all subjects, not compared with their checksums."""
        last, sql = 0, "SELECT id, key, name FROM subjects WHERE id > ? AND digest IS NOT NULL ORDER BY id LIMIT ?"
        while found := self._read(sql, (last, ROWS_A_READ)):
            with self._failures():
                named = [(number, self._name(*row)) for number, *row in found]
            yield from named
            last = found[-1][0]

    def subject(self, subject_id: str) -> tuple[SubjectRow, list[SampleRow]]:
        """A subject and its samples. Raises SubjectUnknown."""
        with self._snapshot() as connection:
            subject = self._known(connection, subject_id)
            samples = [self._sample_row(connection, sample) for sample in self._samples(connection, subject.number)]
            return self._subject_row(connection, subject, len(samples)), samples

    def sample(self, subject_id: str, sample_id: str) -> tuple[SampleRow, Vectors]:
        """One sample and its vector [D]. Raises SubjectUnknown, SampleUnknown."""
        with self._snapshot() as connection:
            sample = self._sample(connection, subject_id, sample_id)
            vector = self._vault.box(sample.key).open(b"vector", sample.vector)
            return self._sample_row(connection, sample), np.frombuffer(vector, "<f4").astype(np.float32)

    def image(self, subject_id: str, sample_id: str) -> bytes | None:
        """The image that a sample was made of, as it was sent; None where it was not kept.

        Raises:
            SubjectUnknown, SampleUnknown: there is none.
        """
        with self._snapshot() as connection:
            sample = self._sample(connection, subject_id, sample_id)
            return IMAGES.get(connection, OF_SAMPLE + sample.place, self._vault.box(sample.key))

    def changes_since(self, revision: int) -> list[Changed] | None:
        """The subjects that were enrolled, changed or erased after the store was at `revision`.

        None where it was never there: what is known of that revision belongs to another life of the store.
        """
        with self._snapshot() as connection:
            if not 0 <= revision <= rows.read_gallery(connection).revision:
                return None
            found = connection.execute(
                f"SELECT {SUBJECT} FROM subjects WHERE revision > ?", (rows.NOBODY + revision,)
            ).fetchall()
        subjects = [Subject(*row).check() for row in found]
        with self._failures():
            return [Changed(one.number, self._name(one.key, one.name) if one.digest else None) for one in subjects]

    def samples(self, settled: bool = False, by_subject: bool = False) -> Iterator[Piece]:
        """Every sample, in pieces.

        Args:
            settled: nobody writes meanwhile, so in the end all of it together must be what the gallery's row says.
            by_subject: in the order of the subjects' numbers; else as they lie in the file.

        Raises:
            UserError: a sample does not have its checksum, or there are too few, too many, or other ones.
        """
        which = "WHERE samples.id > ? AND subject_id <> ? ORDER BY samples.id LIMIT ?"
        if by_subject:
            which = "WHERE (subject_id, samples.id) > (?, ?) ORDER BY subject_id, samples.id LIMIT ?"
        position = (rows.NOBODY + 1, 0) if by_subject else (0, rows.NOBODY)
        count, content = 0, self._other_seals() if settled else rows.NOTHING
        while found := self._read(SAMPLES + which, (*position, ROWS_A_READ)):
            yield self._piece(found)
            last, count = found[-1], count + len(found)
            position = (last[2], last[0]) if by_subject else (last[0], rows.NOBODY)
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

    def _other_seals(self) -> bytes:
        """The checksums of all rows but the samples', XORed."""
        with self._database.read_lock, self._failures(UserError):
            reader = self._database.reader
            subjects = reader.execute("SELECT checksum FROM subjects WHERE id <> ?", (rows.NOBODY,))
            parts = ((seal for (seal,) in subjects), METADATA.seals(reader), IMAGES.seals(reader))
            return rows.xor(map(rows.xor, parts))

    def _piece(self, found: list[Any]) -> Piece:
        with self._failures(UserError):
            for row in found:
                self._check(row)
            names, vectors = [row[6] for row in found], [row[7] for row in found]
            if self._vault.encrypted:
                boxes = [self._vault.box(row[1]) for row in found]
                names = [box.open(b"name", name) for box, name in zip(boxes, names, strict=True)]
                vectors = [box.open(b"vector", vector) for box, vector in zip(boxes, vectors, strict=True)]
        vectors_BD = np.frombuffer(b"".join(vectors), "<f4").reshape(len(found), self.dimension)
        return Piece(
            [name.decode() for name in names],
            [row[4] for row in found],
            vectors_BD.astype(np.float32),
            np.frombuffer(b"".join(row[5] for row in found), "<f8"),
            np.fromiter((row[2] for row in found), np.int64, len(found)),
        )

    def _check(self, row: Any) -> None:
        place, _, *values = row
        rows.check(f"sample number {place}", *values)
        if len(values[5]) != 4 * self.dimension + self._vault.overhead or len(values[3]) != QUALITY.size:
            raise rows.Damage(f"sample number {place} has not the length of a vector")

    def _known(self, connection: sqlite3.Connection, subject_id: str) -> Subject:
        row = connection.execute(
            f"SELECT {SUBJECT} FROM subjects WHERE digest = ?", (rows.name_digest(self._secret, subject_id),)
        ).fetchone()
        if row is None:
            raise SubjectUnknown(f"no subject '{subject_id}' is enrolled; GET /v1/subjects lists them")
        return Subject(*row).check()

    def _samples(self, connection: sqlite3.Connection, number: int) -> list[Sample]:
        found = connection.execute(SAMPLES + "WHERE subject_id = ? ORDER BY samples.id", (number,)).fetchall()
        for row in found:
            self._check(row)
        return [Sample(*row) for row in found]

    def _sample(self, connection: sqlite3.Connection, subject_id: str, sample_id: str) -> Sample:
        wanted = id_bytes(sample_id)
        for sample in self._samples(connection, self._known(connection, subject_id).number):
            if sample.sample_id == wanted:
                return sample
        raise SampleUnknown(f"subject '{subject_id}' has no sample '{sample_id}'; GET /v1/subjects/ID lists them")

    def _subject_row(self, connection: sqlite3.Connection, subject: Subject, count: int) -> SubjectRow:
        subject.check()
        times = text(subject.created), text(subject.updated)
        metadata = decode(METADATA.get(connection, subject.number, self._vault.box(subject.key)))
        name = self._name(subject.key, subject.name)
        return SubjectRow(subject.number, name, count, *times, subject.revision, metadata)

    def _name(self, key: bytes, name: bytes) -> str:
        return self._vault.box(key).open(b"name", name).decode()

    def _sample_row(self, connection: sqlite3.Connection, sample: Sample) -> SampleRow:
        owner, (quality,) = OF_SAMPLE + sample.place, QUALITY.unpack(sample.quality)
        return SampleRow(
            str(uuid.UUID(bytes=sample.sample_id)),
            text(sample.created),
            None if quality != quality else quality,
            decode(METADATA.get(connection, owner, self._vault.box(sample.key))),
            IMAGES.has(connection, owner),
        )

    def _matching(self, where: Metadata, after: int) -> tuple[str, list[int]]:
        """The end of a SELECT of the subjects with this metadata behind `after`, in order, and its values."""
        first, *others = attributes(self._secret, where) if where else (None,)
        if first is None:
            return "FROM subjects WHERE id > ? AND digest IS NOT NULL ORDER BY id", [after]
        more = "AND EXISTS (SELECT 1 FROM attributes WHERE attribute = ? AND subject_id = subjects.id) " * len(others)
        return (
            "FROM attributes AS one CROSS JOIN subjects ON subjects.id = one.subject_id "
            f"WHERE one.attribute = ? AND one.subject_id > ? {more}ORDER BY one.subject_id",
            [first, after, *others],
        )

    def _read(self, sql: str, values: Sequence[object] = ()) -> list[Any]:
        with self._database.read_lock, self._failures():
            return self._database.reader.execute(sql, values).fetchall()

    @contextlib.contextmanager
    def _snapshot(self) -> Iterator[sqlite3.Connection]:
        """A connection that sees one state all along."""
        with self._database.read_lock, self._failures():
            self._database.reader.execute("BEGIN")
            try:
                yield self._database.reader
            finally:
                self._database.reader.execute("ROLLBACK")

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


def id_bytes(sample_id: str) -> bytes:
    """16 bytes of a sample's id; none where it is not one."""
    try:
        return uuid.UUID(sample_id).bytes
    except ValueError:
        return b""


def text(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds")
