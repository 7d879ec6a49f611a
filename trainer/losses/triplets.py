"""Triplet loss, and which triplets of a batch it is taken over.

Legend: b anchors of this rank, B samples of all ranks.

Of a batch with B samples there are up to B^3 / 4 triplets. None is ever made: with d_ap and d_an the squared distances
of an anchor to its positives and negatives, and h_ap = d_ap + alpha, the sum over the selected triplets that violate
the margin is

    sum over (p, n) of (h_ap - d_an)  =  sum_p k_ap h_ap - sum_n m_an d_an,

where k_ap counts the negatives that p forms such a triplet with, and m_an the positives that n does. Both counts come
from binary searches in the anchor's sorted distances: B^2 log B time, [b, B] memory. The counts do not change within a
small move of the embeddings, so this is also the exact gradient.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from trainer.checked import Within
from trainer.losses.batch import BatchLoss, GlobalBatch, Terms, count, squared_distances, unit_vectors

# The literature also writes the two with a hyphen.
Mining = Literal["all", "easy", "semi_hard", "hard", "batch_hard", "semi-hard", "batch-hard"]


class Triplet(BatchLoss):
    """An anchor shall be nearer to every positive than to any negative, by alpha in squared distance of unit vectors.

    L = mean over the selected triplets of max(0, d_ap - d_an + alpha). Where it is not 0:
    dL/da = 2 (n - p), dL/dp = 2 (p - a), dL/dn = 2 (a - n), on unit vectors.

    The mining, from all triplets of the global batch:
      all         every triplet
      easy        d_an >= d_ap + alpha: loss and gradient are 0 by definition; shows what is learned, trains nothing
      semi_hard   d_ap < d_an < d_ap + alpha
      hard        d_an <= d_ap
      batch_hard  for each anchor its furthest positive and its nearest negative
    easy, semi_hard and hard share all triplets out among them.

    With `average: active` the mean is over the selected triplets that violate the margin; it makes a difference for
    `all` and `batch_hard`, whose mean otherwise fades as triplets become easy.

    A step without a selected triplet (one identity in the batch, no two samples of one, none of that kind) has loss 0
    and counts as empty.
    """

    formula: ClassVar[str] = "max(0, |a - p|^2 - |a - n|^2 + alpha)"
    source: ClassVar[str] = (
        "Schroff et al. 2015, FaceNet, eq. 1 to 4; "
        "batch_hard: Hermans et al. 2017, In defense of the triplet loss, eq. 5"
    )

    title: ClassVar[str] = "triplet"

    name: Literal["triplet"] = "triplet"
    # Below 1e-4 the margin would drown in the rounding of a fp32 distance.
    alpha: Annotated[float, Within(ge=1e-4, le=4)] = 0.2  # margin in squared distance of unit vectors
    mining: Mining = "semi_hard"
    average: Literal["selected", "active"] = "selected"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "mining", self.mining.replace("-", "_"))

    def terms(self, batch: GlobalBatch, values: Mapping[str, Tensor]) -> Terms:
        x_BD = unit_vectors(batch.x_BD)
        squared_bB = squared_distances(x_BD[batch.own], x_BD)
        same_bB, other_bB = batch.positives_bB(), batch.negatives_bB()
        if self.mining == "batch_hard":
            total, selected, active = self._batch_hard(squared_bB, same_bB, other_bB)
        else:
            total, selected, active = sum_over_kind(squared_bB, same_bB, other_bB, self.alpha, self.mining)
        divisor = active if self.average == "active" else selected
        return Terms(total[None], divisor[None], selected[None])

    def _batch_hard(self, d_bB: Tensor, same_bB: Tensor, other_bB: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        furthest_b = torch.where(same_bB, d_bB, -torch.inf).amax(dim=1)
        nearest_b = torch.where(other_bB, d_bB, torch.inf).amin(dim=1)
        whole_b = same_bB.any(dim=1) & other_bB.any(dim=1)
        loss_b = torch.where(whole_b, furthest_b, 0) - torch.where(whole_b, nearest_b, 0) + self.alpha
        loss_b = torch.where(whole_b, loss_b.clamp_min(0), 0)
        return loss_b.sum(), count(whole_b), count(loss_b > 0)


def sum_over_kind(
    d_bB: Tensor, same_bB: Tensor, other_bB: Tensor, alpha: float, kind: Mining
) -> tuple[Tensor, Tensor, Tensor]:
    """Over the triplets of a kind (not batch_hard): the sum of max(0, d_ap - d_an + alpha), how many triplets there
    are, and how many of them have a loss; for any d, also negative ones."""
    per_positive_bB, per_negative_bB, selected = _counts(d_bB.detach(), same_bB, other_bB, alpha, kind)
    reach_bB = per_positive_bB.to(d_bB.dtype) * (d_bB + alpha)
    total = (reach_bB - per_negative_bB.to(d_bB.dtype) * d_bB).sum(dtype=torch.float64)
    return total, selected, per_positive_bB.sum(dtype=torch.float64)


def _counts(
    d_bB: Tensor, same_bB: Tensor, other_bB: Tensor, alpha: float, kind: Mining
) -> tuple[Tensor, Tensor, Tensor]:
    """k_ap (0 where p is no positive), m_an (0 where n is no negative), and how many triplets are selected."""
    reach_bB = d_bB + alpha
    negatives_bB = torch.where(other_bB, d_bB, torch.inf).sort(dim=1).values
    positives_bB = torch.where(same_bB, d_bB, -torch.inf).sort(dim=1).values
    # violating: d_an < d_ap + alpha, counted for each positive and for each negative; hard: d_an <= d_ap
    violating_p_bB = torch.searchsorted(negatives_bB, reach_bB)
    hard_p_bB = torch.searchsorted(negatives_bB, d_bB, right=True)
    violating_n_bB = d_bB.shape[1] - torch.searchsorted(positives_bB + alpha, d_bB, right=True)
    hard_n_bB = d_bB.shape[1] - torch.searchsorted(positives_bB, d_bB)
    available_b1 = other_bB.sum(dim=1, keepdim=True)
    of_p_bB, of_n_bB, selected_bB = {
        "all": (violating_p_bB, violating_n_bB, available_b1.expand_as(d_bB)),
        "easy": (violating_p_bB * 0, violating_n_bB * 0, available_b1 - violating_p_bB),
        "semi_hard": (violating_p_bB - hard_p_bB, violating_n_bB - hard_n_bB, violating_p_bB - hard_p_bB),
        "hard": (hard_p_bB, hard_n_bB, hard_p_bB),
    }[kind]
    selected = torch.where(same_bB, selected_bB, 0).sum(dtype=torch.float64)
    return torch.where(same_bB, of_p_bB, 0), torch.where(other_bB, of_n_bB, 0), selected
