"""Triplet loss and the mining of triplets from a batch; and TSE and TPE, which learn a projection.

Legend: b anchors of this rank, B samples of all ranks, D dimension of the embedding, n of a projection.

Of a batch with B samples there are up to B^3 / 4 triplets. None is ever made: with d_ap and d_an the squared distances
of an anchor to its positives and negatives, the sum over the selected triplets that violate the margin is

    sum over (p, n) of (d_ap + alpha - d_an)  =  sum_p k_ap (d_ap + alpha) - sum_n m_an d_an,

where k_ap counts the negatives that p forms such a triplet with, and m_an the positives that n does. Both counts come
from binary searches in the anchor's sorted distances: B^2 log B time, [b, B] memory. The counts do not change within a
small move of the embeddings, so this is also the exact gradient.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from trainer.checked import Within
from trainer.errors import UserError
from trainer.losses.batch import BatchLoss, GlobalBatch, Terms, count, squared_distances, unit_vectors

# The literature also writes the two with a hyphen.
Mining = Literal["all", "easy", "semi_hard", "hard", "batch_hard", "semi-hard", "batch-hard"]
PROJECTION = "projection"  # T's name among the loss's parameters
PAPER_DIMENSION = 128
TILE = 2**24  # triplets of a tile of anchors


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

    With `average: active` the mean is over the selected triplets that violate the margin: that of `all` and
    `batch_hard` otherwise fades as triplets become easy. A step without a selected triplet (one identity in the batch,
    no two samples of one, none of that kind) has loss 0 and counts as empty.
    """

    formula = "max(0, |a - p|^2 - |a - n|^2 + alpha)"
    source = (
        "Schroff et al. 2015, FaceNet, eq. 1 to 4; "
        "batch_hard: Hermans et al. 2017, In defense of the triplet loss, eq. 5"
    )
    title = "triplet"

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
    are, and how many of them have a loss; for any d, also negative ones. See k_ap and m_an above."""
    fixed_bB = d_bB.detach()  # the counts have no gradient
    negatives_bB = torch.where(other_bB, fixed_bB, torch.inf).sort(dim=1).values
    positives_bB = torch.where(same_bB, fixed_bB, -torch.inf).sort(dim=1).values
    # violating: d_an < d_ap + alpha, counted for each positive and for each negative; hard: d_an <= d_ap
    violating_p_bB = torch.searchsorted(negatives_bB, fixed_bB + alpha)
    hard_p_bB = torch.searchsorted(negatives_bB, fixed_bB, right=True)
    violating_n_bB = d_bB.shape[1] - torch.searchsorted(positives_bB + alpha, fixed_bB, right=True)
    hard_n_bB = d_bB.shape[1] - torch.searchsorted(positives_bB, fixed_bB)
    available_b1 = other_bB.sum(dim=1, keepdim=True)
    of_p_bB, of_n_bB, selected_bB = {
        "all": (violating_p_bB, violating_n_bB, available_b1.expand_as(d_bB)),
        "easy": (violating_p_bB * 0, violating_n_bB * 0, available_b1 - violating_p_bB),
        "semi_hard": (violating_p_bB - hard_p_bB, violating_n_bB - hard_n_bB, violating_p_bB - hard_p_bB),
        "hard": (hard_p_bB, hard_n_bB, hard_p_bB),
    }[kind]
    of_p_bB, of_n_bB = torch.where(same_bB, of_p_bB, 0), torch.where(other_bB, of_n_bB, 0)
    total = (of_p_bB.to(d_bB.dtype) * (d_bB + alpha) - of_n_bB.to(d_bB.dtype) * d_bB).sum(dtype=torch.float64)
    selected = torch.where(same_bB, selected_bB, 0).sum(dtype=torch.float64)
    return total, selected, of_p_bB.sum(dtype=torch.float64)


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


class ProjectedTriplet(BatchLoss):
    """What TSE and TPE share: a projection T of the embedding, the similarities, the hardest negative.

    S(a, b) = (T a-hat) . (T b-hat), with a-hat = a/|a|: not a cosine, its size belongs to the loss. T [n, D] is held by
    every rank, stepped by the objective with the optimizer of the head, and kept in the checkpoint. What is compared
    afterwards is T x (`objective.geometry.Projected`). Triplets are every anchor and positive of the global batch, with
    the negative most similar to the anchor, or with every negative.

    The first T has orthonormal rows. `pca`: `principal_rows` of the first batch's unit embeddings, as in the papers,
    taken once in the first step of a run. `orthogonal`: random directions from the run's seed.

    `negatives: hardest` is the papers' choice, for embeddings that are good already: of ones that still have to be
    learned, the hardest negatives draw everything together. `all` is for those; its mean is over all triplets.

    With `frozen` the backbone gets no gradient from this loss: beside another loss, which trains the backbone. Alone it
    is refused: weight decay and the statistics of batch norms would go on changing a backbone that nothing teaches.

    A step without an anchor that has both a positive and a negative has loss 0 and counts as empty.
    """

    demo: ClassVar = {"frozen": True}
    beside_softmax = 1.0
    learns_projection = True

    dimension: Annotated[int, Within(ge=1)] | None = None  # n, rows of T; null: 128 as in the papers, or D if less
    init: Literal["pca", "orthogonal"] = "pca"
    negatives: Literal["hardest", "all"] = "hardest"
    frozen: bool = False  # learn T alone, without a gradient to the embeddings

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

    formula = "max(0, alpha + S(a, n) - S(a, p)), S(a, b) = (T a).(T b)"
    source = "Sankaranarayanan et al. 2016, Triplet similarity embedding for face verification"
    title = "softmax, then TSE"

    name: Literal["tse"] = "tse"
    alpha: Annotated[float, Within(ge=0)] = 0.1

    def of(self, difference: Tensor) -> Tensor:
        return (self.alpha + difference).clamp_min(0)

    def over_all(self, s_bB: Tensor, same_bB: Tensor, other_bB: Tensor) -> tuple[Tensor, Tensor]:
        return sum_over_kind(-s_bB, same_bB, other_bB, self.alpha, "all")[:2]


class TPE(ProjectedTriplet):
    """Triplet probabilistic embedding: the probability of telling the positive from the negative.

    L = mean over triplets of -log(exp S(a, p) / (exp S(a, p) + exp S(a, n))) = log(1 + exp(S(a, n) - S(a, p))).
    dL/dS(a, n) = -dL/dS(a, p) = q, q = sigmoid(S(a, n) - S(a, p)); dL/dT = q (t_a (n - p)^T + (t_n - t_p) a^T).
    """

    formula = "-log(e^S(a,p) / (e^S(a,p) + e^S(a,n))), S(a, b) = (T a).(T b)"
    source = "Sankaranarayanan et al. 2016, Triplet probabilistic embedding for face verification and clustering"
    title = "softmax, then TPE"

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
