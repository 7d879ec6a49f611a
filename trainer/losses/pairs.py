"""Losses on pairs, contrastive and marginal loss; and CoCo, softmax over the identities of the batch.

Legend: b samples of this rank, B samples of all ranks, S slots for identities (S = B), D dimension. Pairs are all pairs
of two different valid samples of the global batch; each is met twice, once from either end, which leaves every mean as
it is.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

import torch
from torch import Tensor

from trainer.checked import Within
from trainer.losses.batch import BatchLoss, GlobalBatch, Terms, count, members, squared_distances, unit_vectors, widened
from trainer.losses.bounds import coco_scale, positive_scale


def distances(squared: Tensor) -> Tensor:
    """The root, with derivative 0 at 0, where the direction in which two equal points should part is not defined."""
    some = squared > 0
    return torch.where(some, torch.where(some, squared, 1).sqrt(), 0)


class Contrastive(BatchLoss):
    """Pairs of one identity are pulled together, other pairs pushed apart until they are m away from each other.

    L = y/2 d^2 + (1 - y)/2 max(0, m - d)^2 of a pair, d = |a - b|, y = 1 for one identity.
    dL/da = (a - b) for y = 1; -(m - d) (a - b)/d for another identity and d < m, 0 at d = 0.

    With `balanced` the loss is half the mean over the pairs of one identity plus half the mean over the others, as if
    both were drawn equally often, as in the paper's experiments; without it the plain mean over all pairs, of which in
    a batch of P identities x K samples only (K - 1) / (P K - 1) are of one identity.

    A batch with one identity, or without two samples of one, has only the other half; it counts as an empty step.
    """

    formula = "y/2 d^2 + (1-y)/2 max(0, m - d)^2"
    source = (
        "Hadsell et al. 2006, Dimensionality reduction by learning an invariant mapping, eq. 4; "
        "Sun et al. 2014, Deep learning face representation by joint identification-verification, eq. 2"
    )
    title = "contrastive"
    demo_in_plane: ClassVar = {"margin": 0.6}

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
        x_BD = unit_vectors(batch.x_BD) if self.unit else widened(batch.x_BD)
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

    formula = "max(0, xi - y (theta - |a/|a| - b/|b||^2))"
    source = "Deng et al. 2017, Marginal loss for deep face recognition, section 3"
    title = "marginal"
    demo_in_plane: ClassVar = {"theta": 0.2, "xi": 0.1}

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


class CoCo(BatchLoss):
    """Each embedding against the normalised centroids of the identities in the global batch.

    L = mean over samples of -log softmax_k(alpha cos(x_i, c_k)) at k = y_i, c_k the mean of identity k's embeddings in
    the batch, its own among them. With p the softmax: dL/dcos(x_i, c_k) = alpha (p_ik - [k = y_i]) / B. The gradient
    also runs through the centroids, to all samples of the batch.

    alpha `auto` is the least scale at which the loss can fall to `epsilon`, 1/2 log((C - 1) / (e^epsilon - 1)), for all
    C identities of the data set; fewer in the batch need less. With a smaller alpha the loss stays above epsilon
    however good the embeddings are.

    The papers average embeddings as they are, so that long ones count for more in a centroid. With `unit_centroids`
    unit vectors are averaged: in the networks that the authors published (liuyuisanai/coco_loss, net_cocoloss.prototxt)
    a layer normalises the embedding before anything is compared. Their centres there are a layer's weights, which is
    NormFace here; neither paper's formula has such weights, and it is the formula that is taken.

    A batch with one identity has loss 0 and counts as an empty step.
    """

    family = "softmax"
    formula = "-log softmax(alpha cos(x, c_k)), c_k = mean of identity k in the batch"
    source = (
        "Liu et al. 2017, Learning deep features via congenerous cosine loss; "
        "Liu et al. 2017, Rethinking feature discrimination and polymerization, section 3.2"
    )
    title = "CoCo"
    needs_positives = False

    name: Literal["coco"] = "coco"
    alpha: Annotated[float, Within(gt=0, le=1000)] | Literal["auto"] = "auto"  # auto: from epsilon and C
    epsilon: Annotated[float, Within(gt=0, le=1)] = 1e-4  # for alpha: auto, what the loss shall be able to fall to
    unit_centroids: bool = False  # centroids of unit vectors; the papers: of embeddings as they are

    def resolve(self, classes: int, dimension: int) -> Self:
        if self.alpha != "auto":
            return self
        alpha = coco_scale(classes, self.epsilon)
        return replace(self, alpha=positive_scale("coco: alpha", alpha, classes, f"epsilon {self.epsilon}"))

    def terms(self, batch: GlobalBatch, values: Mapping[str, Tensor]) -> Terms:
        assert not isinstance(self.alpha, str), "resolve() replaces 'auto'"
        slot_B, member_SB = members(batch.labels_B)
        present_S = member_SB.any(dim=1)
        # A product rather than a scatter: its sum has the same order in every run. Its length cancels in c / |c|.
        x_BD, dtype = widened(batch.x_BD), batch.x_BD.dtype
        unit_BD = unit_vectors(x_BD)
        centroids_SD = unit_vectors(member_SB.double() @ (unit_BD if self.unit_centroids else x_BD))
        logits_bS = self.alpha * unit_BD[batch.own].to(dtype) @ centroids_SD.T.to(dtype)
        # An empty slot's exp is 0; a finite number keeps a batch of padding alone from giving NaN.
        logits_bS = logits_bS.masked_fill(~present_S, -2 * self.alpha - 1000)
        logs_bS = torch.log_softmax(logits_bS, dim=1)
        loss_b = -logs_bS.gather(1, slot_B[batch.own, None]).squeeze(1)
        valid_b = batch.valid_B[batch.own]
        several = (present_S.sum() > 1).double()
        return Terms(torch.where(valid_b, loss_b, 0).sum()[None], count(valid_b)[None], several[None])
