"""The Curve: from gallery size and allowed rate to a threshold and its interval, in closed form.

A score s has the strength x = -log(1 - s^2): for directions that are alike the chance of a cosine above s falls as
(1 - s^2)^((D - 1) / 2) times a slow factor, so tails are nearly exponential in x. With y = x - x(start), z = y / scale,

    FMR(y)    = share (1 + shape z)^(-1 / shape)               one probe against one enrolled subject (1)
    hits      = N FMR                                          expected in a search of N subjects     (2)
    FPIR(N)   = 1 - (1 + c hits)^(-1 / c)                      c: clumping of hits in probes          (3)

(3) is E[1 - exp(-hits a)] for probes whose rates vary by a gamma factor a of mean 1 and variance c (negative binomial:
some probes resemble many). c = 0 gives 1 - exp(-hits), which is 1 - (1 - FMR)^N. The variance of log hits in a real
gallery of N, with g = (1, d log FMR / d log scale, d log FMR / d shape), has four parts:

    subjects  g' S g - g' P g     subjects at hand resampled in both roles, the noise of pairs counted once
    prior     (g' p)^2            what the prior of the shape, N(0.02, 0.1^2), may be wrong by
    lift      4 (v(y) - v(0)) / S what subjects' rates differ more at y than at the start
    gallery   v_g(y) / N          who happens to be enrolled

v is the squared coefficient of variation of subjects' rates. A wolf is nearer to others by an angle, which multiplies
its rate by exp(angle x hazard): log(1 + v) grows with the square of the hazard, the slope of log FMR in the angle.
The log rate is taken as Student's
t about log(hits) + 0.35 of the part `subjects`: the log of a small count is too low on average. At the threshold, the
*expected* rate is the target: with the median there, the rate would on average be exp(variance / 2) times the target.
The upper end allows for one more subject like the one that counts most (Fay and Feuer 1997): where few make the rate,
as relatives and wolves do, those that were not met are what is missing.
Where the four parts come from is in `tails.py`, what was measured in docs/calibration.md. Axes: 3 of g.
"""

from dataclasses import dataclass
from math import copysign, exp, expm1, inf, log, log1p, sqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from trainer.errors import UserError
from trainer.evaluation.scores import ceil_to_grid
from trainer.strict import Strict

Numbers = NDArray[np.float64]
Matrix = tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]]

CONFIDENCE = 0.95
HIGHEST_RATE = 0.2  # a threshold that is wrong more often than this is none
LEAST_HITS = 1.0  # false positives to expect among the probes at hand; below, the answer rests on the model alone
PRIOR_MEAN, PRIOR_DEVIATION = 0.02, 0.1  # of the shape; in four kinds of embeddings it was -0.03 to 0.06
STRONGEST = 16.0  # -log(1 - s^2) of a score within rounding of 1
MOST_LIFT = 12.0  # times that log(1 + v) may grow
MOST_VARIANCE = 4.0  # of a log rate; the interval then spans more than three powers of ten
BIAS = 0.35  # b over the sampling variance: less than half, for a part of that variance is not of counts
_SMALL = 1e-6


@dataclass(frozen=True, slots=True)
class Reached:
    """A threshold, and where the rate that it reaches lies: at 95 % confidence, for one real gallery of N.

    `expected_hits`: false positives expected at the target among the probes at hand, in a gallery of those at hand.
    """

    value: float
    low: float
    high: float
    expected_hits: float


