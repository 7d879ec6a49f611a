"""Where the ranks leave what they have to say, and the launching process picks it up: an actor of few imports."""

import math
import time
from typing import Any

import ray

from trainer.watchdog import Beat, Watchdog

_MEASURED = ("step", "metrics", "back")  # kinds of records that go to MLflow


class Board:
    """An actor without a CPU of its own, on the launching process' node.

    Args:
        stall_s: see `Watchdog`.
    """

    def __init__(self, stall_s: float) -> None:
        self._records: list[dict[str, Any]] = []
        self._taken: list[dict[str, Any]] = []  # by the last call, and perhaps not noted yet
        self._watchdog = Watchdog(stall_s, time.monotonic)
        self._workers: dict[int, Any] = {}
        self._stop, self._heard = False, time.monotonic()
        self._furthest = self._groups = 0

    def put(self, record: dict[str, Any]) -> None:
        """Leave a record."""
        self._records.append(record)

    def take(self) -> tuple[list[dict[str, Any]], float]:
        """The records since the last call, and for how many seconds no rank was heard. Ends workers that hang, so that
        Ray Train starts the group again."""
        ranks, sentence = self._watchdog.stalled()
        if ranks:
            self.put({"kind": "note", "text": sentence})
            for rank in ranks:
                ray.kill(self._workers[rank])
        self._taken, self._records = self._records, []
        return self._taken, time.monotonic() - self._heard

    def untold(self) -> list[dict[str, Any]]:
        """What was measured, as far as it may be lost if the launching process dies now: it notes what it has taken
        before it takes more."""
        found = [record for record in (*self._taken, *self._records) if record["kind"] in _MEASURED]
        return [one | {"values": {k: v for k, v in one["values"].items() if math.isfinite(v)}} for one in found]

    def join(self, beat: Beat, worker: Any) -> bool:
        """The first word of a rank; `worker` is its actor. Whether there was a group before its."""
        self._workers[beat.rank] = worker
        self._watchdog.join(beat)
        self._heard = time.monotonic()
        return self._groups > 1

    def beat(self, beat: Beat) -> bool:
        """What a rank does now; whether the run is to stop."""
        self._watchdog.beat(beat)
        self._heard = time.monotonic()
        self._furthest = max(self._furthest, beat.step)
        return self._stop

    def leave(self, beat: Beat) -> None:
        """The last word of a rank."""
        self._watchdog.leave(beat)

    def stop(self) -> None:
        """From now on every rank is told to stop."""
        self._stop = True

    def furthest(self) -> int:
        """The highest step that a rank has spoken of."""
        return self._furthest

    def begin(self) -> None:
        """A group of workers is started."""
        self._groups += 1
        self._watchdog.forget()

    def end(self) -> None:
        """A group has ended: nothing is expected of its ranks."""
        self._watchdog.forget()
