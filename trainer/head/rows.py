"""The rows of this rank that take part in a step, those of each sample's own class, and where their gradient goes.

Legend: B samples of all ranks, R rows of this rank (its classes x K centres), D dimension.

Sampling. A step of `sample_rate` below 1 takes the classes of the batch, which are always there, and a share q of all
classes, drawn anew in each step. With S the sum over all other classes of e^z, t the target's logit and 1 - p =
S / (S + e^t), the loss is log(1 + S e^-t), and a step finds an estimate in place of S:

  without correction  about q S. The loss is too small by up to log(1/q). The target's pull becomes q S / (q S + e^t):
                      right where S is far above e^t, but only the share q of 1 - p where a sample is learned. So is the
                      gradient of the other classes on average over the draws, q e^z / (q S + e^t).
  with correction     log(1/q) is added to the logit of each drawn class that is not of the batch: it counts for 1/q
                      classes. Given the batch, the estimate's mean over the draws is S. The loss, a concave function of
                      it, is on average still too small, by about Var / (2 (S + e^t)^2), and the gradient is off by
                      terms of that order. The price is noise: a class gets its gradient in the share q of the steps,
                      and then 1/q times as much.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from trainer.distributed import RowRange

SAMPLING_BLOCK = 1024  # classes; a power of two
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Rows:
    """The class centres of this rank.

    Attributes:
        weight_RD: all rows, class by class, K rows each.
        bias_C: of the classes of this rank, or None.
        chosen: the classes that take part in this step, sorted, counted from this rank's first; None: all. -1 stands
            for none: there the number of places is fixed, so that nobody has to wait for it.
        centres: K.
        correction: what the sampling adds to the logit of each class of `chosen` as a negative; None: nothing.
        padded: whether `chosen` may hold -1.
    """

    weight_RD: Tensor
    bias_C: Tensor | None
    chosen: Tensor | None
    centres: int
    correction: Tensor | None = None
    padded: bool = False

    def __len__(self) -> int:
        """Classes that take part."""
        return self.weight_RD.shape[0] // self.centres if self.chosen is None else self.chosen.shape[0]

    def tile(self, start: int, stop: int) -> Tensor:
        """A view where all take part."""
        places = self.places(start, stop)
        if isinstance(places, slice):
            return self.weight_RD[places]
        return self.weight_RD.index_select(0, places.clamp(min=0))

    def bias(self, start: int, stop: int) -> Tensor | None:
        """What is added to the logits of the participating classes [start, stop) as negatives: bias and correction."""
        parts = [] if self.correction is None else [self.correction[start:stop]]
        if self.bias_C is not None:
            at = slice(start, stop) if self.chosen is None else self.chosen[start:stop].clamp(min=0)
            parts.append(self.bias_C[at])
        return sum(parts[1:], start=parts[0]) if parts else None

    def places(self, start: int, stop: int) -> slice | Tensor:
        """Where the rows of the participating classes [start, stop) are in `weight_RD`; below 0: nowhere."""
        if self.chosen is None:
            return slice(start * self.centres, stop * self.centres)
        return rows_of(self.chosen[start:stop], self.centres)


def rows_of(classes: Tensor, centres: int) -> Tensor:
    """The K rows of each class, class by class; of class -1 all are below 0."""
    if centres == 1:
        return classes
    return (classes[:, None] * centres + torch.arange(centres, device=classes.device)).flatten()


@dataclass(frozen=True, slots=True)
class Own:
    """Which samples have their class on this rank.

    Attributes:
        mask_B: bool.
        place_B: position of the sample's class among the classes that take part; a valid one also where not own.
    """

    mask_B: Tensor
    place_B: Tensor

    @classmethod
    def of(cls, labels_B: Tensor, rows: RowRange) -> "Own":
        """Among all classes of this rank."""
        mask_B = (labels_B >= rows.start) & (labels_B < rows.stop)
        return cls(mask_B, (labels_B - rows.start).clamp(0, max(len(rows) - 1, 0)))

    def within(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Whether each sample's class is among [start, stop), and where; shapes do not depend on the data."""
        inside_B = self.mask_B & (self.place_B >= start) & (self.place_B < stop)
        return inside_B, (self.place_B - start).clamp(0, stop - start - 1)


