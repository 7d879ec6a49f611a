"""Which samples the backward can leave out: those that are learned, whose gradient is lost beside the others'.

Legend: B samples of all ranks, n of them kept (hardest first), C classes, D dimension.

Late in training most samples are told apart from every other class: their share 1 - p of the gradient is 1e-4 and
less. The gradient of the denominator has, with Q_ij = P_ij dz_ij/d(e_i.w_j) and r_i the gradient of S_i,

    dE_i = sum over j of r_i Q_ij w_j           dW_j = sum over i of r_i Q_ij e_i   (+ the targets' own, always exact)

The mass of a sample is m_i = sum over j of |r_i Q_ij|, known from the forward: |r_i| S_i, times the greatest slope of a
margin that re-weights negatives. Without the samples of a set U the errors are, by the triangle inequality,

    E:  |error| = sqrt(sum over U of |dE_i|^2)                <= w sqrt(sum over U of m_i^2),   w the longest row
    W:  |error| = |sum over U of r_i Q_i e_i^T|               <= sum over U of m_i |e_i|,
                                                         and  <= |E|_2 sqrt(sum over U of m_i^2)

in the Frobenius norm (of an outer product |Q_i| |e_i|, and |Q_i| is at most the sum of its entries; of a product
|A B| <= |A| |B|_2, with the spectral norm |B|_2). The second is the smaller one where embeddings differ. Rows that are
divided by their length count as 1 in E's bound, and W's is divided by the shortest; the Jacobian of the division is a
projection and adds nothing. What the errors are compared with is never greater than the whole:

    E:  the norm of dE over the samples that are kept. Should it be too small for the first choice, more are kept.
    W:  the norm of dW over the rows of the batch's own classes alone, which cost B/C of a product.

So |error of dE| <= tolerance |dE| and |error of dW| <= tolerance |dW|. dE is the denominator's part of the embeddings'
gradient and dW all of `weight.grad`, of unit rows without its part along the row, both of this rank: errors of several
ranks' dE add up. A learnable scale's gradient is off by at most the sum of the masses in U. The bias' is exact.

For the optimizer nothing changes: rows keep a dense gradient, in which only terms below the tolerance are missing.

Leaving out classes instead does not pay. A row of P matters as soon as one hard sample finds it near, so that the
masses of the classes are nearly equal: for a relative error of 1e-3 nearly nine in ten or more had to be kept.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.head.softening import Hardening

SLACK = 1.01  # for what rounding to bf16 adds to the length of a unit row or to P
GUESS = 0.5  # of |dE| / sqrt(sum of m_i^2): the gradients of several negatives partly cancel
SQUARINGS = 3  # of the Gram matrix, for a bound of its greatest eigenvalue within B^(1/16)
WORTH = 0.8  # of the samples; where more must be kept, to gather them costs more than it spares
MULTIPLE = 16  # samples; what matrix products like


class Errors(NamedTuple):
    """What leaving out samples changes at most, by their `mass_B`: dE by sqrt(sum of squares), dW by the lesser of
    sum(mass x `each_B`) and sqrt(sum of squares) x `together`."""

    mass_B: Tensor
    each_B: Tensor
    together: Tensor

    @classmethod
    def of(
        cls,
        mass_B: Tensor,
        e_BD: Tensor,
        lengths: tuple[float | Tensor, float | Tensor],
        hardening: Hardening | None,
    ) -> "Errors":
        """
        Args:
            mass_B: |r_i| S_i.
            lengths: see `bounds_of_lengths`.
            hardening: what re-weights the negatives: its slope is b + 2 c cos.
        """
        longest, shortest = lengths
        if hardening is not None:
            _, _, b, c = hardening.numbers_4.to(mass_B).abs()
            mass_B = mass_B * (b + 2 * c).clamp_min(1)
        per_mass = longest * shortest
        each_B = torch.linalg.vector_norm(e_BD, dim=1) / per_mass
        return cls(SLACK * mass_B * longest, each_B, spectral_bound(e_BD) / per_mass)


class Kept(NamedTuple):
    """The samples that product 3 needs, and product 2's result."""

    samples_n: Tensor
    de_BD: Tensor


