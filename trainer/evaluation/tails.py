"""The upper tail of non-mated scores: its rate, its extrapolation, and how far both can be trusted.

Every false positive has two subjects: the one who searched and the one who answered. Both vary: some subjects are
taken for many ("wolves" and "lambs"; Doddington et al. 1998), so hits that share either subject are not independent.
Axes: E hits (entries of the tail), S subjects, R bootstrap replicates.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trainer.evaluation.metrics import score_interval, subject_weights
from trainer.evaluation.scores import Labels, above, ceil_to_grid

Numbers = NDArray[np.float64]

LEAST = 1e-12  # below any difference of two scores
CHUNK = 1 << 22  # weights held at a time in a bootstrap
REPLICATES = 1000


@dataclass(frozen=True, slots=True)
class Tail:
    """The highest non-mated scores, descending; `rate(t)` is the sum of the shares of the hits at or above t.

    Attributes:
        scores_E: scores, down to a floor below which nothing was kept.
        shares_E: what each hit adds to the rate: 1 / trials, or less where a trial stands for several.
        first_E: the subject that was compared or searched; second_E: the one that answered. 0 ... S - 1.
        enrolled_E: the enrolled entry that answered: a subject is another entry in each of the galleries.
        probe_mass_S, gallery_mass_S: comparisons are made in proportion to probe_mass[a] x gallery_mass[b], a != b.
        trials: non-mated pairs or probes that the rate is a share of.
        galleries: how many galleries the shares are averaged over.
    """

    scores_E: Numbers
    shares_E: Numbers
    first_E: Labels
    second_E: Labels
    enrolled_E: Labels
    probe_mass_S: Numbers
    gallery_mass_S: Numbers
    trials: int
    galleries: int

    def rate(self, threshold: float) -> float:
        """The share of the trials with a score at or above the threshold."""
        return float(self.shares_E[: self.hits(threshold)].sum())

    def hits(self, threshold: float) -> int:
        """How many entries are at or above the threshold."""
        return int(np.searchsorted(-self.scores_E, -threshold, side="right"))

    def quantile(self, rate: float) -> float:
        """The lowest threshold on the grid whose rate is at most `rate`, which must lie within the tail."""
        rejected = int(np.searchsorted(np.cumsum(self.shares_E), rate * (1 + 1e-9), side="right"))
        return above(float(self.scores_E[min(rejected, len(self.scores_E) - 1)]))

    def first(self, count: int) -> "Tail":
        """The highest `count` hits."""
        names = ("scores_E", "shares_E", "first_E", "second_E", "enrolled_E")
        return replace(self, **{name: getattr(self, name)[:count] for name in names})


@dataclass(frozen=True, slots=True)
class Pareto:
    """A generalised Pareto tail: rate(t) = rate(u) (1 + shape (x(t) - x(u)) / scale)^(-1 / shape) for t >= u.

    Pickands (1975), Balkema and de Haan (1974): what lies above a high threshold u of almost any distribution tends to
    this form. It is fitted to the strength x(t) = -log(1 - t^2) of a score: for directions that are alike the chance of
    a cosine above t falls as (1 - t^2)^((D - 1) / 2), which is exponential in x, of shape 0. In the cosine itself the
    tail bends towards its end at 1, and a fit reaches for the bend and gives thresholds that are too low.
    """

    start: float
    start_rate: float
    shape: float
    scale: float

    def rate(self, threshold: float) -> float:
        """The rate at or above a threshold; 0 beyond the end of a tail of negative shape."""
        excess = strength(threshold) - strength(self.start)
        return float(pareto_rate(self.start_rate, self.shape, self.scale, excess))

    def quantile(self, rate: float) -> float:
        """The lowest threshold on the grid whose rate is at most `rate` (at most `start_rate`)."""
        decay = np.log(self.start_rate / rate)
        excess = decay if abs(self.shape) < 1e-9 else np.expm1(self.shape * decay) / self.shape
        reached = float(strength(self.start)) + self.scale * float(excess)
        return ceil_to_grid(float(np.copysign(np.sqrt(-np.expm1(-abs(reached))), reached)))


def strength(scores: Numbers | float) -> Numbers:
    """-log(1 - score^2), with the sign of the score; at most 16, which is a score within rounding of 1."""
    return np.asarray(np.copysign(np.log(np.maximum(1 - np.square(scores), np.exp(-16.0))), scores), dtype=np.float64)


def pareto_rate(
    start_rate: Numbers | float, shape: Numbers | float, scale: Numbers | float, excess: Numbers
) -> Numbers:
    """The tail function of `Pareto`, elementwise; the exponential one where the shape is within 1e-9 of 0."""
    safe = np.where(np.abs(shape) < 1e-9, 1e-9, shape)
    inside = 1 + safe * excess / scale
    with np.errstate(over="ignore"):  # a tail that ended far below: exp(-inf) = 0 is meant
        return np.asarray(np.where(inside > 0, start_rate * np.exp(-np.log(np.maximum(inside, 1e-300)) / safe), 0.0))


def pareto_moments(excess_E: Numbers, weights_RE: Numbers) -> tuple[Numbers, Numbers]:
    """Shape and scale by probability-weighted moments (Hosking and Wallis 1987, Technometrics 29), one fit a row.

    a0 = E[y], a1 = E[y (1 - F(y))], shape = 2 - a0 / (a0 - 2 a1), scale = 2 a0 a1 / (a0 - 2 a1). Consistent for shapes
    below 1/2, and better than maximum likelihood in samples up to some hundreds.

    Args:
        excess_E: the strength that each hit has above the start, descending.
        weights_RE: the weight of each hit in each fit, non-negative.
    """
    mass_R = weights_RE.sum(axis=1)
    above_RE = np.cumsum(weights_RE, axis=1) - weights_RE / 2  # 1 - F(y), a tie or a hit itself counting half
    a0_R = weights_RE @ excess_E / mass_R
    a1_R = np.einsum("re,re,e->r", weights_RE, above_RE, excess_E) / mass_R**2
    gap_R = np.maximum(a0_R - 2 * a1_R, LEAST)  # above 0, but for hits that all tie
    return 2 - a0_R / gap_R, np.maximum(2 * a0_R * a1_R / gap_R, LEAST)


def fit(tail: Tail) -> Pareto:
    """The generalised Pareto tail that starts at the lowest score of `tail`."""
    start = float(tail.scores_E[-1])
    shape_1, scale_1 = pareto_moments(strength(tail.scores_E) - strength(start), tail.shares_E[None])
    return Pareto(start, float(tail.shares_E.sum()), float(shape_1[0]), float(scale_1[0]))


@dataclass(frozen=True, slots=True)
class Spread:
    """How the variance of a rate splits: by subjects, by single pairs of subjects, and by who is enrolled.

    Attributes:
        subjects: sum of squared influences of the subjects, in both roles. It counts the pairs' own noise twice.
        pairs: sum of squared contributions of the pairs of subjects.
        gallery: variance of the rate between galleries of as many subjects as are at hand, as if probes were endless:
            between the enrolled entries, the noise of their pairs taken off.
    """

    subjects: float
    pairs: float
    gallery: float

    @property
    def shrinkage(self) -> float:
        """The factor k for which weights (1 + k (w_a - 1)) (1 + k (w_b - 1)) have the variance subjects - pairs.

        Resampling subjects with product weights counts the noise of single pairs three times (Owen 2007, "The
        pigeonhole bootstrap"); two-way clustering counts it once: by-first + by-second - by-pair (Cameron, Gelbach and
        Miller 2011). The product's variance is k^2 subjects + k^4 pairs.
        """
        if self.subjects <= 0:
            return 1.0
        share = min(self.pairs / self.subjects, 0.5)
        return float(np.sqrt(1 - share if share < 1e-9 else (np.sqrt(1 + 4 * share * (1 - share)) - 1) / (2 * share)))


def spread(tail: Tail) -> Spread:
    """Variance components of `tail`'s whole rate."""
    subjects = len(tail.probe_mass_S)
    total = float(tail.shares_E.sum())
    first_S = np.bincount(tail.first_E, weights=tail.shares_E, minlength=subjects)
    second_S = np.bincount(tail.second_E, weights=tail.shares_E, minlength=subjects)
    low, high = np.minimum(tail.first_E, tail.second_E), np.maximum(tail.first_E, tail.second_E)
    pairs = _squares(low * subjects + high, tail.shares_E)
    searched_S = total * tail.probe_mass_S / tail.probe_mass_S.sum()
    answered_S = total * tail.gallery_mass_S / tail.gallery_mass_S.sum()
    influence_S = first_S - searched_S + second_S - answered_S
    entries = tail.galleries * float(tail.gallery_mass_S.sum())
    between = _squares(tail.enrolled_E, tail.shares_E) - total**2 / entries
    noise = _squares(tail.enrolled_E * subjects + tail.first_E, tail.shares_E)
    return Spread(float(np.square(influence_S).sum()), pairs, max(tail.galleries * (between - noise), 0.0))


