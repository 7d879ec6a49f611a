"""Losses on distances to centres and between identities: centre, centre-invariant and range loss.

The first two keep a centre for every class that follows its samples; range loss takes the widest distances within each
identity of the batch, and the two identities nearest to each other.

Legend: B samples of all ranks, S slots for identities (S = B), D dimension, k distances of an identity.

The centres of the first two are no parameters: no gradient reaches them and no optimizer steps them. They move by the
papers' rule; `objective.sharded` keeps them, sharded over the ranks.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from trainer.checked import Within
from trainer.losses.base import LossSpec
from trainer.losses.batch import BatchLoss, GlobalBatch, Terms, count, members, squared_distances, unit_vectors, widened


class Center(LossSpec):
    """Each embedding is drawn to the centre of its class, and the centre follows its samples.

    L = mean over the samples of |x - c_y|^2 / 2 (the paper sums over the batch, as its softmax does, so that its lambda
    stays the same here). dL/dx = (x - c_y) / B. After each step c_j <- c_j - alpha delta_j,
    delta_j = sum over the batch's samples of class j of (c_j - x) / (1 + n_j), n_j their number, with the x and c of
    the loss. Centres start at 0.

    An auxiliary: alone it is least where all embeddings are equal. The paper adds it to softmax with the weight 0.003.
    It draws embeddings as they are, so that beside a head on the cosine, which leaves |x| free, it also shortens them;
    `unit` draws unit vectors instead. A batch of padding alone has loss 0 and moves nothing.
    """

    family = "centre"
    formula = "|x - c_y|^2 / 2"
    source = "Wen et al. 2016, A discriminative feature learning approach, eq. 2 to 4"
    title = "softmax + centre"
    beside_softmax = 0.1
    holds_lengths: ClassVar[bool] = False  # there is an `extra` loss on the lengths of the centres

    name: Literal["center"] = "center"
    alpha: Annotated[float, Within(ge=0, le=1)] = 0.5  # how far a centre follows; 0: not at all
    unit: bool = False  # on unit vectors; the paper: as they are

    @property
    def on_directions(self) -> bool:
        return self.unit

    def extra(self, squares_B: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """A further loss of each sample, from |c_y|^2 and the mean of |c|^2 over all classes; and
        what times c_y is its derivative by c_y. The mean counts as a constant."""
        raise NotImplementedError


class CenterInvariant(Center):
    """Centre loss, whose centres are also held at one common length, whether a class is rich or poor in samples.

    L = mean over the samples of |x - c_y|^2 / 2 + gamma/4 (|c_y|^2 - M)^2, M the mean of |c_k|^2 over all C classes.
    dL/dx = (x - c_y) / B: the second term acts on the centres alone, which move by
    delta_j = sum over samples of class j of (c_j - x + gamma (|c_j|^2 - M) c_j) / (1 + n_j), M held constant,
    and through them on the embeddings. Stable where alpha gamma |c|^2 < 1; gamma is ours, for embeddings of length
    around 10 to 30. It contains centre loss: do not name `center` beside it.
    """

    formula = "|x - c_y|^2 / 2 + gamma/4 (|c_y|^2 - mean_k |c_k|^2)^2"
    source = "Wu et al. 2017, Deep face recognition with center invariant loss"
    title = "softmax + centre-invariant"
    # The default leaves ten centres nearly where centre loss has them: in the plane their lengths deviate by 0.27 of
    # the mean after 600 steps, with centre loss by 0.3. With this gamma it is below 0.04, and alpha gamma |c|^2 <= 0.4.
    demo: ClassVar = {"gamma": 5e-3}
    holds_lengths = True

    name: Literal["center_invariant"] = "center_invariant"  # type: ignore[assignment]
    gamma: Annotated[float, Within(ge=0)] = 1e-4

    def extra(self, squares_B: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        return self.gamma / 4 * (squares_B - mean) ** 2, self.gamma * (squares_B - mean)


# Two equal images: far below any distance that a product tells from 0, yet its square is a normal number; of unit
# vectors in fp32, and of embeddings of any length in fp64.
_LEAST, _LEAST_WIDE = 1e-12, 1e-120


class Range(BatchLoss):
    """Each identity's harmonic mean of its k largest distances, plus a hinge on the shortest distance of two centres.

    L = a L_intra + b L_inter;
    L_intra = mean over the identities of the batch of H_i = k / sum_j 1/D_ij, D_i1 >= D_i2 >= ... the k largest squared
    distances between samples of identity i; L_inter = max(0, m - D_c), D_c the smallest squared distance between two
    identities' centres (means) in the batch. The papers sum H_i over identities; the mean does not depend on how many
    there are.
    dH_i/dD_ij = H_i^2 / (k D_ij^2): the smallest of the k is shortened most. dL_inter/dD_c = -1 where D_c < m.

    An identity with fewer than k pairs (n samples have n (n - 1) / 2) takes those that it has; one sample has none and
    is left out. A batch in which no identity has a pair lacks L_intra, one with a single identity lacks L_inter; both
    count as empty steps.

    The paper's constants are for embeddings as they are, beside softmax: unit false, intra 5e-5, inter 1e-4,
    margin 2e4. The ones here are for unit vectors.
    """

    family = "centre"
    formula = "a mean_i(k / sum_j 1/D_ij) + b max(0, m - min |c_i - c_j|^2)"
    source = "Zhang et al. 2017, Range loss for deep face recognition with long-tailed data, section 3"
    title = "softmax + range"
    demo_in_plane: ClassVar = {"margin": 0.3}
    beside_softmax = 0.1

    name: Literal["range"] = "range"
    k: Annotated[int, Within(ge=1, le=1024)] = 2  # largest distances of each identity
    margin: Annotated[float, Within(gt=0)] = 1.0  # m, in squared distance of two centres
    intra: Annotated[float, Within(ge=0)] = 1.0  # a
    inter: Annotated[float, Within(ge=0)] = 1.0  # b
    unit: bool = True  # on unit vectors; the paper: as they are

    @property
    def on_directions(self) -> bool:
        return self.unit

    def mix(self) -> tuple[float, ...]:
        return self.intra, self.inter

    def terms(self, batch: GlobalBatch, values: Mapping[str, Tensor]) -> Terms:
        """Every rank computes all distances and answers for the identities in its share of the slots; the first one
        answers for the pair of centres."""
        x_BD = unit_vectors(batch.x_BD) if self.unit else widened(batch.x_BD)
        slot_B, member_SB = members(batch.labels_B)
        means_S, some_S = self._harmonic_means(x_BD, batch.labels_B, slot_B)
        own_S = torch.zeros_like(some_S)
        own_S[batch.own] = True
        own_S = own_S & some_S
        hinge, pairs = self._nearest_centres(x_BD, member_SB)
        first = float(batch.own.start == 0)
        totals = torch.stack([torch.where(own_S, means_S, 0).sum(), first * hinge])
        counts = torch.stack([count(own_S), totals.new_full((), first).double()])
        return Terms(totals, counts, torch.stack([count(own_S), pairs]))

    def _harmonic_means(self, x_BD: Tensor, labels_B: Tensor, slot_B: Tensor) -> tuple[Tensor, Tensor]:
        """H of each slot's identity, and whether it has one."""
        size = x_BD.shape[0]
        of_row = min(self.k, size)
        k = min(self.k, size * of_row)
        pair_BB = ((labels_B[:, None] == labels_B) & (labels_B >= 0)).triu(diagonal=1)
        # The k largest of an identity are among the k largest of each of its rows: sort those by (slot, -distance).
        rows_BK = torch.where(pair_BB, squared_distances(x_BD, x_BD), -torch.inf).topk(of_row, dim=1).values
        values_N, order_N = rows_BK.flatten().sort(descending=True)
        slots_N, by_slot_N = slot_B.repeat_interleave(of_row)[order_N].sort(stable=True)
        values_N = values_N[by_slot_N]
        slots_S = torch.arange(size, device=x_BD.device)
        place_Sk = torch.searchsorted(slots_N, slots_S)[:, None] + torch.arange(k, device=x_BD.device)
        within_Sk = place_Sk.clamp_max(len(slots_N) - 1)
        kept_Sk = (place_Sk < len(slots_N)) & (slots_N[within_Sk] == slots_S[:, None])
        kept_Sk = kept_Sk & (values_N[within_Sk] != -torch.inf)
        least = _LEAST if self.unit else _LEAST_WIDE
        inverse_Sk = torch.where(kept_Sk, 1 / torch.where(kept_Sk, values_N[within_Sk], 1).clamp_min(least), 0)
        some_S = kept_Sk.any(dim=1)
        return kept_Sk.sum(dim=1) / torch.where(some_S, inverse_Sk.sum(dim=1), 1), some_S

    def _nearest_centres(self, x_BD: Tensor, member_SB: Tensor) -> tuple[Tensor, Tensor]:
        """The hinge on the nearest two centres, and the number of pairs of centres; 0 where there is no pair."""
        size_S = member_SB.sum(dim=1)
        centres_SD = (member_SB.to(x_BD.dtype) @ x_BD) / size_S.clamp_min(1)[:, None]
        pair_SS = ((size_S > 0)[:, None] & (size_S > 0)).triu(diagonal=1)
        nearest = torch.where(pair_SS, squared_distances(centres_SD, centres_SD), torch.inf).amin()
        return (self.margin - nearest).clamp_min(0), count(pair_SS)
