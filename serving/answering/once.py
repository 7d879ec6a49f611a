"""What was done under an idempotency key, for changes of which no store keeps it; remembered until the service ends."""

import time
from collections import OrderedDict
from typing import Generic, TypeVar

from serving.storage.changes import IdempotencyKey, KeyReused

Outcome = TypeVar("Outcome")
MOST = 10_000


class Once(Generic[Outcome]):
    """Outcomes by collection and key. Whoever calls `get`, does the work and calls `put` holds a lock meanwhile."""

    def __init__(self, hours: float) -> None:
        self._seconds = 3600 * hours
        self._done = OrderedDict[tuple[str, str], tuple[float, bytes, Outcome]]()

    def get(self, of: str, key: IdempotencyKey | None) -> Outcome | None:
        """What was done; None: nothing was, or there is no key.

        Raises:
            KeyReused: the key stands for another request.
        """
        found = self._done.get((of, key.key)) if key else None
        if key is None or found is None or time.monotonic() - found[0] > self._seconds:
            return None
        if found[1] != key.request:
            raise KeyReused(
                f"the idempotency key '{key.key}' was used for another request; a key stands for one request: "
                "choose a new one"
            )
        return found[2]

    def put(self, of: str, key: IdempotencyKey | None, outcome: Outcome) -> None:
        """Remember it; the oldest are forgotten when there are too many."""
        if key is not None:
            self._done.pop((of, key.key), None)
            self._done[of, key.key] = time.monotonic(), key.request, outcome
            if len(self._done) > MOST:
                self._done.popitem(last=False)

    def forget(self, of: str) -> None:
        """The collection is no more."""
        for place in [place for place in self._done if place[0] == of]:
            del self._done[place]