def own_centres(rows: Rows, own: Own, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The centres of each sample's class, [B, K, D], and its bias, [B]; zeros where this rank has no class at all."""
    B, D = own.place_B.shape[0], rows.weight_RD.shape[1]
    if len(rows) == 0:
        zeros = rows.weight_RD.new_zeros(B, rows.centres, D, dtype=dtype)
        return zeros, zeros[:, 0, 0].clone()
    place_B = own.place_B if rows.chosen is None else rows.chosen[own.place_B]
    centres_BKD = rows.weight_RD.index_select(0, rows_of(place_B, rows.centres)).to(dtype).view(B, rows.centres, D)
    bias_C = rows.bias_C
    return centres_BKD, centres_BKD.new_zeros(B) if bias_C is None else bias_C[place_B].to(dtype)


class GradientSink:
    """Where the gradient of the rows goes, tile by tile: here `weight.grad`, in memory kept for the next step.

    It is dense where all rows take part, else a sparse tensor of the rows that do. The fused optimizer's own sink uses
    each tile up at once.

    Attributes:
        keeps: the tiles are parts of one buffer, which `tile(0, all)` returns also after the last tile.
        sparse: the gradient of the last backward with sampling, of the rows at `places`.
    """

    keeps = True
    sparse: Tensor | None = None
    places: slice | Tensor = slice(0)

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        self.spare: Tensor | None = None
        self.gradient_RD: Tensor = weight.new_empty(0)

    def begin(self, rows: Rows) -> bool:
        """Called before the first tile; True: add to what `tile` returns, False: write over it."""
        if rows.chosen is None and self.weight.grad is not None:
            if self.weight.grad.is_sparse:  # of an earlier backward with sampling
                self.weight.grad = self.weight.grad.to_dense()
            self.gradient_RD = self.weight.grad
            return True
        if self.weight.grad is not None:
            self.spare = None  # a sparse gradient of an earlier backward, which still uses it
        count, spare = len(rows) * rows.centres, self.spare
        if spare is None or spare.shape[0] < count or spare.dtype != self.weight.dtype:
            slack = 0 if count == self.weight.shape[0] else count // 16  # a sample's size varies a little
            spare = self.spare = self.weight.new_empty(count + slack, self.weight.shape[1])
        self.gradient_RD = spare[:count]
        return False

    def tile(self, start: int, stop: int) -> Tensor:
        """Memory for the gradient of rows [start, stop), counted among the rows that take part."""
        return self.gradient_RD[start:stop]

    def finished(self, places: slice | Tensor, gradient: Tensor) -> None:
        """The gradient of the rows at these places is complete; they are not read again in this backward."""

    def end(self, rows: Rows) -> None:
        """Called after the last tile."""
        if rows.chosen is None:
            self.weight.grad = self.gradient_RD
            return
        self.places = rows.places(0, len(rows))
        indices = rows_of(rows.chosen.clamp(min=0), rows.centres)[None]
        gradient = torch.sparse_coo_tensor(
            indices, self.gradient_RD, self.weight.shape, is_coalesced=not rows.padded, check_invariants=False
        )
        self.sparse = self.weight.grad = gradient if self.weight.grad is None else self.weight.grad + gradient
        if self.sparse is not gradient:
            self.sparse = None  # a sum of two backwards, which has its own places


def sampled_rows(
    rows: Rows, own: Own, first: int, rate: float, seed: int, *, corrected: bool, padded: bool
) -> tuple[Rows, Own]:
    """The rows that take part in a sampled step, and the samples' places among them.

    Args:
        own: places among all classes of this rank.
        first: the number of this rank's first class.
        corrected: with `Rows.correction`.
        padded: leave a place for each sample's class, used or not, so that the host need not know how many there are.
    """
    count = len(rows)
    sampled = sample_classes(first, first + count, rate, seed, own.place_B.device) - first
    chosen = torch.cat([sampled, torch.where(own.mask_B, own.place_B, count)]).sort().values
    again = torch.zeros_like(chosen, dtype=torch.bool)
    again[1:] = chosen[1:] == chosen[:-1]
    nobody = again | (chosen == count)
    if not padded:
        chosen = chosen[~nobody]
    place_B = torch.searchsorted(chosen, own.place_B).clamp(0, max(chosen.shape[0] - 1, 0))
    correction = None
    if corrected:  # a class of the batch is there in every draw, and stands for itself alone
        drawn = torch.ones(len(chosen) + 1, dtype=torch.bool, device=chosen.device)
        drawn[torch.where(own.mask_B, place_B, len(chosen))] = False
        correction = drawn[:-1].double() * -math.log(sampled_share(rate))
    if padded:
        found = chosen.new_zeros(len(chosen), dtype=torch.float64) if correction is None else correction
        correction = torch.where(nobody, -math.inf, found)
        chosen = torch.where(nobody, -1, chosen)
    return replace(rows, chosen=chosen, correction=correction, padded=padded), replace(own, place_B=place_B)


def sampled_share(rate: float) -> float:
    """q: the probability with which a class is among `sample_classes`."""
    return max(1, round(rate * SAMPLING_BLOCK)) / SAMPLING_BLOCK


def sample_classes(start: int, stop: int, rate: float, seed: int, device: torch.device) -> Tensor:
    """A random share of the classes [start, stop), sorted: of each block of 1024 round(1024 rate), at least one.

    Which classes are chosen depends on the seed alone, not on the range asked for, so that any number of ranks draws
    the same sample. Every class has the same probability. Work and memory are of the sample's size: in each block the
    numbers 0, 1, ... are sent through a permutation of the block's own (rounds of x -> a x + c mod 1024, x ^= x >> 5).

    Returns:
        int64 class numbers.
    """
    parts, cut = [], _cut(start, stop)
    for first, last in cut:
        whole = first % SAMPLING_BLOCK == 0 and last % SAMPLING_BLOCK == 0
        # Of a block that is cut the host finds out how many classes are inside, so that the device need not be asked.
        drawn = _drawn(first // SAMPLING_BLOCK, -(-last // SAMPLING_BLOCK), rate, seed, device if whole else CPU)
        parts.append(drawn if whole else drawn[(drawn >= first) & (drawn < last)].to(device, non_blocking=True))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)


def _cut(start: int, stop: int) -> list[tuple[int, int]]:
    """The range [start, stop) as part of a block, whole blocks, and part of a block; without empty ones."""
    inner = -(-start // SAMPLING_BLOCK) * SAMPLING_BLOCK
    outer = max(inner, stop // SAMPLING_BLOCK * SAMPLING_BLOCK)
    if inner >= stop:
        return [(start, stop)] if start < stop else []
    return [(a, b) for a, b in ((start, inner), (inner, outer), (outer, stop)) if a < b]


def _drawn(first: int, last: int, rate: float, seed: int, device: torch.device) -> Tensor:
    """The classes drawn in the blocks [first, last), sorted."""
    count = round(SAMPLING_BLOCK * sampled_share(rate))
    blocks = torch.arange(first, last, dtype=torch.int64, device=device)[:, None]
    state = _mixed(blocks * 0x9E3779B1 + seed % 2**31)
    x = torch.arange(count, dtype=torch.int64, device=device)[None, :].expand(blocks.shape[0], -1)
    for _ in range(4):
        state = _mixed(state + 0x85EBCA6B)
        multiplier, offset = (state & 1023) | 1, (state >> 10) & 1023
        x = (x * multiplier + offset) & (SAMPLING_BLOCK - 1)
        x = x ^ (x >> 5)
    return (blocks * SAMPLING_BLOCK + x.sort(dim=1).values).flatten()


def _mixed(state: Tensor) -> Tensor:
    """32 well-mixed bits of an int64 (the finaliser of MurmurHash3)."""
    state = state & 0xFFFFFFFF
    state = ((state ^ (state >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    state = ((state ^ (state >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return state ^ (state >> 16)
