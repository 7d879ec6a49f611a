"""Error rates of verification (1:1) and identification (1:N), from scores alone.

Terms follow ISO/IEC 19795-1: FMR, FNMR (of pairs), FPIR, FNIR (of searches). A score at or above the threshold is
accepted. Research writes FAR for FMR and TAR for 1 - FNMR. Axes: T thresholds, P probes or pairs, K ranks, F folds.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError
from trainer.evaluation.scores import CELLS, GRID, STEPS, MatedSearches, PairCounts, cell, threshold_of

# Doddington's rule of 30: with 30 errors the rate is known to +- 30 % at 90 % confidence (independent trials).
RESOLVED_ERRORS = 30
# Rule of three: n clean trials show a rate of at most 3 / n at 95 %; below three expected errors nothing can be shown.
SHOWN_ERRORS = 3


@dataclass(frozen=True, slots=True)
class ErrorCurve:
    """FMR and FNMR at every threshold where either changes, ascending; the last threshold accepts nothing."""

    thresholds_T: NDArray[np.float64]
    fmr_T: NDArray[np.float64]
    fnmr_T: NDArray[np.float64]
    mated: int
    non_mated: int


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """What is reached at the lowest threshold that keeps the false positives at or below `rate`.

    `value` is a TAR or an FNIR. `value` and `threshold` are None where the non-mated trials are too few to show such a
    rate; `reason` then says how many there are.
    """

    rate: float
    value: float | None
    threshold: float | None
    reason: str | None = None


def verification_curve(counts: PairCounts) -> ErrorCurve:
    """The ROC / DET curve of counted pairs: FMR(t) = share of non-mated scores >= t, FNMR(t) = share of mated ones < t.

    Raises:
        UserError: no mated or no non-mated pair.
    """
    mated, non_mated = int(counts.mated.sum()), int(counts.non_mated.sum())
    if not mated or not non_mated:
        raise UserError(
            f"{mated} mated and {non_mated} non-mated pairs give no error rates; "
            "use at least two identities, one of them with two samples"
        )
    cells_T = np.flatnonzero(counts.mated + counts.non_mated)
    accepted_T = np.cumsum(counts.non_mated[cells_T][::-1])[::-1]
    rejected_T = np.cumsum(counts.mated[cells_T]) - counts.mated[cells_T]
    return ErrorCurve(
        thresholds_T=(np.append(cells_T, CELLS) - STEPS) * GRID,
        fmr_T=np.append(accepted_T, 0) / non_mated,
        fnmr_T=np.append(rejected_T, mated) / mated,
        mated=mated,
        non_mated=non_mated,
    )


def equal_error_rate(curve: ErrorCurve) -> float:
    """Where FMR = FNMR, on the straight line between the two thresholds that enclose it; 0.5 for chance."""
    excess_T = curve.fmr_T - curve.fnmr_T  # falls from 1 to -1
    after = int(np.argmax(excess_T <= 0))
    share = excess_T[after - 1] / (excess_T[after - 1] - excess_T[after])
    return float(curve.fmr_T[after - 1] + share * (curve.fmr_T[after] - curve.fmr_T[after - 1]))


def area_under_curve(curve: ErrorCurve) -> float:
    """Probability that a mated pair scores higher than a non-mated one, a tie counting half; 0.5 for chance."""
    return float(np.trapezoid(1 - curve.fnmr_T[::-1], curve.fmr_T[::-1]))


def tar_at_far(curve: ErrorCurve, far: float) -> OperatingPoint:
    """The true accept rate at a false accept rate of at most `far`.

    It is given only where `far` means 30 false accepts or more (Doddington's rule); otherwise the reason is.
    """
    if curve.non_mated * far < RESOLVED_ERRORS:
        needed = int(np.ceil(RESOLVED_ERRORS / far))
        reason = f"{curve.non_mated} non-mated pairs do not resolve FAR {far:g}; it takes {needed}"
        return OperatingPoint(far, None, None, reason)
    index = int(np.argmax(curve.fmr_T <= far))
    threshold = curve.thresholds_T[index - 1] + GRID if index else curve.thresholds_T[0]
    return OperatingPoint(far, float(1 - curve.fnmr_T[index]), float(threshold))


def match_characteristic(searches: MatedSearches, ranks: int) -> NDArray[np.float64]:
    """CMC: the share of closed-set searches whose mate is among the first k identities, k = 1 ... ranks.

    Ties are broken by lot, in expectation: with `a` identities ahead of the mate and `t` tied with it, its rank is
    equally likely a + 1 ... a + 1 + t. Embeddings that have all collapsed into one point get 1 / C, not 1.
    """
    ranks_K = np.arange(1, ranks + 1)
    chance_PK = (ranks_K - searches.ahead_P[:, None]) / (searches.tied_P[:, None] + 1)
    return np.asarray(np.clip(chance_PK, 0, 1).mean(axis=0), dtype=np.float64)


def rank1_P(searches: MatedSearches) -> NDArray[np.float64]:
    """Probability that a probe's first candidate is its mate: 1, 0, or a share where others tie."""
    return np.asarray((searches.ahead_P == 0) / (searches.tied_P + 1), dtype=np.float64)


def threshold_at(non_mated_P: NDArray[np.floating], rate: float) -> float:
    """The lowest threshold on the grid at or above which at most `rate` of the scores lie."""
    allowed = int(np.floor(rate * len(non_mated_P) + 1e-9))
    if allowed >= len(non_mated_P):
        return -1.0
    highest_rejected = np.partition(non_mated_P, len(non_mated_P) - 1 - allowed)[len(non_mated_P) - 1 - allowed]
    return threshold_of(int(cell(highest_rejected[None])[0]) + 1)


def fnir_at_fpir(mated_P: NDArray[np.floating], non_mated_P: NDArray[np.floating], fpir: float) -> OperatingPoint:
    """FNIR(N, T) at the lowest T with FPIR(N, T) <= `fpir`.

    FPIR is the share of non-mated searches that return a candidate at or above T, FNIR the share of mated ones that do
    not return the mate at or above T, at any rank.

    Args:
        mated_P: the mate's score of each mated search.
        non_mated_P: the best score of each non-mated search.
    """
    if len(non_mated_P) * fpir < SHOWN_ERRORS:
        needed = int(np.ceil(SHOWN_ERRORS / fpir))
        return OperatingPoint(
            fpir, None, None, f"{len(non_mated_P)} non-mated probes do not show FPIR {fpir:g}; it takes {needed}"
        )
    threshold = threshold_at(non_mated_P, fpir)
    return OperatingPoint(fpir, float(np.mean(mated_P < threshold)), threshold)


def identification_curve(
    mated_P: NDArray[np.floating], non_mated_P: NDArray[np.floating]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Thresholds ascending, with FPIR and FNIR at each: at every score that occurs, and one that accepts nothing."""
    cells_T = np.append(np.unique(cell(np.concatenate([mated_P, non_mated_P]))), CELLS)
    fnir_T = np.searchsorted(np.sort(cell(mated_P)), cells_T, side="left") / len(mated_P)
    fpir_T = 1 - np.searchsorted(np.sort(cell(non_mated_P)), cells_T, side="left") / len(non_mated_P)
    return (cells_T - STEPS) * GRID, fpir_T, fnir_T


def ten_fold_accuracy(
    scores_P: NDArray[np.floating], mated_P: NDArray[np.bool_], folds_P: NDArray[np.integer]
) -> NDArray[np.float64]:
    """LFW's accuracy per fold: each with the threshold that is best on all other folds.

    The folds must not share an identity (Huang et al., "Labeled Faces in the Wild", 2007, view 2). Report the mean and
    the standard error, std / sqrt(folds).
    """
    cells_P = cell(scores_P)
    accuracies = []
    for fold in np.unique(folds_P):
        here_P = folds_P == fold
        best = _best_cell(cells_P[~here_P], mated_P[~here_P])
        accuracies.append(np.mean((cells_P[here_P] >= best) == mated_P[here_P]))
    return np.array(accuracies, dtype=np.float64)


def _best_cell(cells_P: NDArray[np.int64], mated_P: NDArray[np.bool_]) -> int:
    """The threshold that decides most pairs rightly; amid a gap or a plateau, its middle, which generalises best."""
    levels_T = np.append(np.unique(cells_P), CELLS)
    rejected_T = np.searchsorted(np.sort(cells_P[~mated_P]), levels_T, side="left")
    lost_T = np.searchsorted(np.sort(cells_P[mated_P]), levels_T, side="left")
    best_T = np.flatnonzero(rejected_T - lost_T == np.max(rejected_T - lost_T))
    below = levels_T[best_T[0] - 1] + 1 if best_T[0] else 0
    return int((below + levels_T[best_T[0]]) // 2)
