"""95 % intervals of rates whose trials come in subjects: Wilson's, the rule of three, and replicates of a bootstrap.

Samples of one subject err together, so that n trials tell less than n independent ones. A rate's variance is estimated
from what each subject adds to it, and the interval is that of the n' = p (1 - p) / variance independent trials that
would tell as much. Axes: P trials, S subjects, R replicates.
"""

from collections.abc import Iterator
from math import sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from trainer.evaluation.curve import student
from trainer.evaluation.metrics import CONFIDENCE, SHOWN_ERRORS, fnir_replicates, subject_weights
from trainer.evaluation.report import FnirAtFpir
from trainer.evaluation.scores import Labels

Numbers = NDArray[np.float64]
Interval = tuple[float, float]

DEVIATE = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
_TOGETHER = 1 << 22  # weights drawn at a time


def wilson(rate: float, trials: float, deviate: float = DEVIATE) -> Interval:
    """Wilson's score interval of a rate of so many independent trials (JASA 1927); they need not be a whole number."""
    square = deviate**2 / trials
    centre = (rate + square / 2) / (1 + square)
    width = deviate / (1 + square) * sqrt(rate * (1 - rate) / trials + square / (4 * trials))
    return max(0.0, centre - width), min(1.0, centre + width)


def of_rate(
    rate: float, variance: float, trials: int, independent: int, influence_S: Numbers | None = None
) -> Interval:
    """The interval of a rate: Wilson's by the trials that its variance is worth; the rule of three without any error.

    Args:
        variance: of the rate, between subjects.
        trials: counted; the variance is never taken to be worth more.
        independent: subjects, or pairs of them: trials that are known to be independent.
        influence_S: what each subject adds to the rate. Where few of them make it, as wolves do, their variance is
            itself not known well: the deviate is Student's, of as many degrees of freedom as their squares show
            (Satterthwaite 1946), and both ends allow for one like the greatest who was met by chance, or was not (after
            Fay and Feuer 1997), as `curve.py` does it.
    """
    spread = rate * (1 - rate)
    if spread <= 0:  # n clean trials show a rate of at most 3 / n (Hanley and Lippman-Hand, JAMA 1983)
        shown = min(1.0, SHOWN_ERRORS / independent)
        return (0.0, shown) if rate <= 0 else (1 - shown, 1.0)
    deviate = DEVIATE
    if influence_S is not None and influence_S.any():
        deviate = student(_freedom(influence_S))
        variance += float(np.square(influence_S).max())
    return wilson(rate, min(spread / variance if variance > 0 else trials, trials), deviate)


def _freedom(influence_S: Numbers) -> float:
    """Degrees of freedom of the sum of squares."""
    squares_S = np.square(influence_S)
    fourth = float(np.square(squares_S).sum() - squares_S.sum() ** 2 / len(squares_S))
    return min(max(2 * float(squares_S.sum()) ** 2 / max(fourth, 1e-300), 1.0), 1e6)


def of_mean(errors_P: NDArray[np.floating], subjects_P: Labels) -> Interval:
    """The interval of the mean of errors, 0 to 1 each, by the subject of each."""
    _, subject_P, trials_S = np.unique(subjects_P, return_inverse=True, return_counts=True)
    rate, subjects = float(errors_P.mean()), len(trials_S)
    if subjects < 2:
        return 0.0, 1.0
    residual_S = np.bincount(subject_P, weights=errors_P) - rate * trials_S
    variance = float(np.square(residual_S).sum()) / len(errors_P) ** 2 * subjects / (subjects - 1)
    return of_rate(rate, variance, len(errors_P), subjects)


def of_fnir(
    mated: tuple[NDArray[np.floating], Labels],
    non_mated: tuple[NDArray[np.floating], Labels],
    point: FnirAtFpir,
    *,
    seed: int,
    replicates: int,
) -> FnirAtFpir:
    """The point with the interval of its FNIR, if it has one; arguments as of `metrics.fnir_replicates`."""
    if point.fnir is None:
        return point
    found_R = fnir_replicates(mated, non_mated, point.fpir, seed=seed, replicates=replicates)
    subjects = len(np.unique(mated[1]))
    low, high = percentiles(found_R) if 0 < point.fnir < 1 else of_rate(point.fnir, 0, subjects, subjects)
    return point.model_copy(update={"low": low, "high": high})


def weights(subjects: int, replicates: int, seed: int) -> Iterator[Numbers]:
    """How often each subject is drawn in each replicate of the bootstrap, some replicates at a time: [r, S]."""
    generator = np.random.default_rng([seed, 6])
    rows = max(1, _TOGETHER // subjects)
    for start in range(0, replicates, rows):
        yield subject_weights(generator, subjects, min(rows, replicates - start))


def percentiles(replicates_R: Numbers) -> Interval:
    """The central 95 % of bootstrap replicates (Efron and Tibshirani, 1993, chapter 13)."""
    low, high = np.quantile(replicates_R, TAILS)
    return float(low), float(high)
