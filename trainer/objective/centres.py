"""The centres of a centre loss, sharded by rows, and their movement.

Legend: b samples of this rank, B samples of all ranks, C classes, R classes of this rank, D dimension.

One step, on every rank:
  1. all-gather of embeddings and labels (`distributed.Gatherer`)
  2. the loss of the samples whose class this rank owns
     (center_invariant: before it, one all-reduce of one number, the sum of |c|^2 over all classes)
  3. ONE all-reduce of one number, the sum of the losses
in the backward one reduce-scatter of the embeddings' gradient, and in `update` nothing: every rank has seen all samples
and moves its own rows, of which it reads and writes only those of the batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.distributed import Gatherer, Group, RowRange, sum_over_ranks
from trainer.errors import UserError
from trainer.losses.batch import unit_vectors
from trainer.losses.centres import Center


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a step leaves behind for the centres to follow; [B] each but the embeddings."""

    x_BD: Tensor
    labels_B: Tensor
    mask_B: Tensor
    place_B: Tensor
    slope_B: Tensor | None


class CentreModule(nn.Module):
    """This rank's centres: `module(x_bD, labels_b, keys)` is the loss, equal on every rank, then `update()`.

    The backward gives x the exact gradient of the global loss by this rank's samples (see `distributed.sum_not_mean`
    for engines that average over ranks).

    Attributes:
        rows: the classes of this rank.
        centres: [R, D], class c at c - rows.start.
    """

    centres: Tensor

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
        self.spec, self.classes = spec, classes
        self.group = group or Group.current()
        if classes < self.group.size:
            raise UserError(
                f"{classes} classes cannot be shared by {self.group.size} workers; set scaling.workers to {classes} or "
                "less"
            )
        self.rows = RowRange.of(classes, self.group.rank, self.group.size)
        self.register_buffer("centres", torch.zeros(len(self.rows), dimension, device=device))
        # |c|^2 of each own class: adding them up must not read all centres in every step.
        self.register_buffer("squares_R", torch.zeros(len(self.rows), device=device), persistent=False)
        self._seen: _Seen | None = None
        self._gather = Gatherer(classes, dimension, self.group)

    squares_R: Tensor

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> object:
        """As torch's; the lengths follow from the centres."""
        keys = super().load_state_dict(state_dict, strict, assign)
        self.squares_R.copy_(self.centres.square().sum(dim=1))
        return keys

    def forward(self, x_bD: Tensor, labels_b: Tensor, keys: Sequence[str] | None = None) -> Tensor:
        """The loss of the global batch; 0 where there is nothing to learn from. Arguments as of `distributed.Gatherer`.

        Raises:
            UserError: on every rank, if a label is no class, an embedding is not finite, or the ranks' batches differ.
        """
        found = self._gather(x_bD, labels_b, keys)
        x_BD, labels_B = unit_vectors(found.x_BD) if self.spec.unit else found.x_BD, found.labels_B
        mask_B = (labels_B >= self.rows.start) & (labels_B < self.rows.stop)
        place_B = (labels_B - self.rows.start).clamp(0, len(self.rows) - 1)
        loss_B = (x_BD - self.centres[place_B].to(x_BD.dtype)).square().sum(dim=1) / 2
        slope_B = None
        if type(self.spec).extra is not Center.extra:
            mean = self.group.all_reduce(self.squares_R.sum()) / self.classes
            extra_B = self.spec.extra(self.squares_R[place_B], mean)
            slope_B = self.spec.extra_slope(self.squares_R[place_B], mean)
            loss_B = loss_B + (0 if extra_B is None else extra_B.to(loss_B.dtype))
        total = sum_over_ranks(torch.where(mask_B, loss_B, 0).sum(), self.group)
        self._seen = _Seen(x_BD.detach(), labels_B, mask_B, place_B, slope_B)
        found.raise_if_bad()
        return total / (labels_B >= 0).sum().clamp_min(1)

    @torch.no_grad()
    def of(self, classes_c: Tensor) -> Tensor:
        """The centres of these classes, [c, D], on every rank. A collective: one all-reduce of [c, D]."""
        classes_c = classes_c.to(self.centres.device)
        own_c = (classes_c >= self.rows.start) & (classes_c < self.rows.stop)
        found_cD = self.centres.new_zeros(len(classes_c), self.centres.shape[1])
        found_cD[own_c] = self.centres[classes_c[own_c] - self.rows.start]  # also where a rank has no class at all
        return self.group.all_reduce(found_cD)

    @torch.no_grad()
    def update(self) -> None:
        """Let the centres follow the samples of the last `forward`, once. Sends nothing."""
        if self._seen is None:
            return
        seen, self._seen = self._seen, None
        same_BB = (seen.labels_B[:, None] == seen.labels_B) & seen.mask_B
        n_B1 = same_BB.sum(dim=1, keepdim=True)
        centres_BD = self.centres[seen.place_B].to(seen.x_BD.dtype)
        # A product, whose sum has the same order in every run: the samples of each sample's class, added up.
        delta_BD = n_B1 * centres_BD - same_BB.to(seen.x_BD.dtype) @ seen.x_BD
        if seen.slope_B is not None:
            delta_BD = delta_BD + n_B1 * seen.slope_B[:, None].to(delta_BD.dtype) * centres_BD
        # One sample speaks for its class, the others add 0.
        first_B = seen.mask_B & (same_BB.cumsum(dim=1).diagonal() == 1)
        step_BD = torch.where(first_B[:, None], -self.spec.alpha * delta_BD / (1 + n_B1), 0)
        self.centres.index_add_(0, seen.place_B, step_BD.to(self.centres.dtype))
        self.squares_R[seen.place_B] = self.centres[seen.place_B].square().sum(dim=1)
