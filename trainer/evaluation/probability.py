"""From a score to the probability of a mate: Platt's sigmoid and isotonic regression, with the prior explicit.

Both are fitted to all pairs of the held-out samples, mated and non-mated ones with the same total weight, so that they
give the log likelihood ratio of a score, whatever the share of mates among the pairs; the prior odds are added in use.
The expected calibration error (ECE; Naeini et al. 2015) is measured crosswise: fitted on one half of the subjects,
measured on the pairs of the other. Axes: K bins of scores.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from trainer.errors import UserError
from trainer.evaluation.scores import Labels, Vectors
from trainer.strict import Strict

Numbers = NDArray[np.float64]

BINS = 1 << 12  # of scores from -1 to 1
ROWS = 256  # of a block of scores
ECE_BINS = 15
FEWEST_MATED = 20  # pairs, in each half of the subjects


class MateProbability(Strict):
    """`probability(score)`; the method is the one with the smaller ECE."""

    prior: float = Field(gt=0, lt=1, description="of a mate, before the score is known")
    slope: float = Field(ge=0, description="Platt: log likelihood ratio = slope x score + offset")
    offset: float
    scores: list[float] = Field(description="isotonic: the log likelihood ratio is `ratios[i]` from scores[i] on")
    ratios: list[float]
    method: Literal["platt", "isotonic"]
    ece_platt: float = Field(ge=0, le=1)
    ece_isotonic: float = Field(ge=0, le=1)
    mated_pairs: int = Field(ge=1)

    def probability(self, score: float, prior: float | None = None) -> float:
        """P(mate | score), at another prior if one is given (0 to 1, exclusive)."""
        prior = self.prior if prior is None else prior
        if not 0 < prior < 1:
            raise UserError(f"a prior of {prior:g} leaves nothing to be found out; give one above 0 and below 1")
        ratio = _ratios(self, np.array([score]), self.method)[0]
        return float(_sigmoid(ratio + np.log(prior / (1 - prior))))


@dataclass(frozen=True, slots=True)
class _Bins:
    """Pairs by score: the middle of each bin, ascending, and how many mated and non-mated pairs are in it."""

    scores_K: Numbers
    mated_K: Numbers
    non_mated_K: Numbers


def mate_probability(
    searching_NE: Vectors, enrolled_NE: Vectors, labels_N: Labels, prior: float, seed: int
) -> MateProbability | None:
    """Fitted to all pairs; None where mated pairs are too few to fit and to check.

    Args:
        searching_NE, enrolled_NE: the samples in both roles; the same where scores are cosines.

    Raises:
        UserError: a prior that is none.
    """
    if not 0 < prior < 1:
        raise UserError(f"a prior of {prior:g} leaves nothing to be found out; give one above 0 and below 1")
    subjects, subject_N = np.unique(labels_N, return_inverse=True)
    first_S = np.random.default_rng([seed, 6]).permutation(len(subjects)) < len(subjects) // 2
    parts = first_S[subject_N], ~first_S[subject_N]
    halves = [_bins(searching_NE[part], enrolled_NE[part], labels_N[part]) for part in parts]
    if min(float(half.mated_K.sum()) for half in halves) < FEWEST_MATED:
        return None
    errors = {"platt": 0.0, "isotonic": 0.0}
    for fitted, measured in (halves, halves[::-1]):
        model = _fitted(fitted, prior)
        for method in errors:
            errors[method] += _ece(measured, _ratios(model, measured.scores_K, method), prior) / 2
    found = _fitted(_bins(searching_NE, enrolled_NE, labels_N), prior)
    method = min(errors, key=lambda name: errors[name])
    told = {f"ece_{name}": error for name, error in errors.items()}
    return MateProbability.model_validate(found.model_dump() | told | {"method": method})


def _bins(searching_NE: Vectors, enrolled_NE: Vectors, labels_N: Labels) -> _Bins:
    """All ordered pairs of two samples, those bins that hold a pair."""
    mated, non_mated = np.zeros(BINS), np.zeros(BINS)
    for start in range(0, len(labels_N), ROWS):
        scores_bN = searching_NE[start : start + ROWS] @ enrolled_NE.T
        same_bN = labels_N[start : start + ROWS, None] == labels_N
        bin_bN = np.clip((scores_bN + 1) * (BINS / 2), 0, BINS - 1).astype(np.int64)
        rows_b = np.arange(len(scores_bN))
        mated += np.bincount(bin_bN[same_bN], minlength=BINS)
        mated -= np.bincount(bin_bN[rows_b, start + rows_b], minlength=BINS)  # a sample with itself
        non_mated += np.bincount(bin_bN[~same_bN], minlength=BINS)
    used = np.flatnonzero(mated + non_mated)
    middle_K = np.asarray((used + 0.5) * (2 / BINS) - 1, np.float64)
    return _Bins(middle_K, mated[used], non_mated[used])


def _fitted(bins: _Bins, prior: float) -> MateProbability:
    slope, offset = _platt(bins)
    scores, ratios = _isotonic(bins)
    return MateProbability(
        prior=prior,
        slope=slope,
        offset=offset,
        scores=scores,
        ratios=ratios,
        method="platt",
        ece_platt=0.0,
        ece_isotonic=0.0,
        mated_pairs=int(bins.mated_K.sum()),
    )


def _platt(bins: _Bins) -> tuple[float, float]:
    """Logistic regression by Newton's method, with Platt's (1999) targets, which keep it finite where classes part."""
    mated, non_mated = bins.mated_K.sum(), bins.non_mated_K.sum()
    weight_K = bins.mated_K / mated + bins.non_mated_K / non_mated
    hit, miss = (mated + 1) / (mated + 2), 1 / (non_mated + 2)
    target_K = (bins.mated_K / mated * hit + bins.non_mated_K / non_mated * miss) / weight_K
    x_K2 = np.column_stack([bins.scores_K, np.ones_like(bins.scores_K)])
    found = np.zeros(2)
    for _ in range(100):
        p_K = _sigmoid(x_K2 @ found)
        gradient = x_K2.T @ (weight_K * (target_K - p_K))
        curvature = (x_K2 * (weight_K * p_K * (1 - p_K))[:, None]).T @ x_K2
        step = np.linalg.solve(curvature + 1e-9 * np.eye(2), gradient)
        found = found + step * min(1.0, 20 / max(float(np.abs(step).max()), 1e-12))
        if np.abs(step).max() < 1e-8:
            break
    return max(float(found[0]), 0.0), float(found[1])


def _isotonic(bins: _Bins) -> tuple[list[float], list[float]]:
    """Pool adjacent violators: the scores at which the log likelihood ratio rises, and what it rises to.

    A pool without mated or without non-mated pairs has half a pair in its place, so that no probability is 0 or 1.
    """
    mated, non_mated = bins.mated_K.sum(), bins.non_mated_K.sum()
    pools: list[tuple[float, float, float]] = []
    for score, hit, miss in zip(bins.scores_K, bins.mated_K, bins.non_mated_K, strict=True):
        pool = (float(score), float(hit), float(miss))
        while pools and pools[-1][1] * pool[2] >= pool[1] * pools[-1][2]:  # the share of mated pairs does not rise
            start, hits, misses = pools.pop()
            pool = (start, hits + pool[1], misses + pool[2])
        pools.append(pool)
    ratios = [float(np.log(max(hit, 0.5) / mated) - np.log(max(miss, 0.5) / non_mated)) for _, hit, miss in pools]
    return [start - 1 / BINS for start, _, _ in pools], np.maximum.accumulate(ratios).tolist()


def _ratios(model: MateProbability, scores_K: Numbers, method: str) -> Numbers:
    """Log likelihood ratios of scores."""
    if method == "platt":
        return model.slope * scores_K + model.offset
    place_K = np.searchsorted(np.array(model.scores), scores_K, side="right") - 1
    return np.array(model.ratios)[np.maximum(place_K, 0)]


def _ece(bins: _Bins, ratio_K: Numbers, prior: float) -> float:
    """Mean distance of the stated probability from the share of mates, over bins of equal width, at a prior."""
    p_K = _sigmoid(ratio_K + np.log(prior / (1 - prior)))
    mate_K = prior * bins.mated_K / bins.mated_K.sum()
    weight_K = mate_K + (1 - prior) * bins.non_mated_K / bins.non_mated_K.sum()
    bin_K = np.minimum((p_K * ECE_BINS).astype(int), ECE_BINS - 1)
    return float(np.abs(np.bincount(bin_K, weights=weight_K * p_K - mate_K, minlength=ECE_BINS)).sum())


def _sigmoid(x: Numbers) -> Numbers:
    return np.asarray(0.5 * (1 + np.tanh(x / 2)), dtype=np.float64)
