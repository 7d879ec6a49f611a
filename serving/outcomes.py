"""What a change under an idempotency key answered, so that its repetition is answered alike and not done again.

Neither key nor request nor name is kept: the first two as digests under the store's secret, and the name comes again
with the repetition.
"""

import json
import sqlite3
from dataclasses import asdict
from typing import Any

from serving.records import Deletion, Enrolment, IdempotencyKey, KeyReused
from serving.rows import Damage, checksum, digest, outcome_text


class Outcomes:
    """The table `idempotency`. Written in the change's own transaction; a row is kept for `keep_ms`."""

    def __init__(self, secret: bytes, keep_ms: int) -> None:
        self._secret, self._keep_ms = secret, keep_ms

    def enrolment(
        self, connection: sqlite3.Connection, key: IdempotencyKey, subject_id: str, now: int
    ) -> Enrolment | None:
        """What an enrolment of `subject_id` under this key did, if it was done.

        Raises:
            KeyReused: the key stands for another request.
        """
        done = self._recall(connection, key, now)
        if done is None:
            return None
        if "sample_ids" not in done:  # the key of a deletion; its request digest would have to collide
            raise KeyReused("the idempotency key was used for a deletion; choose a new one")
        return Enrolment(
            **{**done, "subject_id": subject_id, "sample_ids": tuple(done["sample_ids"]), "replayed": True}
        )

    def deletion(
        self, connection: sqlite3.Connection, key: IdempotencyKey, subject_id: str, now: int
    ) -> Deletion | None:
        """As `enrolment`, of a deletion."""
        done = self._recall(connection, key, now)
        return None if done is None else Deletion(subject_id, done["samples"], replayed=True)

    def remember(
        self, connection: sqlite3.Connection, key: IdempotencyKey | None, outcome: Enrolment | Deletion, now: int
    ) -> None:
        """Keep the outcome, and forget those that are too old. Does nothing without a key."""
        if key is None:
            return
        connection.execute("DELETE FROM idempotency WHERE created <= ?", (now - self._keep_ms,))
        values = (self._key(key), self._request(key), outcome_text(asdict(outcome)), now)
        connection.execute("INSERT INTO idempotency VALUES (?, ?, ?, ?, ?)", (*values, checksum(*values)))

    def _recall(self, connection: sqlite3.Connection, key: IdempotencyKey, now: int) -> dict[str, Any] | None:
        row = connection.execute(
            "SELECT key, request, outcome, created, checksum FROM idempotency WHERE key = ? AND created > ?",
            (self._key(key), now - self._keep_ms),
        ).fetchone()
        if row is None:
            return None
        if checksum(*row[:-1]) != row[-1]:
            raise Damage("the answer under an idempotency key does not have its checksum")
        if row[1] != self._request(key):
            raise KeyReused(
                f"the idempotency key '{key.key}' was used for another request; a key stands for one request: "
                "choose a new one"
            )
        outcome: dict[str, Any] = json.loads(row[2])
        return outcome

    def _key(self, key: IdempotencyKey) -> bytes:
        return digest(self._secret, b"key", key.key.encode())

    def _request(self, key: IdempotencyKey) -> bytes:
        return digest(self._secret, b"request", key.request)
