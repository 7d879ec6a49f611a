"""Learning rate and margin as functions of the step."""

import math
from typing import Literal

from pydantic import Field

from trainer.strict import Strict


class ScheduleConfig(Strict):
    """Learning rate and margin as functions of the step: nothing to save, nothing to restore."""

    kind: Literal["cosine", "polynomial", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    power: float = Field(2.0, gt=0, description="of the polynomial")
    final: float = Field(0.0, ge=0, le=1, description="share of the learning rate at the end")
    margin_warmup_steps: int = Field(0, ge=0, description="steps over which the margin grows from 0 to its value")

    def learning_rate_factor(self, step: int, total_steps: int) -> float:
        """Share of the base learning rate at `step` (counted from 0) of `total_steps`.

        Rises linearly over the warmup and reaches 1 at its end, then falls from 1 to `final`: along half a cosine
        (Loshchilov and Hutter 2017, eq. 5, one cycle), or as (1 - progress)^power, or not at all.
        """
        warmup = min(self.warmup_steps, total_steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.kind == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        falling = (1 - progress) ** self.power if self.kind == "polynomial" else (1 + math.cos(math.pi * progress)) / 2
        return self.final + (1 - self.final) * falling

    def margin_factor(self, step: int) -> float:
        """Share of the margin at `step`: linear from 0 to 1 over the margin's warmup."""
        return min(1.0, step / self.margin_warmup_steps) if self.margin_warmup_steps else 1.0
