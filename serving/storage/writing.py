"""What a change does to the rows of a store, inside its transaction.

Rows are overwritten where they stand, or appended; `serving.storage.schema` says why.
"""

import math
import sqlite3
import struct
import uuid
from collections.abc import Iterable
from dataclasses import replace
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from serving.storage import rows
from serving.storage.changes import Attached, RevisionConflict, SubjectUnknown
from serving.storage.documents import IMAGES, METADATA, OF_SAMPLE, Documents
from serving.storage.metadata import attributes, decode, encode
from serving.storage.sealing import Box, Vault

QUALITY = struct.Struct("<d")  # NaN: unknown
NO_QUALITY = QUALITY.pack(math.nan)
SUBJECT = "id, digest, created, updated, revision, key, name, checksum"


class Subject(NamedTuple):
    """A row of `subjects`, as it is stored; times in milliseconds since 1970."""

    number: int
    digest: bytes | None
    created: int
    updated: int
    stored_revision: int
    key: bytes
    name: bytes
    checksum: bytes

    @classmethod
    def of(cls, *values: Any) -> "Subject":
        """With its checksum."""
        return cls(*(*values, rows.checksum(*values)))

    @property
    def revision(self) -> int:
        """Of the gallery, at the subject's last change."""
        return self.stored_revision - rows.NOBODY

    def check(self) -> "Subject":
        """Itself. Raises Damage where it is not as it was written."""
        rows.check(f"subject number {self.number}", *self)
        return self


