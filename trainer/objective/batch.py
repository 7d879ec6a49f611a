"""A loss on the embeddings of the global batch, on any number of ranks.

Legend: b samples of this rank, B = world_size x b samples of all ranks, D dimension, K kinds of terms.

One step, on every rank:
  1. all-gather of embeddings and labels (`distributed.Gatherer`)
  2. `BatchLoss.terms`: this rank's totals and counts; the largest thing made is [b, B] ([B, B] on one rank)
  3. ONE all-reduce of the K totals, K counts and what was found, in fp64
  4. the loss from them, the same on every rank
and in the backward one reduce-scatter of the embeddings' gradient: a rank's part of the gradient reaches the positives
and negatives that other ranks hold. A learned matrix costs one more all-reduce of its size (`distributed.replicated`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainer.distributed import Gatherer, Group, replicated, sum_over_ranks
from trainer.errors import UserError
from trainer.losses.batch import BatchLoss, GlobalBatch, Terms


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
        """The loss of the global batch; 0 where there is nothing to learn from. Arguments as of `distributed.Gatherer`.

        Raises:
            UserError: on every rank, if a label is no class, an embedding is not finite, or the ranks' batches differ.
        """
        found = self._gather(x_bD, labels_b, keys)
        batch = GlobalBatch(found.x_BD, found.labels_B, found.own.start, found.own.stop)
        if not self._started:
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
