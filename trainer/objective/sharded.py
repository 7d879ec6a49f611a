"""The losses on the embeddings of the global batch and the centre losses, on any number of ranks.

Legend: b samples of this rank, B = world_size x b samples of all ranks, C classes, R classes of this rank, D dimension,
K kinds of terms.

On every rank a step begins with an all-gather of embeddings and labels (`distributed.Gatherer`); in the backward one
reduce-scatter of the embeddings' gradient gives x the exact gradient of the global loss by this rank's samples (see
`distributed.sum_not_mean` for engines that average over ranks), also where other ranks hold the positives. Between them

  BatchLossModule  `BatchLoss.terms`: this rank's totals and counts; the largest thing made is [b, B] ([B, B] on one
                   rank); then ONE all-reduce of the K totals, K counts and what was found, in fp64.
                   A learned matrix costs one more all-reduce of its size (`distributed.replicated`).
  CentreModule     the loss of the samples whose class this rank owns; then ONE all-reduce of one number, its sum
                   (center_invariant: before it, one of the sum of |c|^2 over all classes).
                   `update` sends nothing: every rank has seen all samples and moves its own rows, of which it reads and
                   writes only those of the batch.

Both are called with (x_bD, labels_b, keys), as `Gatherer` says, and return the loss, equal on every rank; 0 where there
is nothing to learn from. They raise a UserError, on every rank, if a label is no class, an embedding is not finite, or
the ranks' batches differ.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from trainer.distributed import Gatherer, Group, RowRange, replicated, sum_over_ranks
from trainer.errors import UserError
from trainer.head.rows import Own
from trainer.losses.batch import BatchLoss, GlobalBatch, Terms, unit_vectors
from trainer.losses.centres import Center


class BatchLossModule(nn.Module):
    """A `BatchLoss` on some ranks; the gradient of its parameters is equal on every rank.

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
        *,
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
        self.group = group or Group.current()
        first = self.spec.learnables(dimension, seed)
        self.values = nn.ParameterDict({name: nn.Parameter(value.to(device)) for name, value in first.items()})
        self.register_buffer("empty_steps", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))  # stays where reading it is free
        self._gather = Gatherer(classes, dimension, self.group)

    def forward(self, x_bD: Tensor, labels_b: Tensor, keys: Sequence[str] | None = None) -> Tensor:
        found = self._gather(x_bD, labels_b, keys)
        batch = GlobalBatch(found.x_BD, found.labels_B, found.own)
        if len(self.values) and not self.started:
            found.raise_if_bad()  # first values are decompositions: NaN breaks them
            self._start(batch)
        values = {name: replicated(value, self.group) for name, value in self.values.items()}
        loss = self._join(self.spec.terms(batch, values)).to(found.x_BD.dtype)
        found.raise_if_bad()
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

    @torch.no_grad()
    def _start(self, batch: GlobalBatch) -> None:
        """Once a run: first values that need a batch. Rank 0's are taken, so that no rounding sets the ranks apart."""
        for name, value in self.spec.first_values(batch, dict(self.values)).items():
            mine = value.to(self.values[name]) * (self.group.rank == 0)
            self.values[name].copy_(self.group.all_reduce(mine))
        self.started.fill_(True)


class CentreModule(nn.Module):
    """This rank's centres of a centre loss: after each step `update()` lets them follow its samples.

    Attributes:
        rows: the classes of this rank.
        centres: [R, D], class c at c - rows.start.
        squares_R: |c|^2 of each own class: adding them up must not read all centres in every step.
    """

    centres: Tensor
    squares_R: Tensor

    def __init__(
        self,
        spec: Center,
        classes: int,
        dimension: int,
        *,
        device: torch.device | str = "cpu",
        group: Group | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.classes, self.group = spec, classes, group or Group.current()
        check_share(classes, self.group)
        self.rows = RowRange.of(classes, self.group.rank, self.group.size)
        self.register_buffer("centres", torch.zeros(len(self.rows), dimension, device=device))
        self.register_buffer("squares_R", torch.zeros(len(self.rows), device=device), persistent=False)
        # Of the last step: embeddings, labels, whose class is here, and the slope of the spec's extra loss.
        self._seen: tuple[Tensor, Tensor, Own, Tensor | None] | None = None
        self._gather = Gatherer(classes, dimension, self.group)

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> object:
        """As torch's; the lengths follow from the centres."""
        keys = super().load_state_dict(state_dict, strict, assign)
        self.squares_R.copy_(self.centres.square().sum(dim=1))
        return keys

    def forward(self, x_bD: Tensor, labels_b: Tensor, keys: Sequence[str] | None = None) -> Tensor:
        found = self._gather(x_bD, labels_b, keys)
        x_BD, labels_B = unit_vectors(found.x_BD) if self.spec.unit else found.x_BD, found.labels_B
        own, slope_B = Own.of(labels_B, self.rows), None
        loss_B = (x_BD - self.centres[own.place_B].to(x_BD.dtype)).square().sum(dim=1) / 2
        if self.spec.holds_lengths:
            mean = self.group.all_reduce(self.squares_R.sum()) / self.classes
            extra_B, slope_B = self.spec.extra(self.squares_R[own.place_B], mean)
            loss_B = loss_B + extra_B.to(loss_B.dtype)
        total = sum_over_ranks(torch.where(own.mask_B, loss_B, 0).sum(), self.group)
        self._seen = x_BD.detach(), labels_B, own, slope_B
        found.raise_if_bad()
        return total / (labels_B >= 0).sum().clamp_min(1)

    @torch.no_grad()
    def of(self, classes_c: Tensor) -> Tensor:
        """The centres of these classes, [c, D], on every rank. A collective: one all-reduce of [c, D]."""
        own = Own.of(classes_c.to(self.centres.device), self.rows)
        return self.group.all_reduce(torch.where(own.mask_B[:, None], self.centres[own.place_B], 0))

    @torch.no_grad()
    def update(self) -> None:
        """Let the centres follow the samples of the last `forward`, once. Sends nothing."""
        if self._seen is None:
            return
        (x_BD, labels_B, own, slope_B), self._seen = self._seen, None
        same_BB = (labels_B[:, None] == labels_B) & own.mask_B
        n_B1 = same_BB.sum(dim=1, keepdim=True)
        centres_BD = self.centres[own.place_B].to(x_BD.dtype)
        # A product, whose sum has the same order in every run: the samples of each sample's class, added up.
        delta_BD = n_B1 * centres_BD - same_BB.to(x_BD.dtype) @ x_BD
        if slope_B is not None:
            delta_BD = delta_BD + n_B1 * slope_B[:, None].to(delta_BD.dtype) * centres_BD
        # One sample speaks for its class, the others add 0.
        first_B = own.mask_B & (same_BB.cumsum(dim=1).diagonal() == 1)
        step_BD = torch.where(first_B[:, None], -self.spec.alpha * delta_BD / (1 + n_B1), 0)
        self.centres.index_add_(0, own.place_B, step_BD.to(self.centres.dtype))
        self.squares_R[own.place_B] = self.centres[own.place_B].square().sum(dim=1)


def check_share(classes: int, group: Group) -> None:
    """Refuse, with a UserError, more ranks than classes that they could share."""
    if classes < group.size:
        raise UserError(
            f"{classes} classes cannot be shared by {group.size} workers; set scaling.workers to {classes} or less"
        )
