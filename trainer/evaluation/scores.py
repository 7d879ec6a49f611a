"""Cosine scores of unit vectors, in blocks: all pairs of a set, and searches of a gallery.

Axes: N samples, D dimension, C identities, G gallery vectors, P probes, b rows of a block. A score is a dot product of
two unit vectors, in [-1, 1]; a pair or a search of the same identity is mated, of different ones non-mated. A threshold
is inclusive: a score at or above it is accepted.

Thresholds are the multiples of `GRID` = 2^-20, and a pair is counted in the cell at or below its score. Scaling by a
power of two is exact and so is rounding down, hence `score >= threshold` is `cell >= threshold's cell`: every rate
that comes out of the histogram is the exact one of the raw scores at that threshold, for any number of pairs.
The grid is as fine as the error of a float32 dot product, and float32 and float64 hold its multiples alike.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError

Floats = NDArray[np.floating]
Integers = NDArray[np.integer]
Vectors = NDArray[np.float32]  # unit rows
Labels = NDArray[np.int64]
Roles = tuple[Vectors, Vectors]  # the same samples as they search, and as they are enrolled

STEPS = 1 << 20
GRID = 1.0 / STEPS
CELLS = 2 * STEPS + 1  # of scores from -1 to 1
TIE = GRID  # scores nearer than this differ by no more than the order of summation: they are ties
BLOCK = 1 << 22  # scores computed at a time: 16 MiB


@dataclass(frozen=True, slots=True)
class PairCounts:
    """How many pairs score in each cell: `mated[k]` pairs of one identity have k <= (score + 1) / GRID < k + 1."""

    mated: NDArray[np.int64]
    non_mated: NDArray[np.int64]


def check(embeddings_ND: Floats, labels_N: Integers) -> tuple[Vectors, Labels]:
    """The same embeddings as contiguous float32 and labels as int64, once they are known to be usable.

    Raises:
        UserError: shapes that do not fit, nothing in them, or vectors that are not finite unit ones.
    """
    if embeddings_ND.ndim != 2 or labels_N.shape != embeddings_ND.shape[:1] or embeddings_ND.size == 0:
        raise UserError(
            f"embeddings of shape {embeddings_ND.shape} with labels of shape {labels_N.shape} cannot be compared; "
            "pass [samples, dimension] and [samples], with at least one sample"
        )
    if not np.issubdtype(labels_N.dtype, np.integer):
        raise UserError(f"labels of type {labels_N.dtype} are not identities; pass whole numbers")
    with np.errstate(over="ignore"):  # what does not fit float32 becomes inf, and is refused below
        vectors_ND = np.ascontiguousarray(embeddings_ND, dtype=np.float32)
    norms_N = np.sqrt(np.einsum("nd,nd->n", vectors_ND, vectors_ND))
    wrong_N = ~(np.abs(norms_N - 1) < 1e-3)  # a NaN is wrong as well
    if wrong_N.any():
        row = int(np.argmax(wrong_N))
        raise UserError(
            f"embedding {row} has norm {norms_N[row]:.4g} ({int(wrong_N.sum())} of {len(norms_N)} are not unit "
            "vectors); normalise the embeddings, and look for overflow where the norm is nan or inf"
        )
    return vectors_ND, labels_N.astype(np.int64)


def cell(scores: Floats) -> NDArray[np.int32]:
    """Cell of each score, 0 (-1 and below) to CELLS - 1 (1 and above).

    Raises:
        UserError: a score is NaN, which is neither above nor below a threshold.
    """
    scaled = scores * np.float32(STEPS)
    if scaled.size and np.isnan(scaled.min()):
        raise UserError(
            f"{int(np.isnan(scaled).sum())} of {scaled.size} scores are nan, which no threshold accepts or refuses; "
            "look for embeddings that are not finite"
        )
    np.clip(np.floor(scaled, out=scaled), -STEPS, STEPS, out=scaled)
    return np.asarray(scaled, np.int32) + np.int32(STEPS)


def above(score: float) -> float:
    """The lowest threshold on the grid that refuses the score; of a score of 1 it is one that accepts nothing."""
    return (math.floor(score * STEPS) + 1) * GRID


def ceil_to_grid(value: float) -> float:
    """The lowest threshold on the grid that is not below `value`."""
    return math.ceil(value * STEPS) * GRID


def pair_blocks(
    sorted_ND: Vectors, sorted_labels_N: Labels, enrolled_ND: Vectors | None = None
) -> Iterator[tuple[int, Vectors, NDArray[np.bool_], NDArray[np.bool_]]]:
    """Every unordered pair of two samples, once, from samples sorted by label, some rows at a time.

    Args:
        enrolled_ND: the samples as they are enrolled, where that is not as they search (see `normalise.py`): the
            earlier one of a pair searches.

    Yields the first row, the scores [b, n] of these rows against all rows from it on, and which of the first w columns
    are mated and which are non-mated pairs, [b, w] each. All columns beyond w are non-mated pairs.
    """
    samples = len(sorted_ND)
    start = 0
    while start < samples:
        rows = max(1, BLOCK // (samples - start))
        stop = min(samples, start + rows)
        width = int(np.searchsorted(sorted_labels_N, sorted_labels_N[stop - 1], side="right")) - start
        later = np.arange(width) > np.arange(stop - start)[:, None]
        same = sorted_labels_N[start:stop, None] == sorted_labels_N[None, start : start + width]
        others_nD = (sorted_ND if enrolled_ND is None else enrolled_ND)[start:]
        yield start, sorted_ND[start:stop] @ others_nD.T, later & same, later & ~same
        start = stop


def pair_counts(vectors_ND: Vectors, labels_N: Labels, enrolled_ND: Vectors | None = None) -> PairCounts:
    """Histogram of the scores of all N (N - 1) / 2 pairs; `enrolled_ND` as for `pair_blocks`.

    Same as a loop over all i < j that counts `cell(vectors[i] @ vectors[j])` in one of two lists. Computed in blocks of
    16 MiB; about a second per 10^8 pairs and core.
    """
    order_N = np.argsort(labels_N, kind="stable")
    mated, non_mated = np.zeros(CELLS, np.int64), np.zeros(CELLS, np.int64)
    sorted_ND = None if enrolled_ND is None else enrolled_ND[order_N]
    for _, scores_bn, mated_bw, non_mated_bw in pair_blocks(vectors_ND[order_N], labels_N[order_N], sorted_ND):
        cells_bn, width = cell(scores_bn), mated_bw.shape[1]
        mated += np.bincount(cells_bn[:, :width][mated_bw], minlength=CELLS)
        non_mated += np.bincount(cells_bn[:, :width][non_mated_bw], minlength=CELLS)
        non_mated += np.bincount(cells_bn[:, width:].ravel(), minlength=CELLS)
    return PairCounts(mated, non_mated)


def identity_scores(
    probes_PD: Vectors, gallery_GD: Vectors, gallery_labels_G: Labels
) -> Iterator[tuple[slice, Vectors]]:
    """Rows of the probes, with their score of each gallery identity: the best of that identity's vectors.

    The columns are the identities in ascending order, as `np.unique(gallery_labels_G)` gives them.
    """
    order_G = np.argsort(gallery_labels_G, kind="stable")
    identities_C, starts_C = np.unique(gallery_labels_G[order_G], return_index=True)
    sorted_DG = np.ascontiguousarray(gallery_GD[order_G].T)
    single = len(identities_C) == len(gallery_GD)
    rows = max(1, BLOCK // len(gallery_GD))
    for start in range(0, len(probes_PD), rows):
        scores_bG = probes_PD[start : start + rows] @ sorted_DG
        part = slice(start, start + len(scores_bG))
        yield part, scores_bG if single else np.maximum.reduceat(scores_bG, starts_C, axis=1)


def fused(vectors_ND: Vectors, labels_N: Labels, quality_N: Floats | None = None) -> tuple[Vectors, Labels]:
    """One template of each identity: the normalised mean of its vectors, weighted by their quality if it is given.

    An identity whose vectors cancel out, or all have quality 0, keeps its first vector. Ascending by label.
    """
    labels_C, class_N = np.unique(labels_N, return_inverse=True)
    weighted_ND = vectors_ND if quality_N is None else vectors_ND * quality_N[:, None]
    sums_CD = np.zeros((len(labels_C), vectors_ND.shape[1]))
    np.add.at(sums_CD, class_N, weighted_ND)
    norms_C = np.linalg.norm(sums_CD, axis=1)
    empty_C = norms_C < 1e-6
    sums_CD[empty_C] = vectors_ND[np.unique(labels_N, return_index=True)[1][empty_C]]
    norms_C[empty_C] = 1
    return np.asarray(sums_CD / norms_C[:, None], np.float32), labels_C


@dataclass(frozen=True, slots=True)
class MatedSearches:
    """What each mated probe found: its mate's score, how many identities score higher, how many tie with the mate,
    and the best identity that is not the mate (-1 where the gallery has no other)."""

    mate_P: NDArray[np.float32]
    ahead_P: NDArray[np.int64]
    tied_P: NDArray[np.int64]
    rival_P: NDArray[np.int64]


def search_mated(
    gallery_GD: Vectors, gallery_labels_G: Labels, probes_PD: Vectors, probe_labels_P: Labels
) -> MatedSearches:
    """Search each probe in a gallery that holds its identity. A probe without a mate is a fault of the caller."""
    identities_C = np.unique(gallery_labels_G)
    column_P = np.searchsorted(identities_C, probe_labels_P)
    if (column_P == len(identities_C)).any() or (identities_C[column_P] != probe_labels_P).any():
        raise ValueError("a mated probe's identity is not in the gallery")
    count = len(probes_PD)
    mate_P, rival_P = np.empty(count, np.float32), np.full(count, -1, np.int64)
    ahead_P, tied_P = np.empty(count, np.int64), np.empty(count, np.int64)
    for part, scores_bC in identity_scores(probes_PD, gallery_GD, gallery_labels_G):
        rows_b, mine_b = np.arange(len(scores_bC)), column_P[part]
        mate_P[part] = mate_b = scores_bC[rows_b, mine_b]
        scores_bC[rows_b, mine_b] = -np.inf  # what is left are the rivals
        ahead_P[part] = np.count_nonzero(scores_bC > mate_b[:, None] + np.float32(TIE), axis=1)
        tied_P[part] = np.count_nonzero(scores_bC >= mate_b[:, None] - np.float32(TIE), axis=1) - ahead_P[part]
        if len(identities_C) > 1:
            rival_P[part] = identities_C[np.argmax(scores_bC, axis=1)]
    return MatedSearches(mate_P, ahead_P, tied_P, rival_P)


def search_non_mated(gallery_GD: Vectors, gallery_labels_G: Labels, probes_PD: Vectors) -> Vectors:
    """The best score that each probe finds in a gallery that does not hold its identity."""
    found = identity_scores(probes_PD, gallery_GD, gallery_labels_G)
    return np.concatenate([np.empty(0, np.float32), *(scores_bC.max(axis=1) for _, scores_bC in found)])
