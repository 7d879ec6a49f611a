"""Losses on the embeddings of the global batch: what they are, and the small functions that they share.

Legend: b samples of this rank, B = world_size x b samples of all ranks, D dimension, K kinds of terms.

Every such loss is a mean over pairs, triplets or identities, or a sum of a few means: sum_k mix_k total_k / count_k. A
rank computes the terms whose *anchor* is one of its own samples, against all B; `objective.sharded` joins the parts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from trainer.losses.base import Family, LossSpec


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """All ranks' samples.

    Attributes:
        x_BD: embeddings as the backbone gave them.
        labels_B: classes, or -1 for a slot that only fills the batch up.
        own: those that are this rank's anchors.
    """

    x_BD: Tensor
    labels_B: Tensor
    own: slice

    @property
    def valid_B(self) -> Tensor:
        return self.labels_B >= 0

    def positives_bB(self) -> Tensor:
        """Where another sample is of the anchor's identity; never the anchor itself."""
        same_bB = (self.labels_B[self.own, None] == self.labels_B) & self.valid_B[self.own, None]
        same_bB[:, self.own].fill_diagonal_(False)
        return same_bB

    def negatives_bB(self) -> Tensor:
        """Where another sample is of another identity than the anchor."""
        other_bB = self.labels_B[self.own, None] != self.labels_B
        return other_bB & self.valid_B[self.own, None] & self.valid_B


@dataclass(frozen=True, slots=True)
class Terms:
    """One rank's part of a loss.

    Attributes:
        totals_K: sums of terms, differentiable.
        counts_K: how many terms a mean divides by.
        found_J: how many there are of what the loss lives on (triplets, say). A step without one of them, over all
            ranks, is counted as empty.
    """

    totals_K: Tensor
    counts_K: Tensor
    found_J: Tensor


class BatchLoss(LossSpec):
    """A loss on the embeddings of a batch. Subclasses give `terms`.

    Class attributes:
        needs_positives: nothing is learned from a batch in which no identity has two samples.
    """

    family: ClassVar[Family] = "pair"
    needs_positives: ClassVar[bool] = True

    def learnables(self, dimension: int, seed: int) -> dict[str, Tensor]:
        """Parameters that every rank holds, and their first values."""
        return {}

    def first_values(self, batch: GlobalBatch, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Better first values for the parameters, from the first batch of a run; the same batch on every rank."""
        return {}

    def mix(self) -> tuple[float, ...]:
        """What each of the K means is multiplied by."""
        return (1.0,)

    def terms(self, batch: GlobalBatch, values: Mapping[str, Tensor]) -> Terms:
        """This rank's terms. Padding takes no part; without terms the totals are 0 and so are their gradients."""
        raise NotImplementedError


# The greatest number of bf16, which a gradient of fp32 may still become on its way back through the network.
LARGEST = torch.finfo(torch.bfloat16).max


class _Widened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        ctx.dtype = x.dtype  # type: ignore[attr-defined]
        return x.double()

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Tensor:
        return gradients[0].clamp(-LARGEST, LARGEST).to(ctx.dtype)  # type: ignore[attr-defined]


def widened(x: Tensor) -> Tensor:
    """x in fp64, for what must hold at any length that fp32 can write: 1e-45 to 3e38, whose squares it cannot.

    The gradient by a direction grows as 1/|x|. Where it is beyond the numbers of fp32 and bf16 (for |x| below about
    1e-36) it is the greatest of them, not infinite.
    """
    wide: Tensor = x if x.dtype == torch.float64 else _Widened.apply(x)  # type: ignore[no-untyped-call]
    return wide


def unit_vectors(x_ND: Tensor) -> Tensor:
    """x/|x|, at any length but 0: that has no direction, stays the null vector and gets no gradient."""
    wide_ND = widened(x_ND)
    square_N = wide_ND.square().sum(dim=1)
    some_N = square_N > 0
    return (wide_ND * torch.where(some_N, torch.where(some_N, square_N, 1).rsqrt(), 0)[:, None]).to(x_ND.dtype)


def squared_distances(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    """|x_n - y_m|^2, [N, M], from products: |x|^2 + |y|^2 - 2 x.y, never negative.

    Its rounding error is that of |x|^2 + |y|^2: 1e-7 for unit vectors in fp32, so that distances below 1e-3 are noise.
    Embeddings that keep their lengths are to be `widened`.
    """
    square_N, square_M = x_ND.square().sum(dim=1), y_MD.square().sum(dim=1)
    return (square_N[:, None] + square_M - 2 * x_ND @ y_MD.T).clamp_min(0)


def members(labels_B: Tensor) -> tuple[Tensor, Tensor]:
    """Who belongs to whom, in B slots, of which the first are the identities of the batch and the others are empty.

    Returns:
        slot_B: the slot of each sample, in ascending order of the labels; the slot of padding is empty.
        member_SB: True where a valid sample belongs to the slot's identity.
    """
    ordered_B, order_B = torch.sort(labels_B, stable=True)
    number_B = torch.zeros_like(labels_B)
    number_B[1:] = (ordered_B[1:] != ordered_B[:-1]).cumsum(0)
    slot_B = torch.zeros_like(labels_B).scatter(0, order_B, number_B)
    slots_S = torch.arange(labels_B.shape[0], device=labels_B.device)
    return slot_B, (slots_S[:, None] == slot_B) & (labels_B >= 0)


def count(mask: Tensor) -> Tensor:
    """How many are True, as fp64, which holds the number of triplets of any batch exactly."""
    return mask.sum(dtype=torch.float64)
