"""Margins as functions of the cosine, without a head."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.losses.margins import Positives

ANGLES = torch.linspace(0.05, math.pi - 0.05, 61, dtype=torch.float64)


def plain(
    cos_B: Tensor,
    *,
    scale: float | Tensor = 1.0,
    norms_B: Tensor | None = None,
    values: Mapping[str, Tensor] | None = None,
    noise_B: Tensor | None = None,
    class_values_B: Tensor | None = None,
) -> Positives:
    """Positives from cosines alone, to look at a margin's curve without a head."""
    lengths_B = torch.ones_like(cos_B) * scale
    return Positives(
        cos_B,
        lengths_B * cos_B,
        lengths_B,
        torch.ones_like(cos_B) if norms_B is None else norms_B,
        torch.zeros_like(cos_B, dtype=torch.int64),
        values or {},
        noise_B,
        class_values_B,
    )


def slope(function: Any, cos: Tensor) -> tuple[Tensor, Tensor]:
    """Values and d/dcos."""
    cos = cos.clone().requires_grad_()
    values = function(cos)
    (gradient,) = torch.autograd.grad(values.sum(), cos)
    return values.detach(), gradient
