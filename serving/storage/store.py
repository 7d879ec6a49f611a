"""The durable truth of a gallery: one SQLite file.

What is promised: when `enrol` or `delete` returns, the change is in the write-ahead log, log and mark have been flushed
to the disk, and so it survives a kill and a power cut; under one idempotency key it is applied exactly once; vectors of
another `model_id` never enter; of what was erased, no byte is left in any file.

One connection writes, another reads, each behind its own lock; readers do not wait for a writer's flush. One process
owns the file, since another one's index would miss the changes.
"""

import math
import os
import sqlite3
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from serving.storage import rows
from serving.storage.changes import (
    Attached,
    BulkEnrolment,
    Deletion,
    Enrolment,
    IdempotencyKey,
    KeyReused,
    LastSample,
    Metadata,
    SampleUnknown,
    State,
    SubjectFull,
    Update,
)
from serving.storage.database import Database
from serving.storage.metadata import encode
from serving.storage.reading import Reader, Vectors, id_bytes
from serving.storage.schema import Target
from serving.storage.sealing import Vault
from serving.storage.writing import Change, Subject
from trainer.errors import UserError

PLAIN = Attached()
BULK = frozenset({"items", "gallery_size"})  # what is remembered of an enrolment of many, at least
Outcome = TypeVar("Outcome", Enrolment, Deletion, Update)


