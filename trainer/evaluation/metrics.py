"""Error rates of verification (1:1) and identification (1:N) from scores, and their intervals.

Terms follow ISO/IEC 19795-1: FMR, FNMR (of pairs), FPIR, FNIR (of searches). A score at or above the threshold is
accepted. Research writes FAR for FMR and TAR for 1 - FNMR. Samples of one subject err together: a bootstrap draws
subjects, each as a whole. Axes: T thresholds, P probes or pairs, K ranks, F folds, S subjects, R replicates.
"""

from dataclasses import dataclass
from math import ceil, sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError
from trainer.evaluation.report import FnirAtFpir, TarAtFar
from trainer.evaluation.scores import CELLS, GRID, STEPS, Labels, MatedSearches, PairCounts, above, cell

Scores = NDArray[np.floating]

# Doddington's rule of 30: with 30 errors the rate is known to +- 30 % at 90 % confidence (independent trials).
RESOLVED_ERRORS = 30
# Rule of three: n clean trials show a rate of at most 3 / n at 95 %; below three expected errors nothing can be shown.
SHOWN_ERRORS = 3
CONFIDENCE = 0.95  # of all intervals


@dataclass(frozen=True, slots=True)
class ErrorCurve:
    """FMR and FNMR at every threshold where either changes, ascending; the last threshold accepts nothing."""

    thresholds_T: NDArray[np.float64]
    fmr_T: NDArray[np.float64]
    fnmr_T: NDArray[np.float64]
    mated: int
    non_mated: int


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


def minimum_cost(curve: ErrorCurve, prior: float) -> float:
    """The least detection cost over all thresholds, of equal costs of both errors and this prior of mated pairs.

    min over t of (prior FNMR(t) + (1 - prior) FMR(t)) / min(prior, 1 - prior): 1 for a system that always says the same
    (Martin and Greenberg, "The NIST 2010 speaker recognition evaluation", Interspeech 2010, normalised).
    """
    costs_T = prior * curve.fnmr_T + (1 - prior) * curve.fmr_T
    return float(costs_T.min() / min(prior, 1 - prior))


def tar_at_far(curve: ErrorCurve, far: float) -> TarAtFar:
    """The true accept rate at the lowest threshold whose false accept rate is at most `far`.

    It is given, without interval, only where `far` means 30 false accepts or more (Doddington's rule); otherwise the
    reason is.
    """
    if curve.non_mated * far < RESOLVED_ERRORS:
        needed = ceil(RESOLVED_ERRORS / far)
        reason = f"{curve.non_mated} non-mated pairs do not resolve FAR {far:g}; it takes {needed}"
        return TarAtFar(far=far, tar=None, threshold=None, reason=reason)
    index = int(np.argmax(curve.fmr_T <= far))
    threshold = curve.thresholds_T[index - 1] + GRID if index else curve.thresholds_T[0]
    return TarAtFar(far=far, tar=float(1 - curve.fnmr_T[index]), threshold=float(threshold))


def match_characteristic(searches: MatedSearches, ranks: int) -> NDArray[np.float64]:
    """CMC: the share of closed-set searches whose mate is among the first k identities, k = 1 ... ranks.

    Ties are broken by lot, in expectation: with `a` identities ahead of the mate and `t` tied with it, its rank is
    equally likely a + 1 ... a + 1 + t. Embeddings that have all collapsed into one point get 1 / C, not 1.
    """
    return np.array([within_rank_P(searches, rank).mean() for rank in range(1, ranks + 1)], dtype=np.float64)


def within_rank_P(searches: MatedSearches, rank: int) -> NDArray[np.float64]:
    """Probability that a probe's mate is among its first `rank` candidates: 1, 0, or a share where some tie."""
    chance_P = (rank - searches.ahead_P) / (searches.tied_P + 1)
    return np.asarray(np.clip(chance_P, 0, 1), dtype=np.float64)


def rank1_P(searches: MatedSearches) -> NDArray[np.float64]:
    """Probability that a probe's first candidate is its mate."""
    return within_rank_P(searches, 1)


def missed_P(searches: MatedSearches, threshold: float, rank: int | None = None) -> NDArray[np.float64]:
    """Probability that a mated search does not return the mate at or above the threshold among its first candidates.

    Its mean is FNIR(N, R, T); with `rank` None, of any rank, FNIR(N, N, T).
    """
    found_P = searches.mate_P >= threshold
    return np.asarray(1 - (found_P if rank is None else within_rank_P(searches, rank) * found_P), dtype=np.float64)


