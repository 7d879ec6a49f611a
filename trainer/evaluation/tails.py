"""The tail of non-mated scores, fitted, with the influence of every subject and pair of subjects on it: a `Curve`.

Every false positive has two subjects: the one who searched and the one who answered. Both vary (Doddington et al. 1998:
"wolves" are taken for many), so hits that share either subject are not independent. To first order a rate is a sum
over hits, hence over subjects and over pairs of subjects (Hoeffding 1948). With c_ab the influence of a pair and
U_a = sum of the c that subject a has a part in, in either role, the variance of the sum is

    sum_a U_a^2 - sum_ab c_ab^2,

which is what the two-way bootstrap over subjects tends to (Owen 2007, "The pigeonhole bootstrap") with the noise of
single pairs counted once (Cameron, Gelbach and Miller 2011). No resampling is needed, and no seed.

Shape and scale are the maximum of the generalised Pareto likelihood (Pickands 1975) times a normal prior of the shape,
the likelihood tempered to as many hits as there are independent ones (composite likelihood with magnitude adjustment;
Pauli, Racugno and Ventura 2011). Axes: E hits, S subjects, U pairs of subjects, 2 of (log scale, shape).
"""

from dataclasses import dataclass
from math import erfc, sqrt
from typing import Literal

import numpy as np

from trainer.errors import UserError
from trainer.evaluation.curve import PRIOR_DEVIATION, PRIOR_MEAN, Curve, Numbers, strength
from trainer.evaluation.nonmated import Hits
from trainer.evaluation.scores import Labels

ENDS = 0.45  # of the shape: the moments that the influences rest on exist
LEVELS = (1 / 2, 1 / 4, 1 / 8, 1 / 16)  # shares of the fitted hits at which the fit is compared with them


@dataclass(frozen=True, slots=True)
class Tail:
    """A fit: its Curve, and `misfit`, the probability of data that part from it as far as these, if it were true."""

    curve: Curve
    misfit: float


@dataclass(frozen=True, slots=True)
class _Roles:
    """Which subjects and which pair of subjects each hit belongs to. `pairs`: how many different ones."""

    first_E: Labels
    second_E: Labels
    pair_E: Labels
    subjects: int
    pairs: int

    def by_pair(self, values_E: Numbers) -> Numbers:
        return np.bincount(self.pair_E, weights=values_E, minlength=self.pairs).astype(np.float64)

    def by_subject(self, values_E: Numbers) -> Numbers:
        """Sums over both roles."""
        return np.asarray(
            np.bincount(self.first_E, weights=values_E, minlength=self.subjects)
            + np.bincount(self.second_E, weights=values_E, minlength=self.subjects)
        )

    def variance(self, values_E: Numbers) -> float:
        """Of the sum of values that are 0 in the mean."""
        pairs = float(np.square(self.by_pair(values_E)).sum())
        return max(float(np.square(self.by_subject(values_E)).sum()) - pairs, pairs)


def fit(hits: Hits, pairs: float, target: Literal["FMR", "FPIR"]) -> Tail:
    """The Curve of the highest scores, of as many as `pairs` pairs of subjects have.

    Raises:
        UserError: the highest scores are all equal.
    """
    count = hits.pairs_of(pairs)
    scores_E, first_E, second_E = hits.scores_E[:count], hits.first_E[:count], hits.second_E[:count]
    excess_E = strength(scores_E) - strength(scores_E[-1])
    if not excess_E.mean() > 1e-9:
        raise UserError(
            f"the {count} highest non-mated scores are all {scores_E[0]:.4g}: no threshold tells them apart; look for "
            "duplicates, wrong labels or collapsed embeddings"
        )
    keys_E = np.minimum(first_E, second_E) * hits.subjects + np.maximum(first_E, second_E)
    different, pair_E = np.unique(keys_E, return_inverse=True)
    roles = _Roles(first_E, second_E, pair_E, hits.subjects, len(different))
    independent = float(roles.pairs)
    for _ in range(2):
        log_scale, shape = _mode(excess_E, independent)
        by_shape_E = scores_of(excess_E / np.exp(log_scale), shape)[:, 1]
        independent = min(roles.pairs, information(shape)[1, 1] / max(roles.variance(by_shape_E / count), 1e-12))
    inverse = np.linalg.inv(_precision(independent, shape))
    errors_E2 = independent * scores_of(excess_E / np.exp(log_scale), shape) @ inverse
    influence_E3 = np.column_stack([np.ones(count), errors_E2]) / count
    parts = _variation(hits, count, roles, target == "FPIR")
    curve = Curve.model_validate(
        {
            "target": target,
            "start": float(scores_E[-1]),
            "share": count / hits.comparisons,
            "scale": float(np.exp(log_scale)),
            "shape": shape,
            "by_prior": (inverse @ [0, 1 / PRIOR_DEVIATION]).tolist(),
            "subjects": hits.subjects,
            "trials": hits.probes if target == "FPIR" else int(hits.probes**2 - np.square(hits.probes_S).sum()) // 2,
            "samples_per_subject": hits.samples_per_subject,
            **parts,
            **_influences(influence_E3, roles, hits),
        }
    )
    return Tail(curve, _misfit(excess_E, curve, influence_E3, roles))


def information(shape: float) -> Numbers:
    """Fisher's information of one hit on (log scale, shape), for shapes above -1/2 (Smith 1984)."""
    off, double = 1 / ((1 + shape) * (1 + 2 * shape)), 1 / (1 + 2 * shape)
    return np.array([[double, off], [off, 2 * off]])