class Change:
    """One change under way. Its methods write; `finish` adds it up in the gallery's row.

    Attributes:
        revision: the gallery's, once the change is committed.
        erased: something was overwritten, of which the log has a copy.
    """

    def __init__(self, connection: sqlite3.Connection, vault: Vault, secret: bytes, now: int) -> None:
        self._connection, self._vault, self._secret, self._now = connection, vault, secret, now
        self._gallery = rows.read_gallery(connection)
        self.revision = self._gallery.revision + 1
        self._stored = rows.NOBODY + self.revision  # as subjects have it
        self.erased = False
        self._seals: list[bytes] = []  # of rows that came or went
        self._subjects = self._samples = 0  # more than before
        self._named = "", b""  # the last name that was looked for, and its digest
        self._full = False  # no place of an erased sample is free
        self._last: dict[str, int] = {}  # of a table: the last row's number, once it is known

    @property
    def subjects(self) -> int:
        """How many there are now."""
        return self._gallery.subjects + self._subjects

    def finish(self) -> None:
        """Add it all up in the gallery's row."""
        row = self._gallery
        content, samples = rows.xor((row.content, *self._seals)), row.samples + self._samples
        row = replace(row, subjects=self.subjects, samples=samples, revision=self.revision, content=content)
        rows.write_gallery(self._connection, row)

    def find(self, subject_id: str) -> Subject | None:
        row = self._connection.execute(
            f"SELECT {SUBJECT} FROM subjects WHERE digest = ?", (self._digest(subject_id),)
        ).fetchone()
        return Subject(*row).check() if row else None

    def known(self, subject_id: str, expected: int | None = None) -> Subject:
        """Raises SubjectUnknown where there is none, RevisionConflict where it is at another revision than expected."""
        found = self.find(subject_id)
        if found is None:
            raise SubjectUnknown(f"no subject '{subject_id}' is enrolled; GET /v1/subjects lists them")
        if expected is not None and found.revision != expected:
            raise RevisionConflict(subject_id, found.revision, expected)
        return found

    def places(self, subject: Subject) -> list[tuple[int, bytes, bytes]]:
        """Of a subject's samples: where they are, their ids and checksums, in order of enrolment."""
        return self._connection.execute(
            "SELECT id, sample_id, checksum FROM samples WHERE subject_id = ? ORDER BY id", (subject.number,)
        ).fetchall()

    def held(self, subject: Subject) -> int:
        (count,) = self._connection.execute(
            "SELECT count(*) FROM samples WHERE subject_id = ?", (subject.number,)
        ).fetchone()
        return int(count)

    def add_subject(self, subject_id: str) -> Subject:
        digest, number = self._digest(subject_id), self._next("subjects")
        key = self._vault.new_key()
        name = self._vault.box(key).seal(b"name", subject_id.encode())
        new = Subject.of(number, digest, self._now, self._now, self._stored, key, name)
        self._connection.execute(f"INSERT INTO subjects ({SUBJECT}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", new)
        self._seals.append(new.checksum)
        self._subjects += 1
        return new

    def touch(self, subject: Subject) -> None:
        """Note that the subject was changed."""
        if subject.revision != self.revision:
            kept = subject.number, subject.digest, subject.created
            new = Subject.of(*kept, self._now, self._stored, subject.key, subject.name)
            self._replace(subject, new)

    def add_samples(self, subject: Subject, vectors_BD: NDArray[np.float32], attached: Attached) -> list[str]:
        """Write samples of a subject, into free places first; their ids."""
        box = self._vault.box(subject.key)
        written, ids, free = [], [uuid.uuid4() for _ in vectors_BD], self._free(len(vectors_BD))
        for place, sample_id, vector_D, quality in zip_longest(free, ids, vectors_BD.astype("<f4"), attached.qualities):
            place = place or self._next("samples")
            values, blob = (subject.number, self._now, sample_id.bytes, _quality(quality)), vector_D.tobytes()
            blob = box.seal(b"vector", blob)
            written.append((place, *values, rows.checksum(*values, subject.name, blob), blob))
        self._connection.executemany(
            "INSERT INTO samples (id, subject_id, created, sample_id, quality, checksum, vector) "
            "VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET subject_id = excluded.subject_id, "
            "created = excluded.created, sample_id = excluded.sample_id, quality = excluded.quality, "
            "checksum = excluded.checksum, vector = excluded.vector",
            written,
        )
        self._seals += [row[5] for row in written]
        self._samples += len(written)
        more = attached.samples or attached.images
        for row, metadata, image in zip_longest(written, attached.samples, attached.images) if more else ():
            self._put(METADATA, OF_SAMPLE + row[0], encode(metadata or {}), box)
            self._put(IMAGES, OF_SAMPLE + row[0], image or b"", box)
        return list(map(str, ids))

    def describe(self, subject: Subject, content: bytes) -> None:
        """Give the subject this metadata, as JSON, in place of what it had."""
        connection, number, box = self._connection, subject.number, self._vault.box(subject.key)
        before = METADATA.get(connection, number, box) or b""
        if before == content:
            return
        if before:
            pairs = [(one, number) for one in attributes(self._secret, decode(before))]
            connection.executemany("DELETE FROM attributes WHERE attribute = ? AND subject_id = ?", pairs)
            self._erase(METADATA, number)
        pairs = [(one, number) for one in attributes(self._secret, decode(content))]
        connection.executemany("INSERT INTO attributes VALUES (?, ?)", pairs)
        self._put(METADATA, number, content, box)

    def erase_subject(self, subject: Subject) -> int:
        """Overwrite a subject and its samples; how many those were."""
        places = self.places(subject)
        self.erase_samples(places)
        self.describe(subject, b"")
        zeros = bytes(len(subject.key)), bytes(len(subject.name))
        gone = Subject.of(subject.number, None, self._now, self._now, self._stored, *zeros)
        self._replace(subject, gone)
        self._subjects -= 1
        return len(places)

    def erase_samples(self, places: Iterable[tuple[int, bytes, bytes]]) -> None:
        """Overwrite samples. Their places are free then."""
        for place, _, seal in places:
            self._connection.execute(
                "UPDATE samples SET subject_id = ?, created = ?, sample_id = zeroblob(length(sample_id)), quality = ?, "
                "checksum = zeroblob(length(checksum)), vector = zeroblob(length(vector)) WHERE id = ?",
                (rows.NOBODY, self._now, NO_QUALITY, place),
            )
            self._seals.append(seal)
            self._samples -= 1
            self._erase(METADATA, OF_SAMPLE + place)
            self._erase(IMAGES, OF_SAMPLE + place)
        self.erased = True

    def move_samples(self, subject: Subject, into: Subject) -> None:
        """Make the samples of one subject another's."""
        box, theirs = self._vault.box(subject.key), self._vault.box(into.key)
        found = self._connection.execute(
            "SELECT id, created, sample_id, quality, vector, checksum FROM samples WHERE subject_id = ?",
            (subject.number,),
        ).fetchall()
        for place, *values, vector, seal in found:
            rows.check(f"sample number {place}", subject.number, *values, subject.name, vector, seal)
            vector = theirs.seal(b"vector", box.open(b"vector", vector))
            new = rows.checksum(into.number, *values, into.name, vector)
            self._connection.execute(
                "UPDATE samples SET subject_id = ?, checksum = ?, vector = ? WHERE id = ?",
                (into.number, new, vector, place),
            )
            self._seals += [seal, new]
            for documents in (METADATA, IMAGES) if self._vault.encrypted else ():
                content = documents.get(self._connection, OF_SAMPLE + place, box) or b""
                self._erase(documents, OF_SAMPLE + place)
                self._put(documents, OF_SAMPLE + place, content, theirs)

    def _digest(self, subject_id: str) -> bytes:
        if self._named[0] != subject_id:
            self._named = subject_id, rows.name_digest(self._secret, subject_id)
        return self._named[1]

    def _free(self, most: int) -> list[int]:
        """Places of erased samples, not more than these."""
        if self._full:
            return []
        found = self._connection.execute(
            "SELECT id FROM samples WHERE subject_id = ? LIMIT ?", (rows.NOBODY, most)
        ).fetchall()
        self._full = len(found) < most
        return [place for (place,) in found]

    def _next(self, table: str) -> int:
        """The number of a row behind the last one; rows of what was erased stay."""
        if table not in self._last:
            (last,) = self._connection.execute(f"SELECT max(id) FROM {table}").fetchone()
            self._last[table] = last or 0
        self._last[table] += 1
        return self._last[table]

    def rewrap(self, vault: Vault) -> int:
        """Bring the secret and all data keys under another master key; how many. Nothing else changes, no revision."""
        wrapped = vault.master.seal(b"secret", self._secret)
        found = self._connection.execute(f"SELECT {SUBJECT} FROM subjects WHERE digest IS NOT NULL").fetchall()
        for row in found:
            old = Subject(*row).check()
            key = vault.master.seal(b"key", self._vault.master.open(b"key", old.key))
            self._replace(old, Subject.of(*old[:5], key, old.name))
        content = rows.xor((self._gallery.content, *self._seals))
        rows.write_gallery(self._connection, replace(self._gallery, secret=wrapped, content=content))
        return len(found)

    def _replace(self, subject: Subject, new: Subject) -> None:
        self._connection.execute(
            "UPDATE subjects SET digest = ?, created = ?, updated = ?, revision = ?, key = ?, name = ?, checksum = ? "
            "WHERE id = ?",
            (*new[1:], subject.number),
        )
        self._seals += [subject.checksum, new.checksum]

    def _put(self, documents: Documents, owner: int, content: bytes, box: Box) -> None:
        if content:
            self._seals += documents.put(self._connection, owner, content, box)

    def _erase(self, documents: Documents, owner: int) -> None:
        self._seals += documents.erase(self._connection, owner)
        self.erased = True


def _quality(quality: float | None) -> bytes:
    return NO_QUALITY if quality is None else QUALITY.pack(quality)
