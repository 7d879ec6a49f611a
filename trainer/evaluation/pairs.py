"""The verification protocol: all pairs of the held-out samples, and LFW's ten folds of drawn ones."""

from collections.abc import Sequence
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from trainer.evaluation.metrics import (
    area_under_curve,
    equal_error_rate,
    tar_at_far,
    ten_fold_accuracy,
    verification_curve,
)
from trainer.evaluation.report import AllPairs, Histogram, TarAtFar, TenFold, rounded, thinned
from trainer.evaluation.scores import GRID, STEPS, Labels, PairCounts, Vectors, pair_counts

HISTOGRAM_BINS = 200  # from the lowest score that occurs to the highest; fewer where pairs are few
FOLDS = 10
PAIRS_PER_FOLD = 300  # mated, and as many non-mated, as in LFW


def verification(
    vectors_ND: Vectors, labels_N: Labels, *, fars: Sequence[float], seed: int, max_samples: int
) -> AllPairs:
    """AllPairs over all pairs of the samples, or of whole identities up to `max_samples` of them."""
    rows = whole_identities(labels_N, max_samples, seed)
    vectors_ND, labels_N = vectors_ND[rows], labels_N[rows]
    counts = pair_counts(vectors_ND, labels_N)
    curve = verification_curve(counts)
    kept = thinned(curve.fmr_T, curve.fnmr_T)
    points = [tar_at_far(curve, far) for far in fars]
    return AllPairs(
        samples=len(labels_N),
        mated_pairs=curve.mated,
        non_mated_pairs=curve.non_mated,
        eer=equal_error_rate(curve),
        auc=area_under_curve(curve),
        tar_at_far=[TarAtFar(far=p.rate, tar=p.value, threshold=p.threshold, reason=p.reason) for p in points],
        ten_fold=ten_fold(vectors_ND, labels_N, seed=seed),
        thresholds=rounded(curve.thresholds_T[kept], 9),
        fmr=rounded(curve.fmr_T[kept]),
        fnmr=rounded(curve.fnmr_T[kept]),
        histogram=histogram_of(counts),
    )


def ten_fold(vectors_ND: Vectors, labels_N: Labels, *, seed: int) -> TenFold | None:
    """LFW-style accuracy: ten folds of identities, each of up to 300 mated and as many non-mated pairs."""
    generator = np.random.default_rng(seed)
    parts = np.array_split(generator.permutation(np.unique(labels_N)), FOLDS)
    scores, mated, folds = [], [], []
    for fold, identities in enumerate(parts):
        rows = np.flatnonzero(np.isin(labels_N, identities))
        same, different = _drawn_pairs(labels_N[rows], generator)
        size = min(len(same), len(different))
        if size == 0:
            return None
        pairs = rows[np.concatenate([same[:size], different[:size]])]
        scores.append(np.einsum("pd,pd->p", vectors_ND[pairs[:, 0]], vectors_ND[pairs[:, 1]]))
        mated.append(np.arange(2 * size) < size)
        folds.append(np.full(2 * size, fold))
    accuracies = ten_fold_accuracy(np.concatenate(scores), np.concatenate(mated), np.concatenate(folds))
    error = float(accuracies.std(ddof=1) / np.sqrt(FOLDS))
    return TenFold(accuracy=float(accuracies.mean()), standard_error=error, pairs=sum(map(len, folds)))


def _drawn_pairs(labels_n: Labels, generator: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Up to 300 different mated and 300 different non-mated pairs of positions, in random order."""
    if len(labels_n) < 2:
        none = np.empty((0, 2), np.int64)
        return none, none
    order_n = np.argsort(labels_n, kind="stable")
    first_n = np.searchsorted(labels_n[order_n], labels_n[order_n])
    count_n = np.searchsorted(labels_n[order_n], labels_n[order_n], side="right") - first_n
    one = generator.integers(len(labels_n), size=4 * PAIRS_PER_FOLD)
    mate = first_n[one] + generator.integers(count_n[one])
    other = generator.integers(len(labels_n), size=4 * PAIRS_PER_FOLD)
    same = _distinct(order_n[np.stack([one, mate], axis=1)], generator)
    different = np.stack([one, other], axis=1)
    return same, _distinct(different[labels_n[one] != labels_n[other]], generator)


def _distinct(pairs: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
    unique = np.unique(np.sort(pairs[pairs[:, 0] != pairs[:, 1]], axis=1), axis=0)
    return np.asarray(generator.permutation(unique)[:PAIRS_PER_FOLD], dtype=np.int64)


def whole_identities(labels_N: Labels, most: int, seed: int) -> NDArray[np.int64]:
    """Rows of identities drawn by the seed while they hold at most `most` samples; all rows where that is enough."""
    if len(labels_N) <= most:
        return np.arange(len(labels_N))
    identities_C, counts_C = np.unique(labels_N, return_counts=True)
    order_C = np.random.default_rng(seed).permutation(len(identities_C))
    kept = max(2, int(np.searchsorted(np.cumsum(counts_C[order_C]), most, side="right")))
    return np.flatnonzero(np.isin(labels_N, identities_C[order_C[:kept]]))


def histogram_of(counts: PairCounts) -> Histogram:
    """Densities of the mated and non-mated scores, over the range that occurs."""
    cells = np.flatnonzero(counts.mated + counts.non_mated)
    bins = min(HISTOGRAM_BINS, 20 + isqrt(int(counts.mated.sum())))
    width = max(1, -(-int(cells[-1] + 1 - cells[0]) // bins))
    starts = np.arange(cells[0], cells[-1] + 1, width)
    edges = (np.append(starts, starts[-1] + width) - STEPS) * GRID
    mated, non_mated = (
        np.add.reduceat(c[: cells[-1] + 1], starts) / c.sum() / (width * GRID) for c in (counts.mated, counts.non_mated)
    )
    return Histogram(edges=rounded(edges, 9), mated=rounded(mated), non_mated=rounded(non_mated))