def threshold_at(non_mated_P: Scores, rate: float) -> float:
    """The lowest threshold on the grid at or above which at most `rate` of the scores lie."""
    allowed = int(np.floor(rate * len(non_mated_P) + 1e-9))
    if allowed >= len(non_mated_P):
        return -1.0
    place = len(non_mated_P) - 1 - allowed
    return above(float(np.partition(non_mated_P, place)[place]))  # the highest score that is refused


def fnir_at_fpir(mated: MatedSearches, non_mated_P: Scores, fpir: float) -> FnirAtFpir:
    """FNIR(N, T) at the lowest T with FPIR(N, T) <= `fpir`, without interval; where probes are too few, the reason.

    FPIR is the share of non-mated searches that return a candidate at or above T, FNIR the share of mated ones that do
    not return the mate at or above T, at any rank.

    Args:
        non_mated_P: the best score of each non-mated search.
    """
    threshold = fnir = first = reason = None
    if len(non_mated_P) * fpir < SHOWN_ERRORS:
        needed = ceil(SHOWN_ERRORS / fpir)
        reason = f"{len(non_mated_P)} non-mated probes do not show FPIR {fpir:g}; it takes {needed}"
    else:
        threshold = threshold_at(non_mated_P, fpir)
        fnir, first = (float(missed_P(mated, threshold, rank).mean()) for rank in (None, 1))
    return FnirAtFpir(fpir=fpir, fnir=fnir, fnir_rank1=first, low=None, high=None, threshold=threshold, reason=reason)


def identification_curve(
    mated_P: Scores, non_mated_P: Scores
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Thresholds ascending, with FPIR and FNIR at each: at every score that occurs, and one that accepts nothing."""
    cells_T = np.append(np.unique(cell(np.concatenate([mated_P, non_mated_P]))), CELLS)
    fnir_T = np.searchsorted(np.sort(cell(mated_P)), cells_T, side="left") / len(mated_P)
    fpir_T = 1 - np.searchsorted(np.sort(cell(non_mated_P)), cells_T, side="left") / len(non_mated_P)
    return (cells_T - STEPS) * GRID, fpir_T, fnir_T


def ten_fold_accuracy(scores_P: Scores, mated_P: NDArray[np.bool_], folds_P: Labels) -> NDArray[np.float64]:
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


def subject_weights(generator: np.random.Generator, subjects: int, replicates: int) -> NDArray[np.float64]:
    """How often each subject is drawn in each of R bootstrap replicates: [R, S], each row sums to S."""
    return generator.multinomial(subjects, np.full(subjects, 1 / subjects), size=replicates).astype(np.float64)


def fnir_replicates(
    mated: tuple[Scores, Labels], non_mated: tuple[Scores, Labels], fpir: float, *, seed: int, replicates: int
) -> NDArray[np.float64]:
    """FNIR at an FPIR in each replicate of a bootstrap: subjects resampled, and the threshold chosen anew. [R]

    The same seed draws the same subjects, whatever their scores: replicates of two Embedders can be paired.

    Args:
        mated: the mate's score and the subject of each mated probe.
        non_mated: the best score and the subject of each non-mated probe.
    """
    generator = np.random.default_rng([seed, 2])
    descending_P, ascending_P = np.argsort(-non_mated[0], kind="stable"), np.argsort(mated[0], kind="stable")
    highest_P, mates_P = non_mated[0][descending_P], mated[0][ascending_P]
    strangers, stranger_P = np.unique(non_mated[1][descending_P], return_inverse=True)
    subjects, subject_P = np.unique(mated[1][ascending_P], return_inverse=True)
    found = []
    for _ in range(replicates):
        above_P = np.cumsum(subject_weights(generator, len(strangers), 1)[0, stranger_P])
        accepted = int(np.searchsorted(above_P, fpir * above_P[-1] * (1 + 1e-12), side="right"))
        missed = int(np.searchsorted(mates_P, highest_P[min(accepted, len(highest_P) - 1)], side="right"))
        missed_P = np.cumsum(subject_weights(generator, len(subjects), 1)[0, subject_P])
        found.append(missed_P[missed - 1] / missed_P[-1] if missed else 0.0)
    return np.array(found, dtype=np.float64)


def score_interval(rate: float, variance: float) -> tuple[float, float]:
    """Interval of a rate from its variance, which is taken to grow in proportion to the rate, as that of a count does.

    The score interval of a Poisson count (Rao): all r with (rate - r)^2 <= z^2 variance r / rate. Unlike a percentile
    interval it stays above 0, and it holds its confidence with few hits.
    """
    if rate <= 0 or variance <= 0:
        return max(rate, 0.0), min(max(rate, 0.0), 1.0)
    spread = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) ** 2 * variance / rate
    centre, width = rate + spread / 2, sqrt(spread * rate + spread**2 / 4)
    return max(centre - width, 0.0), min(centre + width, 1.0)
