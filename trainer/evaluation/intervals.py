"""Resampling of subjects: samples of one subject err together, so a subject is drawn as a whole or not at all."""

from math import sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray


def subject_weights(generator: np.random.Generator, subjects: int, replicates: int) -> NDArray[np.float64]:
    """How often each subject is drawn in each of R bootstrap replicates: [R, S], each row sums to S."""
    return generator.multinomial(subjects, np.full(subjects, 1 / subjects), size=replicates).astype(np.float64)


def interval(replicates_R: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    """The central percentile interval of bootstrap replicates (Efron and Tibshirani, 1993, chapter 13)."""
    low, high = np.quantile(replicates_R, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def score_interval(rate: float, variance: float, confidence: float) -> tuple[float, float]:
    """Interval of a rate from its variance, which is taken to grow in proportion to the rate, as that of a count does.

    The score interval of a Poisson count (Rao): all r with (rate - r)^2 <= z^2 variance r / rate. Unlike a percentile
    interval it stays above 0, and it holds its confidence with few hits.
    """
    if rate <= 0 or variance <= 0:
        return max(rate, 0.0), min(max(rate, 0.0), 1.0)
    spread = NormalDist().inv_cdf((1 + confidence) / 2) ** 2 * variance / rate
    centre, width = rate + spread / 2, sqrt(spread * rate + spread**2 / 4)
    return max(centre - width, 0.0), min(centre + width, 1.0)


def mean_interval(
    values_P: NDArray[np.floating],
    subjects_P: NDArray[np.integer],
    *,
    seed: int,
    replicates: int = 1000,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Interval of the mean over probes, subjects resampled."""
    _, subject_P = np.unique(subjects_P, return_inverse=True)
    counts_S = np.bincount(subject_P)
    sums_S = np.bincount(subject_P, weights=values_P)
    weights_RS = subject_weights(np.random.default_rng([seed, 1]), len(counts_S), replicates)
    return interval((weights_RS @ sums_S) / (weights_RS @ counts_S), confidence)


def fnir_interval(
    mated_P: NDArray[np.floating],
    mated_subjects_P: NDArray[np.integer],
    non_mated_P: NDArray[np.floating],
    non_mated_subjects_P: NDArray[np.integer],
    fpir: float,
    *,
    seed: int,
    replicates: int = 1000,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Interval of FNIR at an FPIR: subjects resampled, and the threshold chosen anew in each replicate."""
    generator = np.random.default_rng([seed, 2])
    order_P = np.argsort(-non_mated_P, kind="stable")
    _, stranger_P = np.unique(non_mated_subjects_P, return_inverse=True)
    _, mated_order = np.unique(mated_subjects_P, return_inverse=True)
    ascending_P = np.argsort(mated_P, kind="stable")
    mated_sorted_P, mated_subject_P = mated_P[ascending_P], mated_order[ascending_P]
    found = []
    for _ in range(replicates):
        weights_S = subject_weights(generator, int(stranger_P.max()) + 1, 1)[0]
        above_P = np.cumsum(weights_S[stranger_P[order_P]])
        first_rejected = min(
            int(np.searchsorted(above_P, fpir * above_P[-1] * (1 + 1e-12), side="right")), len(order_P) - 1
        )
        highest_rejected = non_mated_P[order_P[first_rejected]]
        weights_S = subject_weights(generator, int(mated_order.max()) + 1, 1)[0]
        missed_P = np.cumsum(weights_S[mated_subject_P])
        missed = int(np.searchsorted(mated_sorted_P, highest_rejected, side="right"))
        found.append(missed_P[missed - 1] / missed_P[-1] if missed else 0.0)
    return interval(np.array(found), confidence)