def essential(
    errors: Errors, rows_norm: Tensor, tolerance: float, embeddings: Callable[[Tensor], Tensor]
) -> Kept | None:
    """The fewest samples that keep both errors within the tolerance; None where nearly all are needed.

    The host waits once or twice for the device.

    Args:
        rows_norm: of dW, or less.
        tolerance: relative, above 0.
        embeddings: dE of some samples, [n, D], by their numbers [n].
    """
    mass_B, order_B = errors.mass_B.double().sort(descending=True)
    left_out = _without(mass_B.square()).sqrt()  # by the number that are kept, 0 to B
    one_by_one, together = _without(mass_B * errors.each_B.double()[order_B]), left_out * errors.together.double()
    for_rows = _least(torch.minimum(one_by_one, together), tolerance * rows_norm)
    guess = _least(left_out, tolerance * GUESS * left_out[0])
    rows, count = torch.stack([for_rows, guess]).tolist()
    B = len(order_B)
    if max(rows, count) > WORTH * B:
        return None
    count = min(_rounded(count), B)
    first = order_B[:count].sort().values  # in the order of memory they are gathered faster
    de_BD = _placed(first, embeddings(first), B)
    needed = int(_least(left_out, tolerance * torch.linalg.vector_norm(de_BD.double())))
    if needed > count:
        more = order_B[count : min(_rounded(needed), B)].sort().values
        de_BD.index_copy_(0, more, embeddings(more))
    return Kept(order_B[: min(_rounded(rows), B)].sort().values, de_BD)


def bounds_of_lengths(weight_RD: Tensor, normalise: bool) -> tuple[Tensor | float, Tensor | float]:
    """The longest of the rows that are not divided by their length, the shortest of those that are; 1 for none."""
    lengths_R = torch.linalg.vector_norm(weight_RD, dim=1)
    return (1.0, lengths_R.min().clamp_min(1e-12)) if normalise else (lengths_R.max(), 1.0)


def spectral_bound(e_BD: Tensor) -> Tensor:
    """Not less than |E|_2, and at most B^(1/32) times as much: with G = E E^T, |E|_2^16 = |G^8|_2 <= |G^8|."""
    gram_BB = e_BD.double() @ e_BD.double().t()
    scale = gram_BB.diagonal().sum().clamp_min(torch.finfo(torch.float64).tiny)
    power_BB = gram_BB / scale
    for _ in range(SQUARINGS):
        power_BB = power_BB @ power_BB
    eigenvalue: Tensor = scale * torch.linalg.matrix_norm(power_BB) ** (0.5**SQUARINGS)
    return eigenvalue.sqrt()


def norm_of_own_rows(rows_BKD: Tensor, own_BKD: Tensor, place_B: Tensor, mask_B: Tensor) -> Tensor:
    """The norm of dW over the rows of the batch's classes: each class once, though several samples may have it.

    Args:
        rows_BKD: of each sample's class the denominator's part of dW.
        own_BKD: each sample's own part of the gradient of its class.
        place_B: number of its class.
        mask_B: whether the class is this rank's; where not, the rest is ignored.
    """
    same_BB = ((place_B[:, None] == place_B) & mask_B).to(rows_BKD.dtype)
    whole_BKD = rows_BKD + torch.einsum("ij,jkd->ikd", same_BB, own_BKD)
    squares_B = whole_BKD.double().square().sum(dim=(1, 2)) / same_BB.sum(dim=1).clamp_min(1)
    return torch.where(mask_B, squares_B, 0).sum().sqrt()


def _without(values_B: Tensor) -> Tensor:
    """The sums of values_B[n:] for n from 0 to B."""
    return torch.cat([values_B.flip(0).cumsum(0).flip(0), values_B.new_zeros(1)])


def _least(left_out: Tensor, allowed: Tensor) -> Tensor:
    """How many must be kept: the first n with left_out[n] <= allowed; all where a number is nan."""
    return (~(left_out[:-1] <= allowed)).sum()


def _rounded(count: int) -> int:
    return max(1, -(-count // MULTIPLE)) * MULTIPLE


def _placed(samples_n: Tensor, values_nD: Tensor, count: int) -> Tensor:
    return values_nD.new_zeros(count, values_nD.shape[1]).index_copy_(0, samples_n, values_nD)
