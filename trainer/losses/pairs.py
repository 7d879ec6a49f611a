"""Losses on pairs: contrastive and marginal loss.

Legend: b samples of this rank, B samples of all ranks. Pairs are all pairs of two different valid samples of the global
batch; each is met twice, once from either end, which leaves every mean as it is.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from trainer.checked import Within
from trainer.losses.batch import BatchLoss, GlobalBatch, Terms, count, distances, squared_distances, unit_vectors


class Contrastive(BatchLoss):
    """Pairs of one identity are pulled together, other pairs pushed apart until they are m away from each other.

    L = y/2 d^2 + (1 - y)/2 max(0, m - d)^2 of a pair, d = |a - b|, y = 1 for one identity.
    dL/da = (a - b) for y = 1; -(m - d) (a - b)/d for another identity and d < m, 0 at d = 0.

    With `balanced` the loss is half the mean over the pairs of one identity plus half the mean over the others, as if
    genuine and impostor pairs were drawn equally often, as in the paper's experiments; without it the plain mean over
    all pairs, of which in a batch of P identities x K samples only (K - 1) / (P K - 1) are of one identity.

    A batch with one identity, or without two samples of one, has only the other half; it counts as an empty step.
    """

    formula: ClassVar[str] = "y/2 d^2 + (1-y)/2 max(0, m - d)^2"
    source: ClassVar[str] = (
        "Hadsell et al. 2006, Dimensionality reduction by learning an invariant mapping, eq. 4; "
        "Sun et al. 2014, Deep learning face representation by joint identification-verification, eq. 2"
    )
    title: ClassVar[str] = "contrastive"
    demo_in_plane: ClassVar[Mapping[str, Any]] = {"margin": 0.6}

    name: Literal["contrastive"] = "contrastive"
    margin: Annotated[float, Within(gt=0)] = 1.0  # m; unit vectors are at most 2 apart
    unit: bool = True  # on unit vectors, as they are compared later; the paper: as they are
    balanced: bool = True  # half the weight for pairs of one identity, half for the others

    @property
    def on_directions(self) -> bool:
        return self.unit

    def mix(self) -> tuple[float, ...]:
        return (0.5, 0.5) if self.balanced else (1.0,)

    def terms(self, batch: GlobalBatch, values: Mapping[str, Tensor]) -> Terms:
        x_BD = unit_vectors(batch.x_BD) if self.unit else batch.x_BD
        squared_bB = squared_distances(x_BD[batch.own], x_BD)
        same_bB, other_bB = batch.positives_bB(), batch.negatives_bB()
        pull = torch.where(same_bB, squared_bB, 0).sum() / 2
        push = torch.where(other_bB, (self.margin - distances(squared_bB)).clamp_min(0).square(), 0).sum() / 2
        counts = torch.stack([count(same_bB), count(other_bB)])
        if self.balanced:
            return Terms(torch.stack([pull, push]), counts, counts)
        return Terms((pull + push)[None], counts.sum()[None], counts)


class Marginal(BatchLoss):
    """Pairs of one identity nearer than theta - xi, other pairs further than theta + xi, in squared distance.

    L = mean over pairs of max(0, xi - y (theta - d^2)), d^2 = |a/|a| - b/|b||^2, y = 1 for one identity, else -1.
    dL/d(d^2) = y where the pair violates its bound, else 0; d(d^2)/da-hat = 2 (a-hat - b-hat).

    A batch with one identity, or without two samples of one, has only the other kind; it counts as an empty step.
    """

    formula: ClassVar[str] = "max(0, xi - y (theta - |a/|a| - b/|b||^2))"
    source: ClassVar[str] = "Deng et al. 2017, Marginal loss for deep face recognition, section 3"
    title: ClassVar[str] = "marginal"
    demo_in_plane: ClassVar[Mapping[str, Any]] = {"theta": 0.2, "xi": 0.1}

    name: Literal["marginal"] = "marginal"
    theta: Annotated[float, Within(gt=0, lt=4)] = 1.2  # boundary, in squared distance of unit vectors
    xi: Annotated[float, Within(ge=0, lt=4)] = 0.3  # half the width of the gap around it

    def terms(self, batch: GlobalBatch, values: Mapping[str, Tensor]) -> Terms:
        x_BD = unit_vectors(batch.x_BD)
        squared_bB = squared_distances(x_BD[batch.own], x_BD)
        same_bB, other_bB = batch.positives_bB(), batch.negatives_bB()
        excess_bB = squared_bB - self.theta
        excess_bB = (self.xi + torch.where(same_bB, excess_bB, -excess_bB)).clamp_min(0)
        counts = torch.stack([count(same_bB), count(other_bB)])
        return Terms(torch.where(same_bB | other_bB, excess_bB, 0).sum()[None], counts.sum()[None], counts)
