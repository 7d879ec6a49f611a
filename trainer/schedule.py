"""Learning rate and margin as functions of the step: nothing to save, nothing to restore."""

import math

from trainer.config import ScheduleConfig


def learning_rate_factor(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """Share of the base learning rate at `step` (counted from 0) of `total_steps`.

    Rises linearly over the warmup and reaches 1 at its end, then falls from 1 to `config.final`: along half a cosine
    (Loshchilov and Hutter 2017, eq. 5, one cycle), or as (1 - progress)^power, or not at all.
    """
    warmup = min(config.warmup_steps, total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if config.kind == "constant":
        return 1.0
    falling = (1 - progress) ** config.power if config.kind == "polynomial" else (1 + math.cos(math.pi * progress)) / 2
    return config.final + (1 - config.final) * falling


def margin_factor(step: int, config: ScheduleConfig) -> float:
    """Share of the margin at `step`: linear from 0 to 1 over the margin's warmup."""
    return min(1.0, step / config.margin_warmup_steps) if config.margin_warmup_steps else 1.0
