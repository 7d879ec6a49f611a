"""Whether an evaluation is the best so far, for the checkpoint that is to be kept."""

import json
from collections.abc import Mapping

from trainer.checkpoint.keep import Shelf
from trainer.distributed import Group
from trainer.errors import UserError
from trainer.storage import Folder


class Best:
    """The best value of a metric, the same on every rank.

    Args:
        metric: its name; None: nothing is ever the best.
        greater: the metrics that there are, and whether the greater value is the better one.

    Raises:
        UserError: there is no such metric.
    """

    def __init__(self, metric: str | None, greater: Mapping[str, bool]) -> None:
        if metric is not None and metric not in greater:
            there = f"name one of {', '.join(sorted(greater))}" if greater else "set run.eval_every and data.val_split"
            raise UserError(f"run.keep_best={metric} is not measured in this run; {there}, or leave it out")
        self.metric, self._value = metric or "", -float("inf")  # the greater, the better
        self._sign = 1.0 if metric is None or greater[metric] else -1.0

    def resume(self, folder: Folder, step: int, group: Group) -> None:
        """Go on from what the checkpoints up to a step say. A collective."""
        found = Shelf.of(folder).best() if group.rank == 0 and self.metric else None
        told = group.gather_text(json.dumps(found[1] if found is not None and found[0] <= step else {}))[0]
        if (value := json.loads(told).get(self.metric)) is not None:
            self._value = self._sign * value

    def __call__(self, values: Mapping[str, float]) -> bool:
        """Whether these are the best; from then on later ones are compared with them. What is not a number, never."""
        value = self._sign * values.get(self.metric, float("nan"))
        if better := value > self._value:
            self._value = value
        return better
