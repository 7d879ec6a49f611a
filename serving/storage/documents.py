"""Metadata and images in a store: contents of any length, in rows that have one length for ever.

A content is its length in four bytes, itself, and zeros up to a whole number of rows. A row is written, taken over by
another content, and overwritten with zeros, but never moved (`serving.storage.schema` says why).
"""

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

from serving.storage.rows import NOBODY, NOTHING, Damage, check, checksum
from serving.storage.sealing import Box

OF_SAMPLE = 2 * NOBODY  # and the sample's place: an owner that is no subject's number, and takes as many bytes


@dataclass(frozen=True)
class Documents:
    """A table of contents; an owner has one or none. `room`: bytes of a content in one row. `box`: the subject's."""

    table: str
    kind: bytes
    room: int

    def put(self, connection: sqlite3.Connection, owner: int, content: bytes, box: Box) -> list[bytes]:
        """Write the content of an owner who has none; the checksums of its rows."""
        content = box.seal(self.kind, content)
        content = len(content).to_bytes(4, "big") + content
        content += bytes(-len(content) % self.room)
        parts = [content[start : start + self.room] for start in range(0, len(content), self.room)]
        free = connection.execute(
            f"SELECT id FROM {self.table} WHERE owner = ? ORDER BY id LIMIT ?", (NOBODY, len(parts))
        ).fetchall()
        (last,) = connection.execute(f"SELECT coalesce(max(id), 0) FROM {self.table}").fetchone()
        rows = []
        for taken, part in zip_longest(free, parts):  # a content's rows are in order of their numbers
            place, last = (taken[0], last) if taken else (last + 1, last + 1)
            rows.append((place, owner, checksum(place, owner, part), part))
        connection.executemany(
            f"INSERT INTO {self.table} (id, owner, checksum, content) VALUES (?, ?, ?, ?) ON CONFLICT (id) DO UPDATE "
            "SET owner = excluded.owner, checksum = excluded.checksum, content = excluded.content",
            rows,
        )
        return [row[2] for row in rows]

    def get(self, connection: sqlite3.Connection, owner: int, box: Box) -> bytes | None:
        """The content of an owner, None where there is none. Raises Damage where it is not as it was written."""
        found = connection.execute(
            f"SELECT id, owner, content, checksum FROM {self.table} WHERE owner = ? ORDER BY id", (owner,)
        ).fetchall()
        if not found:
            return None
        for row in found:
            check(f"row {row[0]} of '{self.table}'", *row)
        whole = b"".join(row[2] for row in found)
        end = 4 + int.from_bytes(whole[:4], "big")
        if not end <= len(whole) < end + self.room:
            raise Damage(f"what '{self.table}' has of one owner is not whole")
        return box.open(self.kind, whole[4:end])

    def has(self, connection: sqlite3.Connection, owner: int) -> bool:
        found = connection.execute(f"SELECT 1 FROM {self.table} WHERE owner = ? LIMIT 1", (owner,)).fetchone()
        return found is not None

    def erase(self, connection: sqlite3.Connection, owner: int) -> list[bytes]:
        """Overwrite what an owner has; the checksums that its rows had."""
        found = connection.execute(f"SELECT checksum FROM {self.table} WHERE owner = ?", (owner,)).fetchall()
        if found:
            connection.execute(
                f"UPDATE {self.table} SET owner = ?, checksum = ?, content = zeroblob({self.room}) WHERE owner = ?",
                (NOBODY, NOTHING, owner),
            )
        return [seal for (seal,) in found]

    def count(self, connection: sqlite3.Connection) -> int:
        """Those who have a content."""
        found = connection.execute(f"SELECT count(DISTINCT owner) FROM {self.table} WHERE owner <> ?", (NOBODY,))
        return int(found.fetchone()[0])

    def seals(self, connection: sqlite3.Connection) -> Iterator[bytes]:
        """The checksums of all rows that somebody has, unread."""
        found = connection.execute(f"SELECT checksum FROM {self.table} WHERE owner <> ?", (NOBODY,))
        return (seal for (seal,) in found)

    def verify(self, connection: sqlite3.Connection) -> None:
        """Read all rows. Raises Damage."""
        for row in connection.execute(
            f"SELECT id, owner, content, checksum FROM {self.table} WHERE owner <> ?", (NOBODY,)
        ):
            check(f"row {row[0]} of '{self.table}'", *row)


METADATA = Documents("metadata", b"metadata", 256)
IMAGES = Documents("images", b"image", 4000)  # four a page of 16 KiB, one a page of 4 KiB