def _squares(group_E: Labels, shares_E: Numbers) -> float:
    """Sum over groups of the squared sum of their shares."""
    _, index_E = np.unique(group_E, return_inverse=True)
    return float(np.square(np.bincount(index_E, weights=shares_E)).sum())


def replicate_rates(
    tail: Tail, threshold: float, generator: np.random.Generator, replicates: int, start: float | None
) -> Numbers:
    """The rate at a fixed threshold in bootstrap replicates over subjects: [R].

    With `start` the generalised Pareto tail above it is fitted anew in each replicate; without, hits are counted.
    """
    count = tail.hits(threshold if start is None else start)
    if count == 0:
        return np.zeros(replicates)
    used = tail.first(count)
    shrinkage = spread(used).shrinkage
    rates = []
    rows = max(1, CHUNK // count)
    for done in range(0, replicates, rows):
        drawn_RS = subject_weights(generator, len(tail.probe_mass_S), min(rows, replicates - done))
        weights_RS = 1 + shrinkage * (drawn_RS - 1)
        weights_RE = weights_RS[:, used.first_E] * weights_RS[:, used.second_E] * used.shares_E
        rate_R = weights_RE.sum(axis=1)
        if start is not None:
            moments = pareto_moments(strength(used.scores_E) - strength(start), weights_RE)
            rate_R = pareto_rate(rate_R, *moments, strength(threshold) - strength(start))
        rates.append(rate_R / _exposure(weights_RS, tail))
    return np.concatenate(rates)


def _exposure(weights_RS: Numbers, tail: Tail) -> Numbers:
    """Comparisons between different subjects in each replicate, as a multiple of those at hand."""
    searched_RS = weights_RS * tail.probe_mass_S
    answered_RS = weights_RS * tail.gallery_mass_S
    made_R = searched_RS.sum(axis=1) * answered_RS.sum(axis=1) - (searched_RS * answered_RS).sum(axis=1)
    at_hand = tail.probe_mass_S.sum() * tail.gallery_mass_S.sum() - (tail.probe_mass_S * tail.gallery_mass_S).sum()
    return np.asarray(made_R / at_hand, dtype=np.float64)


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
    pareto: Pareto | None = None

    def threshold(self, rate: float) -> float:
        """The lowest threshold on the grid that keeps the rate: the tail's is 1 - (1 - rate)^(1 / growth)."""
        return (self.pareto or self.tail).quantile(grown(rate, 1 / self.growth))

    def interval(self, threshold: float, seed: int) -> tuple[float, float]:
        """Where the rate at a threshold lies, at 95 % confidence."""
        generator = np.random.default_rng([seed, 4])
        start = None if self.pareto is None else self.pareto.start
        rates_R = replicate_rates(self.tail, threshold, generator, REPLICATES, start)
        used = self.tail.first(self.tail.hits(threshold if start is None else start))
        between = spread(used).gallery / max(float(used.shares_E.sum()), 1e-300) ** 2 * self.galleries
        if between > 0:
            rates_R = rates_R * generator.gamma(1 / between, between, size=REPLICATES)
        low, high = score_interval((self.pareto or self.tail).rate(threshold), float(rates_R.var()))
        return grown(low, self.growth), grown(high, self.growth)

    def extended(self) -> "NonMated":
        """The same with a generalised Pareto tail fitted to the highest scores."""
        count = np.searchsorted(np.cumsum(self.tail.shares_E), fitted_share(self.tail.trials), side="right")
        top = self.tail.first(max(2, int(count)))
        return replace(self, tail=top, pareto=fit(top))


def grown(rate: float, growth: float) -> float:
    """1 - (1 - rate)^growth."""
    return float(-np.expm1(np.log1p(-min(rate, 1 - 1e-12)) * growth))


def fitted_share(trials: float) -> float:
    """The share of trials that a tail is fitted to: a tenth, at least 100 trials (or a quarter), at most 2000."""
    return min(max(0.1 * trials, min(100.0, 0.25 * trials)), 2000.0) / trials
