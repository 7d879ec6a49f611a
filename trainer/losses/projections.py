"""Triplet losses that learn a projection T of the embedding: similarity (TSE) and probabilistic (TPE) embedding.

Legend: b anchors of this rank, B samples of all ranks, D dimension of the embedding, n of the projection.

S(a, b) = (T a-hat) . (T b-hat), with a-hat = a/|a|: not a cosine, its size belongs to the loss. T [n, D] is held by
every rank, stepped by the objective with the optimizer of the head, and kept in the checkpoint. What is compared
afterwards is T x: `objective.geometry.Projected` puts T behind the backbone for evaluation and export.

Triplets are formed within the global batch: every anchor and positive, with the negative that is most similar to the
anchor, or with every negative.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from trainer.checked import Within
from trainer.errors import UserError
from trainer.losses.batch import (
    BatchLoss,
    GlobalBatch,
    Terms,
    count,
    orthogonal_rows,
    principal_rows,
    unit_vectors,
)
from trainer.losses.triplets import sum_over_kind

PROJECTION = "projection"  # T's name among the loss's parameters
PAPER_DIMENSION = 128
TILE = 2**24  # triplets of a tile of anchors


class ProjectedTriplet(BatchLoss):
    """What TSE and TPE share: T, the similarities, the hardest negative.

    The first T has orthonormal rows. `pca`: the n directions of greatest variance of the first batch's unit embeddings,
    as in the papers, taken once in the first step of a run; where they span fewer dimensions, the rest is some
    orthonormal completion. `orthogonal`: random directions from the run's seed.

    `negatives: hardest` is the papers' choice, for embeddings that are good already: of ones that still have to be
    learned, the hardest negatives draw everything together. `all` is for those; its mean is over all triplets.

    With `frozen` T learns from the embeddings as they are, and the backbone gets no gradient from this loss: beside
    another loss, which trains the backbone. Alone it is refused: weight decay and the statistics of batch norms would
    go on changing a backbone that nothing teaches.

    A step without an anchor that has both a positive and a negative has loss 0 and counts as empty.
    """

    demo: ClassVar[Mapping[str, Any]] = {"frozen": True}
    beside_softmax: ClassVar[float | None] = 1.0
    learns_projection: ClassVar[bool] = True

    dimension: Annotated[int, Within(ge=1)] | None = None  # n, rows of T; null: 128 as in the papers, or D if less
    init: Literal["pca", "orthogonal"] = "pca"
    negatives: Literal["hardest", "all"] = "hardest"
    frozen: bool = False  # learn T alone, beside a loss that trains the network: no gradient to the embeddings

    @property
    def trains_backbone(self) -> bool:
        return not self.frozen

    def resolve(self, classes: int, dimension: int) -> Self:
        if self.dimension is not None and self.dimension > dimension:
            raise UserError(
                f"{self.name}: dimension {self.dimension} is more than the embedding's {dimension}; "
                f"a projection has at most {dimension} rows"
            )
        return replace(self, dimension=self.dimension or min(PAPER_DIMENSION, dimension))

    def learnables(self, dimension: int, seed: int) -> dict[str, Tensor]:
        rows = self.resolve(2, dimension).dimension
        assert rows is not None
        return {PROJECTION: orthogonal_rows(rows, dimension, seed)}

    def first_values(self, batch: GlobalBatch, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.init != "pca":
            return {}
        return {PROJECTION: principal_rows(unit_vectors(batch.x_BD), batch.valid_B, values[PROJECTION].shape[0])}

    def terms(self, batch: GlobalBatch, values: Mapping[str, Tensor]) -> Terms:
        x_BD = batch.x_BD.detach() if self.frozen else batch.x_BD
        t_Bn = unit_vectors(x_BD) @ values[PROJECTION].to(x_BD.dtype).T
        s_bB = t_Bn[batch.own] @ t_Bn.T
        same_bB, other_bB = batch.positives_bB(), batch.negatives_bB()
        if self.negatives == "all":
            total, triplets = self.over_all(s_bB, same_bB, other_bB)
        else:
            some_b = other_bB.any(dim=1)
            same_bB = same_bB & some_b[:, None]
            hardest_b = torch.where(some_b, torch.where(other_bB, s_bB, -torch.inf).amax(dim=1), 0)
            total = torch.where(same_bB, self.of(hardest_b[:, None] - s_bB), 0).sum()
            triplets = count(same_bB)
        return Terms(total[None], triplets[None], triplets[None])

    def over_all(self, s_bB: Tensor, same_bB: Tensor, other_bB: Tensor) -> tuple[Tensor, Tensor]:
        """The sum over every triplet, and how many there are."""
        raise NotImplementedError

    def of(self, difference: Tensor) -> Tensor:
        """The loss of triplets from S(a, n) - S(a, p)."""
        raise NotImplementedError


class TSE(ProjectedTriplet):
    """Triplet similarity embedding: a positive shall be more similar than a negative by alpha.

    L = mean over triplets of max(0, alpha + S(a, n) - S(a, p)). Where it is not 0, with t = T x-hat:
    dL/dt_a = t_n - t_p, dL/dt_p = -t_a, dL/dt_n = t_a, dL/dT = t_a (n - p)^T + (t_n - t_p) a^T.
    """

    formula: ClassVar[str] = "max(0, alpha + S(a, n) - S(a, p)), S(a, b) = (T a).(T b)"
    source: ClassVar[str] = "Sankaranarayanan et al. 2016, Triplet similarity embedding for face verification"

    title: ClassVar[str] = "softmax, then TSE"

    name: Literal["tse"] = "tse"
    alpha: Annotated[float, Within(ge=0)] = 0.1

    def of(self, difference: Tensor) -> Tensor:
        return (self.alpha + difference).clamp_min(0)

    def over_all(self, s_bB: Tensor, same_bB: Tensor, other_bB: Tensor) -> tuple[Tensor, Tensor]:
        """By counting, as in `triplets`."""
        total, selected, _ = sum_over_kind(-s_bB, same_bB, other_bB, self.alpha, "all")
        return total, selected


class TPE(ProjectedTriplet):
    """Triplet probabilistic embedding: the probability of telling the positive from the negative.

    L = mean over triplets of -log(exp S(a, p) / (exp S(a, p) + exp S(a, n))) = log(1 + exp(S(a, n) - S(a, p))).
    dL/dS(a, n) = -dL/dS(a, p) = q, q = sigmoid(S(a, n) - S(a, p)); dL/dT = q (t_a (n - p)^T + (t_n - t_p) a^T).
    """

    formula: ClassVar[str] = "-log(e^S(a,p) / (e^S(a,p) + e^S(a,n))), S(a, b) = (T a).(T b)"
    source: ClassVar[str] = (
        "Sankaranarayanan et al. 2016, Triplet probabilistic embedding for face verification and clustering"
    )

    title: ClassVar[str] = "softmax, then TPE"

    name: Literal["tpe"] = "tpe"

    def of(self, difference: Tensor) -> Tensor:
        return functional.softplus(difference)

    def over_all(self, s_bB: Tensor, same_bB: Tensor, other_bB: Tensor) -> tuple[Tensor, Tensor]:
        """One by one, in tiles of anchors that are computed again in the backward: never [b, B, B] at once."""
        tile = max(1, TILE // s_bB.shape[1] ** 2)
        parts = zip(*(torch.split(values, tile) for values in (s_bB, same_bB, other_bB)), strict=True)
        total = torch.stack([checkpoint(self._tile, *part, use_reentrant=False) for part in parts]).sum()
        return total, (same_bB.sum(dim=1).double() * other_bB.sum(dim=1)).sum()

    def _tile(self, s_tB: Tensor, same_tB: Tensor, other_tB: Tensor) -> Tensor:
        loss_tBB = self.of(s_tB[:, None, :] - s_tB[:, :, None])
        return torch.where(same_tB[:, :, None] & other_tB[:, None, :], loss_tBB, 0).sum(dtype=torch.float64)