class Curve(Strict):
    """See the top of the file. `start` is a score; `matches` are of one probe with one enrolled subject."""

    target: Literal["FMR", "FPIR"]
    start: float = Field(ge=-1, le=1)
    share: float = Field(gt=0, lt=1, description="of matches with a score at or above the start")
    scale: float = Field(gt=0)
    shape: float = Field(gt=-1, lt=1)
    clumping: float = Field(ge=0)
    by_subjects: Matrix
    by_pairs: Matrix
    by_prior: tuple[float, float]
    dominance: float = Field(
        ge=0, le=1, description="share of one subject in g' S g, where FMR is exp(-3) of the start's"
    )
    subjects_vary: float = Field(ge=0, description="v(0), subjects in both roles")
    gallery_varies: float = Field(ge=0, description="v_g(0), enrolled subjects alone; 0: rates are of no gallery")
    freedom: float = Field(gt=0, description="degrees of freedom of the part `subjects`")
    subjects: int = Field(ge=2)
    trials: int = Field(ge=2, description="non-mated probes (FPIR) or pairs (FMR)")
    samples_per_subject: int = Field(1, ge=1, description="enrolled of each subject")

    def at(self, gallery_size: int, rate: float, least_hits: float = LEAST_HITS) -> Reached:
        """The lowest threshold whose expected rate in a gallery of `gallery_size` is at most `rate`.

        Raises:
            UserError: a rate or size that is not allowed, or fewer than `least_hits` expected hits.
        """
        if not 0 < rate <= HIGHEST_RATE:
            raise UserError(
                f"{self.target} {rate:g} is not a target; choose a rate above 0 and at most {HIGHEST_RATE:g}"
            )
        if gallery_size < 1:
            raise UserError(f"a gallery of {gallery_size} subjects cannot be searched; its size is 1 or more")
        expected = self.expected_hits(gallery_size, rate)
        if expected < least_hits:
            raise UserError(self._too_few(gallery_size, rate, expected))
        target, level = log(self._hits(rate)), log(gallery_size * self.share)
        variance = bias = excess = unseen = 0.0
        for _ in range(8):
            excess = self.excess(level - target + variance / 2 + bias)
            sampling, rest, unseen = self.variances(excess, gallery_size)
            variance, bias = min(sampling + rest, MOST_VARIANCE), BIAS * min(sampling, MOST_VARIANCE)
        quantile = student(self.freedom * (variance / max(variance - self._known(excess), 1e-12)) ** 2)
        low = self._rate(exp(target - variance / 2 - quantile * sqrt(variance)))
        high = self._rate(exp(target - variance / 2 + quantile * sqrt(variance + min(unseen, MOST_VARIANCE))))
        return Reached(ceil_to_grid(score_of(float(strength(self.start)) + excess)), low, high, expected)

    def rate_at(self, threshold: float, gallery_size: int) -> float:
        """FPIR of a gallery of this size at a threshold, the best guess; at the start's rate below the start."""
        excess = max(float(strength(threshold)) - float(strength(self.start)), 0.0)
        return self._rate(gallery_size * self.share * exp(self._log_survival(excess)))

    def largest(self, rate: float, least_hits: float = LEAST_HITS) -> int:
        """The largest gallery for which `least_hits` are expected at a rate."""
        return max(1, int((self.subjects - 1) * self._hits(rate) / self._hits(min(least_hits / self.trials, 0.999))))

    def expected_hits(self, gallery_size: int, rate: float) -> float:
        """False positives among the probes at hand at the threshold for `rate`, if they searched all at hand."""
        return self.trials * self._rate(self._hits(rate) * min(1.0, (self.subjects - 1) / gallery_size))

    def _too_few(self, gallery_size: int, rate: float, expected: float) -> str:
        needed = int(np.ceil(self.subjects / sqrt(expected / LEAST_HITS)))
        trials, where = ("pairs", "") if self.target == "FMR" else ("probes", f" with {gallery_size} enrolled")
        return (
            f"{self.trials} non-mated {trials} of {self.subjects} subjects cannot tell {self.target} {rate:g}{where}: "
            f"{expected:.2g} false positives are expected, and it takes {LEAST_HITS:g}; take about {needed} subjects "
            "like these, a higher rate or a smaller gallery, or allow extrapolation"
        )

    def _hits(self, rate: float) -> float:
        """Expected hits of a search at an FPIR: the inverse of (3)."""
        c, safe = self.clumping, -log1p(-min(rate, 1 - 1e-12))
        return safe if c < _SMALL else expm1(c * safe) / c

    def _rate(self, hits: float) -> float:
        c = self.clumping
        return -expm1(-hits) if c < _SMALL else -expm1(-log1p(c * hits) / c)

    def excess(self, decay: float) -> float:
        """Strength above the start at which FMR is exp(-decay) of the share there."""
        decay = max(decay, 0.0)
        return self.scale * (decay if abs(self.shape) < _SMALL else expm1(min(self.shape * decay, 50.0)) / self.shape)

    def _log_survival(self, excess: float) -> float:
        z = excess / self.scale
        if abs(self.shape) < _SMALL:
            return -z
        return -log1p(self.shape * z) / self.shape if self.shape * z > -1 else -inf

    def gradient(self, excess: float) -> Numbers:
        """g: the derivatives of log FMR by its logarithm of the share, of the scale, and by the shape."""
        z, xi = excess / self.scale, self.shape
        inside = max(1 + xi * z, 1e-9)
        by_shape = z * z / 2 if abs(xi) < 1e-4 else log(inside) / xi**2 - z / xi / inside
        return np.array([1.0, z / inside, by_shape])

    def variances(self, excess: float, gallery_size: int) -> tuple[float, float, float]:
        """The part `subjects` of the variance of log hits, the sum of the others, and of one subject more."""
        g = self.gradient(excess)
        subjects, pairs = float(g @ np.array(self.by_subjects) @ g), float(g @ np.array(self.by_pairs) @ g)
        lift = 4 / self.subjects * (self.lifted(self.subjects_vary, excess) - self.subjects_vary)
        gallery = self.lifted(self.gallery_varies, excess) / gallery_size
        return max(subjects - pairs, pairs), self._known(excess) + lift + gallery, self.dominance * subjects

    def _known(self, excess: float) -> float:
        return float(self.gradient(excess)[1:] @ np.array(self.by_prior)) ** 2

    def lifted(self, varies: float, excess: float) -> float:
        """v(y) from v(0)."""
        growth = (self._hazard(excess) / max(self._hazard(0.0), 1e-9)) ** 2
        return expm1(min(log1p(varies) * min(max(growth, 1.0), MOST_LIFT), MOST_VARIANCE))

    def _hazard(self, excess: float) -> float:
        """-d log FMR / d angle, with score = cos(angle)."""
        score = score_of(float(strength(self.start)) + excess)
        return 2 * abs(score) / max(sqrt(1 - score**2), 1e-3) / max(self.scale + self.shape * excess, 1e-9)


def strength(scores: Numbers | float) -> Numbers:
    """-log(1 - score^2), with the sign of the score; at most 16, which is a score within rounding of 1."""
    sizes = np.log(np.maximum(1 - np.square(scores), np.exp(-STRONGEST)))
    return np.asarray(np.copysign(sizes, scores), dtype=np.float64)


def score_of(reached: float) -> float:
    """The inverse of `strength`."""
    return copysign(sqrt(-expm1(-abs(reached))), reached)


def student(freedom: float) -> float:
    """The 97.5 % quantile of Student's t, within 0.3 % from 3 degrees of freedom on; with fewer it is that of 3.

    The expansion of Fisher and Cornish (1960) in 1 / freedom about the normal quantile z.
    """
    z, n = 1.959964, max(freedom, 3.0)
    terms = (
        z,
        (z**3 + z) / (4 * n),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3),
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4),
    )
    return sum(terms)
