"""Verification over all pairs of a set of samples, or those of a list: all figures with intervals, and ten folds."""

import numpy as np
from numpy.typing import NDArray

from trainer.evaluation import evidence, metrics, report
from trainer.evaluation.evidence import Evidence
from trainer.evaluation.findings import Band, Cost
from trainer.evaluation.metrics import ErrorCurve
from trainer.evaluation.scores import Labels, PairCounts, Vectors, pair_counts

FOLDS = 10
FARS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
PRIORS = (0.01, 0.001)  # of mated pairs, for the detection cost
BAND_POINTS = 60
REPLICATES = 1000  # of the bootstrap over subjects
MOST_PAIR_SAMPLES = 30_000  # their pairs are counted in some seconds
PAIRS_PER_FOLD = 300  # mated, and as many non-mated, as in LFW


def verification(
    vectors_ND: Vectors, labels_N: Labels, seed: int, enrolled_ND: Vectors | None = None
) -> tuple[report.AllPairs, ErrorCurve, Evidence]:
    """Verification over all pairs of the samples, or of whole identities up to `MOST_PAIR_SAMPLES` of them; and what a
    comparison with another Embedder needs of it. `enrolled_ND`: as for `scores.pair_blocks`."""
    rows = whole_identities(labels_N, MOST_PAIR_SAMPLES, seed)
    vectors_ND, labels_N = vectors_ND[rows], labels_N[rows]
    enrolled_ND = vectors_ND if enrolled_ND is None else enrolled_ND[rows]
    counts = pair_counts(vectors_ND, labels_N, enrolled_ND)
    curve = metrics.verification_curve(counts)
    found = evidence.of_all_pairs(vectors_ND, labels_N, curve, enrolled_ND=enrolled_ND)
    folds = ten_fold(vectors_ND, enrolled_ND, labels_N, seed)
    return pairs_report(len(labels_N), counts, curve, found, folds, seed), curve, found


def pairs_report(
    samples: int,
    counts: PairCounts,
    curve: ErrorCurve,
    found: Evidence,
    folds: report.TenFold | None,
    seed: int,
) -> report.AllPairs:
    """All figures of verification with their intervals."""
    kept = report.thinned(curve.fmr_T, curve.fnmr_T)
    fmrs_T = np.geomspace(max(1 / curve.non_mated, 1e-7), 1, BAND_POINTS)
    low, high = zip(*found.band(fmrs_T, seed, REPLICATES), strict=True)
    eer, auc = metrics.equal_error_rate(curve), metrics.area_under_curve(curve)
    return report.AllPairs(
        samples=samples,
        subjects=found.subjects,
        mated_pairs=curve.mated,
        non_mated_pairs=curve.non_mated,
        eer=eer,
        eer_interval=found.interval(eer, evidence.equal_errors, seed, REPLICATES),
        auc=auc,
        auc_interval=found.interval(auc, evidence.areas, seed, REPLICATES),
        costs=[_cost(curve, found, prior, seed) for prior in PRIORS],
        tar_at_far=[_tar_at_far(curve, found, far, seed) for far in FARS],
        band=Band(fmr=report.rounded(fmrs_T), low=list(low), high=list(high)),
        ten_fold=folds,
        thresholds=report.rounded(curve.thresholds_T[kept], 9),
        fmr=report.rounded(curve.fmr_T[kept]),
        fnmr=report.rounded(curve.fnmr_T[kept]),
        histogram=report.histogram_of(counts),
    )


def _cost(curve: ErrorCurve, found: Evidence, prior: float, seed: int) -> Cost:
    cost = metrics.minimum_cost(curve, prior)
    ends = found.interval(cost, lambda fmr, fnmr: evidence.lowest_costs(fmr, fnmr, prior), seed, REPLICATES)
    return Cost(prior=prior, cost=cost, interval=ends)


def _tar_at_far(curve: ErrorCurve, found: Evidence, far: float, seed: int) -> report.TarAtFar:
    point = metrics.tar_at_far(curve, far)
    if point.tar is None:
        return point
    at = np.array([far])
    low, high = found.interval(1 - point.tar, lambda fmr, fnmr: evidence.fnmr_at(fmr, fnmr, at)[:, 0], seed, REPLICATES)
    return point.model_copy(update={"low": 1 - high, "high": 1 - low})


def ten_fold(vectors_ND: Vectors, enrolled_ND: Vectors, labels_N: Labels, seed: int) -> report.TenFold | None:
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
        scores.append(np.einsum("pd,pd->p", vectors_ND[pairs[:, 0]], enrolled_ND[pairs[:, 1]]))
        mated.append(np.arange(2 * size) < size)
        folds.append(np.full(2 * size, fold))
    accuracies = metrics.ten_fold_accuracy(np.concatenate(scores), np.concatenate(mated), np.concatenate(folds))
    error = float(accuracies.std(ddof=1) / np.sqrt(FOLDS))
    return report.TenFold(accuracy=float(accuracies.mean()), standard_error=error, pairs=sum(map(len, folds)))


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
