"""Congenerous cosine loss: softmax over the identities of the batch, with their centroids for class centres.

Legend: b samples of this rank, B samples of all ranks, S slots for identities (S = B), D dimension.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

import torch
from torch import Tensor

from trainer.checked import Within
from trainer.losses.base import Family
from trainer.losses.batch import BatchLoss, GlobalBatch, Terms, count, members, unit_vectors
from trainer.losses.bounds import coco_scale
from trainer.losses.margins.base import positive_scale


class CoCo(BatchLoss):
    """Each embedding against the normalised centroids of the identities in the global batch.

    L = mean over samples of -log softmax_k(alpha cos(x_i, c_k)) at k = y_i, c_k the mean of identity k's embeddings in
    the batch, its own among them. With p the softmax: dL/dcos(x_i, c_k) = alpha (p_ik - [k = y_i]) / B. The gradient
    also runs through the centroids, to all samples of the batch.

    alpha `auto` is the least scale at which the loss can fall to `epsilon`, 1/2 log((C - 1) / (e^epsilon - 1)), for all
    C identities of the data set; fewer in the batch need less. With a smaller alpha the loss stays above epsilon
    however good the embeddings are.

    A batch with one identity has loss 0 and counts as an empty step.
    """

    family: ClassVar[Family] = "softmax"
    formula: ClassVar[str] = "-log softmax(alpha cos(x, c_k)), c_k = mean of identity k in the batch"
    source: ClassVar[str] = (
        "Liu et al. 2017, Learning deep features via congenerous cosine loss; "
        "Liu et al. 2017, Rethinking feature discrimination and polymerization, section 3.2"
    )
    title: ClassVar[str] = "CoCo"
    needs_positives: ClassVar[bool] = False

    name: Literal["coco"] = "coco"
    alpha: Annotated[float, Within(gt=0, le=1000)] | Literal["auto"] = "auto"  # auto: from epsilon and C
    epsilon: Annotated[float, Within(gt=0, le=1)] = 1e-4  # for alpha: auto, what the loss shall be able to fall to

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
        centroids_SD = unit_vectors(member_SB.to(batch.x_BD.dtype) @ batch.x_BD)
        logits_bS = self.alpha * unit_vectors(batch.x_BD[batch.own]) @ centroids_SD.T
        # An empty slot's exp is 0; a finite number keeps a batch of padding alone from giving NaN.
        logits_bS = logits_bS.masked_fill(~present_S, -2 * self.alpha - 1000)
        logs_bS = torch.log_softmax(logits_bS, dim=1)
        loss_b = -logs_bS.gather(1, slot_B[batch.own, None]).squeeze(1)
        valid_b = batch.valid_B[batch.own]
        several = (present_S.sum() > 1).double()
        return Terms(torch.where(valid_b, loss_b, 0).sum()[None], count(valid_b)[None], several[None])