def scores_of(z_E: Numbers, shape: float) -> Numbers:
    """Derivatives of the log density of hits at z = excess / scale, by log scale and shape: [E, 2]."""
    inside_E = np.maximum(1 + shape * z_E, 1e-9)
    by_scale_E = (1 + shape) * z_E / inside_E - 1
    if abs(shape) < 1e-4:
        return np.column_stack([by_scale_E, z_E**2 / 2 - z_E])
    return np.column_stack([by_scale_E, np.log(inside_E) / shape**2 - (1 / shape + 1) * z_E / inside_E])


def _precision(independent: float, shape: float) -> Numbers:
    return independent * information(shape) + np.diag([0.0, PRIOR_DEVIATION**-2])


def _mode(excess_E: Numbers, independent: float) -> tuple[float, float]:
    """Log scale and shape of the highest posterior density, by Fisher scoring."""
    log_scale, shape = float(np.log(excess_E.mean())), 0.0
    for _ in range(50):
        gradient = independent * scores_of(excess_E / np.exp(log_scale), shape).mean(axis=0)
        gradient[1] -= (shape - PRIOR_MEAN) / PRIOR_DEVIATION**2
        step = np.clip(np.linalg.solve(_precision(independent, shape), gradient), -0.3, 0.3)
        log_scale, shape = log_scale + float(step[0]), float(np.clip(shape + step[1], -ENDS, ENDS))
        if np.abs(step).max() < 1e-7:
            break
    return log_scale, shape


def _influences(influence_E3: Numbers, roles: _Roles, hits: Hits) -> dict[str, object]:
    """S and P of `curve.py`, the largest subject's share of S, and the degrees of freedom of S (Satterthwaite 1946)."""
    by_pair_U3 = np.column_stack([roles.by_pair(column_E) for column_E in influence_E3.T])
    by_subject_S3 = np.column_stack([roles.by_subject(column_E) for column_E in influence_E3.T])
    by_subject_S3[:, 0] -= hits.probes_S / hits.probes + 1 / hits.subjects  # comparisons that each has a part in
    few = hits.subjects / (hits.subjects - 1)
    g = np.array([1.0, 3.0, 4.5])  # the gradient where FMR is exp(-3) of the start's, at shape 0: thresholds are there
    squares_S = np.square(by_subject_S3 @ g)
    fourth = float(np.square(squares_S).sum() - squares_S.sum() ** 2 / hits.subjects)
    freedom = 2 * float(squares_S.sum()) ** 2 / max(fourth, 1e-300)
    return {
        "by_subjects": (few * by_subject_S3.T @ by_subject_S3).tolist(),
        "by_pairs": (few * by_pair_U3.T @ by_pair_U3).tolist(),
        "dominance": float(squares_S.max() / squares_S.sum()),
        "freedom": min(max(freedom, 1.0), 1e6),
    }


def _variation(hits: Hits, count: int, roles: _Roles, galleries: bool) -> dict[str, float]:
    """How much the rates of subjects, of enrolled entries and of probes differ, the noise of single pairs taken off."""
    subjects, rounds = hits.subjects, hits.galleries
    shares_E = np.full(count, 1 / count)
    influence_S = roles.by_subject(shares_E) - hits.probes_S / hits.probes - 1 / subjects
    noise = 2 * float(np.square(roles.by_pair(shares_E)).sum())
    both = subjects / 4 * max(float(np.square(influence_S).sum()) - noise, 0.0)
    if not galleries:
        return {"subjects_vary": both, "gallery_varies": 0.0, "clumping": 0.0}
    entry_E = roles.second_E * rounds + hits.turn_E[:count]
    between = _squares(entry_E, shares_E) - 1 / (subjects * rounds)
    noise = _squares(entry_E * subjects + roles.first_E, shares_E)
    found_P = np.bincount(hits.turn_E[:count] * hits.probes + hits.probe_E[:count], minlength=rounds * hits.probes)
    twice = float((found_P * (found_P - 1.0)).mean() / found_P.mean() ** 2) * (subjects - 1) / max(subjects - 2, 1)
    gallery = subjects * rounds * max(between - noise, 0.0)
    return {"subjects_vary": both, "gallery_varies": gallery, "clumping": max(twice - 1, 0.0)}


def _squares(group_E: Labels, shares_E: Numbers) -> float:
    """Sum over groups of the squared sum of their shares."""
    _, index_E = np.unique(group_E, return_inverse=True)
    return float(np.square(np.bincount(index_E, weights=shares_E)).sum())


def _misfit(excess_E: Numbers, curve: Curve, influence_E3: Numbers, roles: _Roles) -> float:
    """Compares the shares of hits above a half, a quarter, ... of the fitted ones with them, by two-sided normal tests.

    The smallest probability of the four, times four (Bonferroni). The variance takes in that scale and shape were
    fitted to the same hits, and that hits share subjects.
    """
    smallest = 1.0
    for level in LEVELS:
        excess = curve.excess(-np.log(level))
        reached_E = excess_E >= excess
        gradient = curve.gradient(excess)
        values_E = (reached_E - level) / len(excess_E) - level * influence_E3[:, 1:] @ gradient[1:]
        deviation = sqrt(max(roles.variance(values_E), 1e-12))
        smallest = min(smallest, erfc(abs(float(reached_E.mean()) - level) / deviation / sqrt(2)))
    return min(1.0, len(LEVELS) * smallest)
