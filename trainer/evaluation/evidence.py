"""Who errs at which threshold: the pairs of each subject, counted at some thresholds, and the intervals they support.

Axes as in `scores.py`; S subjects, K thresholds, R replicates, E non-mated pairs that a threshold accepts.

FNMR is a mean over subjects' own pairs. FMR is one over pairs of subjects, each of which is in many pairs: with r_s the
sum of (hit - FMR) over all pairs that subject s is in, and d_ij over those of subjects i and j,
Var FMR = (sum_s r_s^2 - sum_ij d_ij^2) / n^2 (Fafchamps and Gubert, J. Development Economics 2007, for pairs of one
sample each: that of a U-statistic). EER, TAR at a FAR, AUC and costs follow from FMR and FNMR at all thresholds; their
replicates are linear in the subjects' weights, with the threshold chosen anew in each, and so is what one subject more
of a kind adds to them.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from trainer.evaluation import intervals
from trainer.evaluation.intervals import Interval, Numbers
from trainer.evaluation.metrics import ErrorCurve, Scores, equal_error_rate
from trainer.evaluation.scores import CELLS, STEPS, Labels, Vectors, cell, pair_blocks

LEVELS_A_DECADE = 8
COUNTED_FMR = 0.1  # false matches are counted by subject up to this rate, or four times the EER
COUNTED_PAIRS = 20_000_000  # of so many pairs or fewer all are: AUC is made by high rates, too, and subjects are few
_TOGETHER = 1 << 20  # rates computed at a time
SPARSE = 1e-2  # up to this rate the pairs of each two subjects are counted, too


def levels(curve: ErrorCurve) -> Numbers:
    """Thresholds at which errors are counted by subject: along both axes of the DET curve, ascending. [K]"""
    targets_fmr = _decades(1 / curve.non_mated, _counted_to(curve))
    at_fmr = [int(np.argmax(curve.fmr_T <= target)) for target in targets_fmr]
    at_fnmr = np.searchsorted(curve.fnmr_T, _decades(1 / curve.mated, 1.0))
    kept = np.unique([0, *at_fmr, *np.minimum(at_fnmr, len(curve.fnmr_T) - 1).tolist()])
    return np.asarray(curve.thresholds_T[kept], np.float64)


def _counted_to(curve: ErrorCurve) -> float:
    """The FMR up to which false matches are counted by subject; beyond it, it is taken as known."""
    if curve.non_mated <= COUNTED_PAIRS:
        return 1.0
    return min(1.0, max(COUNTED_FMR, 4 * equal_error_rate(curve)))


def _decades(low: float, high: float) -> Numbers:
    count = 2 + int(LEVELS_A_DECADE * np.log10(high / low)) if high > low else 1
    return np.geomspace(min(low, high), high, count)


@dataclass(frozen=True)
class Evidence:
    """Errors by subject at ascending thresholds.

    Attributes:
        thresholds_K: the levels.
        rejected_SK: mated pairs of each subject that score below.
        accepted_SK: non-mated pairs that each subject is in and that score at or above: every pair is at two subjects.
            Beyond the rate of `COUNTED_FMR` they are not counted, and the FMR is taken as known.
        mated_S, non_mated_S: all pairs of each subject.
        dyads_K: sum of the squares of the accepted pairs of each two subjects.
        fmr_K, fnmr_K: the rates.
    """

    thresholds_K: Numbers
    rejected_SK: Labels
    accepted_SK: Labels
    mated_S: Labels
    non_mated_S: Labels
    dyads_K: Numbers
    fmr_K: Numbers
    fnmr_K: Numbers

    @property
    def subjects(self) -> int:
        return len(self.mated_S)

    @property
    def mated_subjects(self) -> int:
        return max(1, int(np.count_nonzero(self.mated_S)))

    @cached_property
    def mated(self) -> int:
        return int(self.mated_S.sum())

    @cached_property
    def _non_mated(self) -> int:
        return int(self.non_mated_S.sum()) // 2

    @cached_property
    def fnmr_parts_SK(self) -> Numbers:
        """What each subject adds to FNMR, beyond its share; sums to 0."""
        return (self.rejected_SK - self.fnmr_K * self.mated_S[:, None]) / self.mated

    @cached_property
    def fmr_parts_SK(self) -> Numbers:
        """What each subject adds to FMR, beyond its share, such that the sum of squares is the variance of FMR."""
        fmr_K, pairs = self.fmr_K, self._non_mated
        parts_SK = (self.accepted_SK - fmr_K * self.non_mated_S[:, None]) / pairs
        parts_SK[:, fmr_K > self._known_from] = 0
        squares_K = np.square(parts_SK).sum(axis=0)
        least_K = fmr_K * (1 - fmr_K) / pairs
        # Beyond SPARSE, pairs of two subjects are taken to be as much alike as they are there.
        alike_K = np.maximum(self.dyads_K / np.maximum(fmr_K * pairs, 1), 1)
        dense_K = fmr_K > SPARSE
        alike_K[dense_K] = alike_K[~dense_K][0] if not dense_K.all() else 1
        variance_K = np.maximum(np.maximum(squares_K - alike_K * least_K, squares_K / 2), least_K)
        return np.asarray(parts_SK * np.sqrt(variance_K / np.where(squares_K > 0, squares_K, 1)), np.float64)

    @property
    def _known_from(self) -> float:
        """The FMR beyond which it is taken as known: false matches were not counted at all there."""
        complete_K = self.accepted_SK.sum(axis=0) >= np.round(2 * self.fmr_K * self._non_mated)
        return float(self.fmr_K[complete_K].max(initial=0.0))

    def fmr_interval(self, k: int) -> Interval:
        """Interval of FMR at the k-th threshold."""
        part_S = self.fmr_parts_SK[:, k]
        variance = float(np.square(part_S).sum())
        return intervals.of_rate(float(self.fmr_K[k]), variance, self._non_mated, self._dyads, part_S)

    def fnmr_interval(self, k: int) -> Interval:
        """Interval of FNMR at the k-th threshold."""
        subjects, part_S = self.mated_subjects, self.fnmr_parts_SK[:, k]
        variance = float(np.square(part_S).sum()) * subjects / max(subjects - 1, 1)
        return intervals.of_rate(float(self.fnmr_K[k]), variance, self.mated, subjects, part_S)

    @property
    def _dyads(self) -> int:
        """Pairs of two subjects, as far as they were compared."""
        return min(self._non_mated, self.subjects * (self.subjects - 1) // 2)

    def replicates(self, statistic: "Statistic", seed: int, count: int) -> Numbers:
        """A statistic of FMR and FNMR at the thresholds in each replicate of the bootstrap over subjects: [R, ...]."""
        found = []
        for weights_rS in intervals.weights(self.subjects, count, seed):
            fmr_rK = np.clip(self.fmr_K + (weights_rS - 1) @ self.fmr_parts_SK, 0, 1)
            fnmr_rK = np.clip(self.fnmr_K + (weights_rS - 1) @ self.fnmr_parts_SK, 0, 1)
            found.append(statistic(_falling(fmr_rK), np.maximum.accumulate(fnmr_rK, axis=1)))
        return np.concatenate(found)

    def added(self, statistic: "Statistic") -> Numbers:
        """What one more subject like each adds to a statistic: [S, ...]."""
        found, rows = [], max(1, _TOGETHER // len(self.thresholds_K))
        for start in range(0, self.subjects, rows):
            fmr_sK = np.clip(self.fmr_K + self.fmr_parts_SK[start : start + rows], 0, 1)
            fnmr_sK = np.clip(self.fnmr_K + self.fnmr_parts_SK[start : start + rows], 0, 1)
            found.append(statistic(_falling(fmr_sK), np.maximum.accumulate(fnmr_sK, axis=1)))
        return np.concatenate(found) - statistic(self.fmr_K[None], self.fnmr_K[None])

    def interval(self, value: float, statistic: "Statistic", seed: int, count: int) -> Interval:
        """Interval of a statistic between 0 and 1, whose value at all thresholds is given.

        Wilson's, of the variance of the replicates: they themselves are too narrow towards 1/2 where errors are few.
        """
        variance = float(self.replicates(statistic, seed, count).var()) * self._few
        return intervals.of_rate(value, variance, sys.maxsize, self.mated_subjects, self.added(statistic))

    def band(self, fmrs_T: Numbers, seed: int, count: int) -> list[Interval]:
        """Interval of FNMR at each FMR, the threshold chosen anew in each replicate."""

        def missed(fmr_RK: Numbers, fnmr_RK: Numbers) -> Numbers:
            return fnmr_at(fmr_RK, fnmr_RK, fmrs_T)

        fnmr_T = missed(self.fmr_K[None], self.fnmr_K[None])[0]
        variance_T, added_ST = self.replicates(missed, seed, count).var(axis=0) * self._few, self.added(missed)
        found = zip(fnmr_T.tolist(), variance_T.tolist(), added_ST.T, strict=True)
        return [intervals.of_rate(rate, of, self.mated, self.mated_subjects, added) for rate, of, added in found]

    @property
    def _few(self) -> float:
        """The variance of a bootstrap is too small by this factor."""
        return self.subjects / max(self.subjects - 1, 1)


Statistic = Callable[[Numbers, Numbers], Numbers]  # of fmr_RK and fnmr_RK: [R], or [R, ...]


def fnmr_at(fmr_RK: Numbers, fnmr_RK: Numbers, fmrs_T: Numbers) -> Numbers:
    """FNMR at the threshold where FMR is each of `fmrs_T`, on the straight line between the two about it: [R, T]."""
    found_RT = []
    for fmr in fmrs_T:
        after_R1 = np.argmax(fmr_RK <= fmr, axis=1)[:, None]
        before, after = (np.take_along_axis(fmr_RK, at, axis=1) for at in (np.maximum(after_R1 - 1, 0), after_R1))
        low, high = (np.take_along_axis(fnmr_RK, at, axis=1) for at in (np.maximum(after_R1 - 1, 0), after_R1))
        share = np.where(before > after, (before - fmr) / np.where(before > after, before - after, 1), 1)
        found_RT.append((low + share * (high - low))[:, 0])
    return np.stack(found_RT, axis=1)


def equal_errors(fmr_RK: Numbers, fnmr_RK: Numbers) -> Numbers:
    """`metrics.equal_error_rate` of many curves: [R]."""
    excess_RK = fmr_RK - fnmr_RK
    after_R1 = np.maximum(np.argmax(excess_RK <= 0, axis=1), 1)[:, None]
    before, after = (np.take_along_axis(excess_RK, place, axis=1) for place in (after_R1 - 1, after_R1))
    fmr_before, fmr_after = (np.take_along_axis(fmr_RK, place, axis=1) for place in (after_R1 - 1, after_R1))
    share = before / np.where(before > after, before - after, 1)
    return np.asarray((fmr_before + share * (fmr_after - fmr_before))[:, 0])


def areas(fmr_RK: Numbers, fnmr_RK: Numbers) -> Numbers:
    """`metrics.area_under_curve` of many curves: [R]."""
    return np.asarray(np.trapezoid(1 - fnmr_RK[:, ::-1], fmr_RK[:, ::-1], axis=1))


def lowest_costs(fmr_RK: Numbers, fnmr_RK: Numbers, prior: float) -> Numbers:
    """`metrics.minimum_cost` of many curves: [R]."""
    return np.asarray((prior * fnmr_RK + (1 - prior) * fmr_RK).min(axis=1) / min(prior, 1 - prior))


def _falling(rates_RK: Numbers) -> Numbers:
    return np.maximum.accumulate(rates_RK[:, ::-1], axis=1)[:, ::-1]


def of_all_pairs(
    vectors_ND: Vectors,
    labels_N: Labels,
    curve: ErrorCurve,
    at: float | None = None,
    enrolled_ND: Vectors | None = None,
) -> Evidence:
    """The evidence of all pairs of the samples, whose curve is known: at one threshold, or along the curve.

    `enrolled_ND`: as for `scores.pair_blocks`.
    """
    order_N = np.argsort(labels_N, kind="stable")
    sorted_N = labels_N[order_N]
    _, subject_N, counts_S = np.unique(sorted_N, return_inverse=True, return_counts=True)
    thresholds_K = levels(curve) if at is None else np.array([at])
    counting = _Counting(curve, thresholds_K, counts_S * (counts_S - 1) // 2, counts_S * (len(labels_N) - counts_S))
    others_ND = None if enrolled_ND is None else enrolled_ND[order_N]
    for start, scores_bn, mated_bw, non_mated_bw in pair_blocks(vectors_ND[order_N], sorted_N, others_ND):
        row_e, column_e = np.nonzero(mated_bw)
        counting.mated(scores_bn[row_e, column_e], subject_N[start + row_e])
        wanted_bn = scores_bn >= counting.floor
        wanted_bn[:, : mated_bw.shape[1]] &= non_mated_bw
        entry_e = np.flatnonzero(wanted_bn)
        row_e, column_e = np.divmod(entry_e, scores_bn.shape[1])
        counting.non_mated(scores_bn.ravel()[entry_e], subject_N[start + row_e], subject_N[start + column_e])
    return counting.evidence()


def of_list(scores_P: Scores, mated_P: NDArray[np.bool_], subjects_P2: Labels, curve: ErrorCurve) -> Evidence:
    """The evidence of listed pairs; `subjects_P2` are the subjects of their two sides."""
    subjects, flat = np.unique(subjects_P2, return_inverse=True)
    first_P, second_P = flat.reshape(-1, 2).T
    mated_S = np.bincount(first_P[mated_P], minlength=len(subjects))
    non_mated_S = np.bincount(flat.reshape(-1, 2)[~mated_P].ravel(), minlength=len(subjects))
    counting = _Counting(curve, levels(curve), mated_S, non_mated_S)
    counting.mated(scores_P[mated_P], first_P[mated_P])
    wanted_P = ~mated_P & (scores_P >= counting.floor)
    counting.non_mated(scores_P[wanted_P], first_P[wanted_P], second_P[wanted_P])
    return counting.evidence()


class _Counting:
    """Adds pairs up, block by block. A pair passes so many of the thresholds; L = K + 1 such numbers."""

    def __init__(self, curve: ErrorCurve, thresholds_K: Numbers, mated_S: Labels, non_mated_S: Labels) -> None:
        self._thresholds_K = thresholds_K
        places_K = np.searchsorted(curve.thresholds_T, self._thresholds_K)
        self._fmr_K, self._fnmr_K = curve.fmr_T[places_K], curve.fnmr_T[places_K]
        self._mated_S, self._non_mated_S = mated_S.astype(np.int64), non_mated_S.astype(np.int64)
        self.floor = np.float32(self._thresholds_K[np.argmax(self._fmr_K <= _counted_to(curve))])
        self._sparse = int(np.argmax(self._fmr_K <= SPARSE))
        cells_K = np.round(self._thresholds_K * STEPS).astype(np.int64) + STEPS
        self._passed = np.searchsorted(cells_K, np.arange(CELLS), side="right").astype(np.uint16)
        self._width = len(cells_K) + 1
        self._passed_mated_SL, self._passed_non_mated_SL = np.zeros((2, len(mated_S) * self._width), np.int64)
        self._squares_L = np.zeros(self._width)

    def mated(self, scores_e: Scores, subject_e: Labels) -> None:
        code_e = subject_e * self._width + self._passed[cell(scores_e)]
        self._passed_mated_SL += np.bincount(code_e, minlength=len(self._passed_mated_SL))

    def non_mated(self, scores_e: Scores, first_e: Labels, second_e: Labels) -> None:
        passed_e = self._passed[cell(scores_e)].astype(np.int64)
        for subject_e in (first_e, second_e):
            code_e = subject_e * self._width + passed_e
            self._passed_non_mated_SL += np.bincount(code_e, minlength=len(self._passed_non_mated_SL))
        few_e = passed_e > self._sparse
        low_e, high_e = np.minimum(first_e, second_e)[few_e], np.maximum(first_e, second_e)[few_e]
        dyad_e = low_e * len(self._mated_S) + high_e
        order_e = np.lexsort((-passed_e[few_e], dyad_e))
        dyad_e, passed_e = dyad_e[order_e], passed_e[few_e][order_e]
        earlier_e = np.arange(len(dyad_e)) - np.searchsorted(dyad_e, dyad_e)  # of the dyad: c^2 grows by 2 c + 1
        self._squares_L += np.bincount(passed_e, weights=2 * earlier_e + 1, minlength=self._width)

    def evidence(self) -> Evidence:
        mated_SL, non_mated_SL = (
            flat.reshape(-1, self._width) for flat in (self._passed_mated_SL, self._passed_non_mated_SL)
        )
        return Evidence(
            thresholds_K=self._thresholds_K,
            rejected_SK=np.cumsum(mated_SL, axis=1)[:, :-1],
            accepted_SK=np.cumsum(non_mated_SL[:, ::-1], axis=1)[:, ::-1][:, 1:],
            mated_S=self._mated_S,
            non_mated_S=self._non_mated_S,
            dyads_K=np.cumsum(self._squares_L[::-1])[::-1][1:],
            fmr_K=self._fmr_K,
            fnmr_K=self._fnmr_K,
        )