class Store(Reader):
    """A gallery's subjects and samples in SQLite. All methods may be called from several threads.

    Every method raises StoreError when the disk or the database fails, and every one that takes a key KeyReused where
    the key stands for another request. Those that take `expected`, the revision that a subject is to be at, raise
    RevisionConflict where it is at another one; those that take a subject's id SubjectUnknown, but for enrolments.
    """

    def __init__(
        self,
        path: Path,
        model_id: str,
        dimension: int,
        key_hours: float = 24.0,
        restored: bool = False,
        key: bytes | None = None,
    ) -> None:
        """Open or create a store for vectors of `model_id`. O(1), unless an older schema has to be brought up to date.

        Args:
            path: the SQLite file; made with mode 0600 if missing.
            key_hours: how long an idempotency key is remembered.
            key: the master key under which the store is encrypted; None: it is not.
            restored: the operator restored a backup: take the store as it is, though later changes are missing.

        Raises:
            UserError: the path cannot be used, is in use, is damaged, lost acknowledged changes, or holds vectors of
                another model.
        """
        target = Target(path, Path(os.path.realpath(path)), model_id, dimension, _now(), Vault(key))
        try:
            database = Database(target, restored)
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
        super().__init__(path, dimension, database)
        self.model_id, self.restored, self._keep_ms = model_id, restored, round(key_hours * 3_600_000)

    def close(self) -> None:
        """Close the file; its log is folded into it. Idempotent."""
        self._database.close()

    def check(self) -> State:
        """The state, after making sure that the files are where they were, and after what a disk error left undone."""
        state = self.state()
        with self._database.write_lock, self._failures():
            self._database.check_in_place()
        self._database.fold_log()
        return state

    def enrol(
        self,
        subject_id: str,
        vectors_BD: Vectors,
        max_samples: int = 100,
        key: IdempotencyKey | None = None,
        attached: Attached = PLAIN,
        expected: int | None = None,
    ) -> Enrolment:
        """Add samples to a subject, which is created where it is new and not `expected`. The vectors' lengths are not
        looked at.

        Raises:
            SubjectUnknown: it is new, though it is expected.
            SubjectFull: the subject would hold more than `max_samples`.
            MetadataRefused: some of it is not what metadata may be.
        """
        self._check_shape(vectors_BD, attached)

        def act(change: Change) -> Enrolment:
            if expected is not None:
                change.known(subject_id, expected)
            return self._add(change, subject_id, vectors_BD, max_samples, attached)

        return self._change(Enrolment, subject_id, key, act)

    def enrol_many(
        self,
        items: Sequence[tuple[str, Vectors]],
        max_samples: int = 100,
        key: IdempotencyKey | None = None,
        attached: Sequence[Attached] = (),
    ) -> BulkEnrolment:
        """`enrol` for many subjects, in one change. An item that is refused leaves the others alone; a subject may come
        more than once. `attached`: one an item, or none at all.

        Raises:
            MetadataRefused: some of it is not what metadata may be; then nothing is enrolled.
        """
        attached = attached or [PLAIN] * len(items)
        for (_, vectors_BD), more in zip(items, attached, strict=True):
            self._check_shape(vectors_BD, more)
        now, results = _now(), list[Enrolment | SubjectFull]()
        with self._failures(), self._database.transaction() as connection:
            if found := self._remembered(connection, key, BULK, BULK | {"revision"}):
                return BulkEnrolment.remembered(found, [subject_id for subject_id, _ in items])
            change = Change(connection, self._vault, self._secret, now)
            for (subject_id, vectors_BD), more in zip(items, attached, strict=True):
                try:
                    results.append(self._add(change, subject_id, vectors_BD, max_samples, more))
                except SubjectFull as refusal:
                    results.append(refusal)
            change.finish()
            bulk = BulkEnrolment(tuple(results), change.subjects, revision=change.revision)
            self._remember(connection, key, bulk.to_remember(), now)
            self._database.unfolded |= change.erased
        if change.erased:
            self._database.fold_log()
        return bulk

    def update(
        self, subject_id: str, metadata: Metadata, key: IdempotencyKey | None = None, expected: int | None = None
    ) -> Update:
        """Give a subject this metadata, in place of what it has, which is overwritten.

        Raises:
            MetadataRefused: it is not what metadata may be.
        """
        content = encode(metadata)

        def act(change: Change) -> Update:
            subject = change.known(subject_id, expected)
            change.describe(subject, content)
            return self._touched(change, subject, subject_id)

        return self._change(Update, subject_id, key, act)

    def merge(
        self,
        into: str,
        other: str,
        max_samples: int = 100,
        key: IdempotencyKey | None = None,
        expected: int | None = None,
    ) -> Update:
        """Make the samples of `other` those of `into`, which keeps its metadata; `other` is erased.

        Raises:
            SubjectFull: `into` would hold more than `max_samples`.
            ValueError: the two are one.
        """
        if into == other:
            raise ValueError(f"subject '{into}' cannot be merged into itself; name two subjects")

        def act(change: Change) -> Update:
            target, source = change.known(into, expected), change.known(other)
            held, more = change.held(target), change.held(source)
            if held + more > max_samples:
                raise SubjectFull(into, held, more, max_samples)
            change.move_samples(source, target)
            change.erase_subject(source)
            return self._touched(change, target, into)

        return self._change(Update, into, key, act)

    def delete_sample(
        self, subject_id: str, sample_id: str, key: IdempotencyKey | None = None, expected: int | None = None
    ) -> Update:
        """Erase one sample.

        Raises:
            SampleUnknown: the subject has none of that id.
            LastSample: it has no other one.
        """

        def act(change: Change) -> Update:
            subject = change.known(subject_id, expected)
            places = change.places(subject)
            wanted = [place for place in places if place[1] == id_bytes(sample_id)]
            if not wanted:
                raise SampleUnknown(f"subject '{subject_id}' has no sample '{sample_id}'")
            if len(places) == 1:
                raise LastSample(f"sample '{sample_id}' is the last one of subject '{subject_id}'; delete the subject")
            change.erase_samples(wanted)
            return self._touched(change, subject, subject_id)

        return self._change(Update, subject_id, key, act)

    def delete(self, subject_id: str, key: IdempotencyKey | None = None, expected: int | None = None) -> Deletion:
        """Erase a subject and its samples: their rows are overwritten, in the file and in its log."""

        def act(change: Change) -> Deletion:
            return Deletion(subject_id, change.erase_subject(change.known(subject_id, expected)))

        return self._change(Deletion, subject_id, key, act)

    def change_key(self, master: bytes) -> int:
        """Wrap the subjects' data keys anew, under another master key; how many there are. The old ones are off the
        disk when this returns. For a store that nobody else reads or changes."""
        new = Vault(master)
        with self._failures(), self._database.transaction() as connection:
            count = Change(connection, self._vault, self._secret, _now()).rewrap(new)
            self._database.unfolded = True
        self._database.fold_log()
        self._vault = new
        return count

    def recall(self, key: IdempotencyKey, subject_id: str) -> Enrolment | None:
        """What an enrolment of `subject_id` under this key did, if it was done; spares embedding the images again."""
        with self._database.read_lock, self._failures():
            return self._done_before(Enrolment, self._database.reader, key, subject_id)

    def _change(
        self, kind: type[Outcome], subject_id: str, key: IdempotencyKey | None, act: Callable[[Change], Outcome]
    ) -> Outcome:
        """Do what was not done before under the key. What it overwrote is off the disk when this returns."""
        now = _now()
        with self._failures(), self._database.transaction() as connection:
            if before := self._done_before(kind, connection, key, subject_id):
                return before
            change = Change(connection, self._vault, self._secret, now)
            done = act(change)
            change.finish()
            self._remember(connection, key, asdict(done), now)
            self._database.unfolded |= change.erased
        if change.erased:
            self._database.fold_log()
        return done

    def _add(
        self, change: Change, subject_id: str, vectors_BD: Vectors, max_samples: int, attached: Attached
    ) -> Enrolment:
        subject = change.find(subject_id)
        created, held = subject is None, change.held(subject) if subject else 0
        if held + len(vectors_BD) > max_samples:
            raise SubjectFull(subject_id, held, len(vectors_BD), max_samples)
        if subject is None:
            subject = change.add_subject(subject_id)
        else:
            change.touch(subject)
        sample_ids = change.add_samples(subject, vectors_BD, attached)
        if attached.metadata is not None:
            change.describe(subject, encode(attached.metadata))
        total = held + len(sample_ids)
        size, revision = change.subjects, change.revision
        return Enrolment(subject_id, sample_ids, created, total, size, False, revision, subject.number)

    def _touched(self, change: Change, subject: Subject, subject_id: str) -> Update:
        change.touch(subject)
        return Update(subject_id, change.held(subject), change.revision)

    def _check_shape(self, vectors_BD: Vectors, attached: Attached) -> None:
        if vectors_BD.ndim != 2 or vectors_BD.shape[1] != self.dimension or not len(vectors_BD):
            raise ValueError(f"vectors of shape {vectors_BD.shape}; the gallery takes [B >= 1, {self.dimension}]")
        for what in (attached.qualities, attached.samples, attached.images):
            if len(what) not in (0, len(vectors_BD)):
                raise ValueError(f"{len(what)} entries for {len(vectors_BD)} vectors; give one a vector, or none")
        if not all(quality is None or math.isfinite(quality) for quality in attached.qualities):
            raise ValueError("a quality is no finite number; leave it out where it is not known")

    def _done_before(
        self, kind: type[Outcome], connection: sqlite3.Connection, key: IdempotencyKey | None, subject_id: str
    ) -> Outcome | None:
        """What a change of this subject under this key did, if it was done."""
        names = {field.name for field in fields(kind)} - {"subject_id"}
        needed = {field.name for field in fields(kind) if field.default is MISSING} - {"subject_id"}
        found = self._remembered(connection, key, needed, names)
        return None if found is None else kind(**found | {"subject_id": subject_id, "replayed": True})

    def _remembered(
        self, connection: sqlite3.Connection, key: IdempotencyKey | None, needed: Set[str], names: Set[str]
    ) -> dict[str, Any] | None:
        """What a change under this key answered, if it was done: these values, of which earlier versions lack some."""
        found = rows.recall(connection, self._secret, key.key, _now() - self._keep_ms) if key else None
        if key is None or found is None:
            return None
        request, done = found
        if request != rows.digest(self._secret, b"request", key.request) or not needed <= done.keys() <= names:
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


def _now() -> int:
    return time.time_ns() // 1_000_000
