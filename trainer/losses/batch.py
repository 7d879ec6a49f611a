"""Losses on the embeddings of the global batch, and what runs them on any number of ranks.

Legend: b samples of this rank, B = world_size x b samples of all ranks, D dimension, K kinds of terms.

Every loss of this kind is a mean over terms - pairs, triplets, identities - or a sum of a few such means:
L = sum_k mix_k (total_k / count_k). Each rank computes the terms whose *anchor* is one of its own samples, against all
B samples. One step, on every rank:
  1. all-gather of embeddings and labels (`distributed.gather_rows`)
  2. `BatchLoss.terms`: this rank's totals and counts; the largest thing made is [b, B] ([B, B] on one rank)
  3. ONE all-reduce of the K totals, K counts and what was found, in fp64
  4. the loss from them, the same on every rank
and in the backward one reduce-scatter of the embeddings' gradient: a rank's part of the gradient reaches the positives
and negatives that other ranks hold. A learned matrix costs one more all-reduce of its size (`distributed.replicated`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from trainer.distributed import Group, gather_rows, replicated, sum_over_ranks
from trainer.errors import UserError
from trainer.gather import Fault, check_shapes
from trainer.losses.base import Family, LossSpec


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """All ranks' samples, of which `start` to `stop` are this rank's anchors.

    Attributes:
        x_BD: embeddings as the backbone gave them.
        labels_B: classes, or -1 for a slot that only fills the batch up.
    """

    x_BD: Tensor
    labels_B: Tensor
    start: int
    stop: int

    @property
    def own(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def valid_B(self) -> Tensor:
        return self.labels_B >= 0

    def positives_bB(self) -> Tensor:
        """Where another sample is of the anchor's identity; never the anchor itself."""
        own_b = torch.arange(self.start, self.stop, device=self.labels_B.device)
        same_bB = (self.labels_B[self.own, None] == self.labels_B) & self.valid_B[self.own, None]
        same_bB[torch.arange(len(own_b), device=own_b.device), own_b] = False
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
        found_J: how many there are of what the loss lives on (triplets, say). A step in which, over all ranks, one of
            them is 0 is counted as empty.
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

    def resolve(self, classes: int, dimension: int) -> Self:
        """The same loss with every `auto` replaced, and its constants checked against the problem's size.

        Raises:
            UserError: a constant is outside what is legal for so many classes in so many dimensions.
        """
        return self

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


class BatchLossModule(nn.Module):
    """A `BatchLoss` on some ranks: `loss(x_bD, labels_b, keys)`, equal on every rank.

    Its backward gives x the exact gradient of the global loss by this rank's samples (see `distributed.sum_not_mean`
    for engines that average over ranks), and the parameters theirs, equal on every rank.

    A step without anything to learn from (one identity in the batch, no triplet of the kind that is selected, only
    padding) has loss 0 or is without that kind of term, gives no gradient, and is counted.

    Attributes:
        spec: the loss, resolved.
        values: the learned parameters by name, held by every rank.
        empty_steps: how many steps found nothing to learn from; int64, never read here.
    """

    empty_steps: Tensor
    started: Tensor

    def __init__(
        self,
        spec: BatchLoss,
        classes: int,
        dimension: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        group: Group | None = None,
    ) -> None:
        """
        Args:
            classes: C, of the whole data set.
            group: the ranks; default: `Group.current()`.

        Raises:
            UserError: a constant of the loss is outside what so many classes and dimensions allow.
        """
        super().__init__()
        if classes < 2:
            raise UserError(
                f"{spec.name}: {classes} identity cannot be told from another; the data set needs 2 or more"
            )
        self.spec = spec.resolve(classes, dimension)
        self.classes, self.dimension = classes, dimension
        self.group = group or Group.current()
        first = self.spec.learnables(dimension, seed)
        self.values = nn.ParameterDict({name: nn.Parameter(value.to(device)) for name, value in first.items()})
        self.register_buffer("empty_steps", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))  # stays where reading it is free
        self._checked = False

    def forward(self, x_bD: Tensor, labels_b: Tensor, keys: Sequence[str] | None = None) -> Tensor:
        """The loss of the global batch.

        Args:
            x_bD: embeddings of this rank's samples, as the backbone gives them.
            labels_b: int64 classes, -1 for a slot that only fills the batch; equally many on every rank.
            keys: the samples' names, for messages.

        Raises:
            UserError: on every rank, if a label is no class, an embedding is not finite, or the ranks' batches differ.
        """
        check_shapes(x_bD, labels_b, self.dimension)
        if not self._checked:
            self.group.check_equal(x_bD.shape[0], "batches of sizes")
            self._checked = True
        x_BD, labels_B = gather_rows(x_bD, labels_b.to(x_bD.device), self.group)
        if x_BD.dtype in (torch.bfloat16, torch.float16):
            x_BD = x_BD.float()
        fault = Fault(x_BD, labels_B, self.classes)
        start = self.group.rank * x_bD.shape[0]
        batch = GlobalBatch(x_BD, labels_B, start, start + x_bD.shape[0])
        if not self._started:
            fault.raise_if_any(self.group, x_bD.shape[0], keys)  # first values are decompositions: NaN breaks them
            self._start(batch)
        values = {name: replicated(value, self.group) for name, value in self.values.items()}
        loss = self._join(self.spec.terms(batch, values)).to(x_BD.dtype)
        fault.raise_if_any(self.group, x_bD.shape[0], keys)
        return loss

    def _join(self, terms: Terms) -> Tensor:
        """All ranks' terms in one message, and the loss from them."""
        kinds = terms.totals_K.shape[0]
        parts = (terms.totals_K, terms.counts_K, terms.found_J)
        total = sum_over_ranks(torch.cat([part.double() for part in parts]), self.group)
        totals_K, counts_K, found_J = total[:kinds], total[kinds : 2 * kinds].detach(), total[2 * kinds :].detach()
        if self.training:
            self.empty_steps += (found_J == 0).any()
        return sum(
            (mix * totals_K[k] / counts_K[k].clamp_min(1) for k, mix in enumerate(self.spec.mix())),
            start=totals_K.new_zeros(()),
        )

    @property
    def _started(self) -> bool:
        """Whether the first values need no batch any more; the same on every rank."""
        return not len(self.values) or bool(self.started)

    @torch.no_grad()
    def _start(self, batch: GlobalBatch) -> None:
        """Once a run: first values that need a batch. Rank 0's are taken, so that no rounding sets the ranks apart."""
        for name, value in self.spec.first_values(batch, dict(self.values)).items():
            mine = value.to(self.values[name]) * (self.group.rank == 0)
            self.values[name].copy_(self.group.all_reduce(mine))
        self.started.fill_(True)


