"""The error rate of non-mated trials over the threshold: counted, extrapolated, grown to more subjects, bounded."""

from dataclasses import dataclass, replace

import numpy as np

from trainer.evaluation.bootstrap import score_interval
from trainer.evaluation.tail import Numbers, Pareto, Tail, fit, replicate_rates, spread

REPLICATES = 1000


@dataclass(frozen=True, slots=True)
class RateAt:
    """The error rate at a threshold: estimate and interval."""

    rate: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class NonMated:
    """The error rate of non-mated trials as a function of the threshold.

    Attributes:
        tail: hits, whose rate is that of one comparison or of a search among `at_hand` subjects.
        growth: N / M, at least 1: how many times more subjects are searched than the tail stands for.
        galleries: M / N where galleries of N subjects are drawn, 0 where rates are of single comparisons.
        pareto: the tail's continuation, None while hits are counted.
    """

    tail: Tail
    growth: float
    galleries: float
    pareto: Pareto | None

    def base(self, rate: float) -> float:
        """The rate that the tail must have for the grown gallery to have `rate`."""
        return float(-np.expm1(np.log1p(-rate) / self.growth))

    def grown(self, rate: Numbers) -> Numbers:
        """1 - (1 - rate)^growth."""
        return np.asarray(-np.expm1(np.log1p(-np.minimum(rate, 1 - 1e-12)) * self.growth), dtype=np.float64)

    def threshold(self, rate: float) -> float:
        """The lowest threshold on the grid that keeps the rate."""
        return (self.tail if self.pareto is None else self.pareto).quantile(self.base(rate))

    def rate_at(self, threshold: float, confidence: float, seed: int) -> RateAt:
        """Estimate and interval of the rate at a threshold."""
        generator = np.random.default_rng([seed, 4])
        start = None if self.pareto is None else self.pareto.start
        rates_R = replicate_rates(self.tail, threshold, generator, REPLICATES, start)
        used = self.tail.first(self.tail.hits(threshold if start is None else start))
        between = spread(used).gallery / max(float(used.shares_E.sum()), 1e-300) ** 2 * self.galleries
        if between > 0:
            rates_R = rates_R * generator.gamma(1 / between, between, size=REPLICATES)
        estimate = (self.tail if self.pareto is None else self.pareto).rate(threshold)
        interval = score_interval(estimate, float(rates_R.var()), confidence)
        low, high = (float(self.grown(np.array(bound))) for bound in interval)
        return RateAt(float(self.grown(np.array(estimate))), low, high)

    def extended(self) -> "NonMated":
        """The same with a generalised Pareto tail fitted to the highest scores."""
        top = self.tail.top(fitted_share(self.tail.trials))
        return replace(self, tail=top, pareto=fit(top))


def fitted_share(trials: float) -> float:
    """The share of trials that a tail is fitted to: a tenth, at least 100 trials (or a quarter), at most 2000."""
    return min(max(0.1 * trials, min(100.0, 0.25 * trials)), 2000.0) / trials
