"""What is done when a loss is not finite, and the record of it.

run.out/diverged.jsonl has a line for each time: the step, what was seen, what was done, the factor of the learning rate
from then on, and the samples of the batches in question. A loss is looked at when the next batch is under way (except
with `run.on_divergence=skip`), so there are up to two.
"""

import json
from collections import deque
from collections.abc import Sequence
from typing import Literal

from trainer.config import Config
from trainer.distributed import Group
from trainer.errors import Diverged
from trainer.storage import Folder

RECORD = "diverged.jsonl"
_MOST_SKIPPED = 10  # batches one after the other: then it is not they that are bad
_MOST_BACK_OFFS = 8


class Divergence:
    """The record of a run, the same on every rank. Made by all ranks together.

    Args:
        resume: go on with the record that is there; else it is an earlier run's, and goes.

    Attributes:
        rate: what the learning rate is multiplied by.
    """

    def __init__(self, config: Config, group: Group, resume: bool) -> None:
        self._config, self._group, self._folder = config.run, group, Folder.at(config.run.out)
        self._batches: deque[tuple[int, Sequence[str]]] = deque(maxlen=2)
        self._skipped = 0
        if group.rank == 0 and not resume:
            self._folder.remove([RECORD])
        told = json.dumps(self._back_offs()) if group.rank == 0 else ""
        rates: list[float] = json.loads(group.gather_text(told)[0])
        self.rate, self._back_off_count = (rates[-1] if rates else 1.0), len(rates)

    def begin(self, step: int, keys: Sequence[str]) -> None:
        """The samples of the step that is computed now."""
        self._batches.append((step, keys))

    def went_well(self) -> None:
        """The step's loss is finite."""
        self._skipped = 0

    def skip(self, step: int, error: Diverged) -> None:
        """Record a batch that is skipped. A collective.

        Raises:
            Diverged: it is one of too many.
        """
        self._skipped += 1
        if self._skipped > _MOST_SKIPPED:
            raise Diverged(f"{error}; so did the {_MOST_SKIPPED} batches before it, which were skipped") from error
        while len(self._batches) > 1:  # those before were good
            self._batches.popleft()
        self._record("skip", step, error)

    def goes_back(self, step: int, error: Diverged) -> bool:
        """Record a divergence that cannot be skipped; whether the run goes back with a lower rate. A collective."""
        back = self._config.on_divergence == "back_off" and self._back_off_count < _MOST_BACK_OFFS
        if back:
            self.rate *= self._config.back_off
        self._record("back_off" if back else "stop", step, error)
        return back

    def _record(self, action: Literal["skip", "back_off", "stop"], step: int, error: Diverged) -> None:
        parts = [json.loads(text) for text in self._group.gather_text(json.dumps(list(self._batches)))]
        if self._group.rank != 0:
            return
        keys: dict[int, list[str]] = {}
        for number, own in (batch for part in parts for batch in part):
            keys.setdefault(number, []).extend(key for key in own if key)
        line = {"step": step, "error": str(error), "action": action, "rate": self.rate, "keys": keys}
        self._folder.write(RECORD, self._text() + json.dumps(line) + "\n")

    def _text(self) -> str:
        try:
            return self._folder.read(RECORD).decode()
        except FileNotFoundError:
            return ""

    def _back_offs(self) -> list[float]:
        """The rates of the times that the run went back."""
        entries = [json.loads(line) for line in self._text().splitlines()]
        return [float(entry["rate"]) for entry in entries if entry["action"] == "back_off"]