def unit_vectors(x_ND: Tensor) -> Tensor:
    """x/|x|. An embedding of length 0 has no direction: it stays the null vector and gets no gradient."""
    square_N = x_ND.square().sum(dim=1)
    some_N = square_N > 0
    return x_ND * torch.where(some_N, torch.where(some_N, square_N, 1).rsqrt(), 0)[:, None]


def squared_distances(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    """|x_n - y_m|^2, [N, M], from products: |x|^2 + |y|^2 - 2 x.y, never negative.

    Its rounding error is that of |x|^2 + |y|^2: 1e-7 for unit vectors in fp32, so that distances below 1e-3 are noise.
    """
    square_N, square_M = x_ND.square().sum(dim=1), y_MD.square().sum(dim=1)
    return (square_N[:, None] + square_M - 2 * x_ND @ y_MD.T).clamp_min(0)


def distances(squared: Tensor) -> Tensor:
    """The root, with derivative 0 at 0, where the direction in which two equal points should part is not defined."""
    some = squared > 0
    return torch.where(some, torch.where(some, squared, 1).sqrt(), 0)


def groups(labels_B: Tensor) -> Tensor:
    """Each sample's identity as a number from 0 among those of the batch, in ascending order of the labels."""
    ordered_B, order_B = torch.sort(labels_B, stable=True)
    number_B = torch.zeros_like(labels_B)
    number_B[1:] = (ordered_B[1:] != ordered_B[:-1]).cumsum(0)
    return torch.zeros_like(labels_B).scatter(0, order_B, number_B)


def members(labels_B: Tensor) -> tuple[Tensor, Tensor]:
    """Who belongs to whom, in B slots, of which the first are the identities of the batch and the others are empty.

    Returns:
        slot_B: the slot of each sample; the slot of padding is empty.
        member_SB: True where a valid sample belongs to the slot's identity.
    """
    slot_B = groups(labels_B)
    slots_S = torch.arange(labels_B.shape[0], device=labels_B.device)
    return slot_B, (slots_S[:, None] == slot_B) & (labels_B >= 0)


def orthogonal_rows(rows: int, dimension: int, seed: int) -> Tensor:
    """[rows, D] orthonormal rows, rows <= D, drawn evenly from all such matrices; fp32."""
    generator = torch.Generator().manual_seed(seed)
    square, upper = torch.linalg.qr(torch.randn(dimension, rows, generator=generator, dtype=torch.float64))
    rows_nD: Tensor = (square * upper.diagonal().sign()).T.float()
    return rows_nD.contiguous()


def principal_rows(x_BD: Tensor, valid_B: Tensor, rows: int) -> Tensor:
    """[rows, D] the directions of greatest variance of the valid samples, orthonormal, by falling variance.

    Where the samples span fewer dimensions, the rest is some orthonormal completion.
    """
    x_BD = x_BD.double() * valid_B[:, None]
    count = valid_B.sum().clamp_min(1)
    centred_BD = (x_BD - x_BD.sum(dim=0) / count) * valid_B[:, None]
    _, vectors_DD = torch.linalg.eigh(centred_BD.T @ centred_BD)  # by rising variance
    rows_nD: Tensor = vectors_DD.flip(1)[:, :rows].T.float()
    return rows_nD.contiguous()


def count(mask: Tensor) -> Tensor:
    """How many are True, as fp64, which holds the number of triplets of any batch exactly."""
    return mask.sum(dtype=torch.float64)
