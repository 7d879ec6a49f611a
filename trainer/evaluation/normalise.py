"""Score normalisation by a cohort: how unusual a score is for the probe, for the enrolled sample, or for both.

A cohort are vectors of K subjects who are neither enrolled nor searched for. With mu_p, sigma_p the mean and standard
deviation of the scores of a probe p with the cohort, and mu_g, sigma_g those of an enrolled sample g,

    z   (s - mu_g) / sigma_g                Z-norm: takes off what an enrolled wolf has in common with all
    t   (s - mu_p) / sigma_p                T-norm (Auckenthaler et al. 2000): the same for the probe
    s   the mean of both                    S-norm (Kenny 2010)
    as  s, with each one's `top` nearest    adaptive S-norm (Cumani et al. 2011; Matejka et al. 2017)
    csls   s, with the means of each one's nearest, and without dividing    CSLS (Conneau et al. 2018, eq. 3, halved)

Each is a dot product of two longer vectors, so that an exact index searches normalised scores as it does cosines:
s / sigma_g - mu_g / sigma_g = (p, 1) . (g / sigma_g, -mu_g / sigma_g), and likewise for the probe. The result is scaled
by half the cohort's own standard deviation and moved to its mean, so that it lies where cosines do.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from trainer.errors import UserError
from trainer.evaluation.scores import Labels, Roles, Vectors, check

Kind = Literal["z", "t", "s", "as", "csls"]

FEWEST = 20  # vectors of a cohort
TOP = {"as": 100, "csls": 50}  # nearest of the cohort; at most half of it
LEAST_DEVIATION = 1e-3  # of a vector's scores with the cohort; less is a cohort of copies


@dataclass(frozen=True, slots=True)
class Normaliser:
    """Normalised score of p with g: `probes(p) @ enrolled(g)`."""

    kind: Kind
    cohort_KD: Vectors
    place: tuple[float, float] = field(init=False)  # where scores are moved to: the cohort's mean, half its deviation

    def __post_init__(self) -> None:
        if len(self.cohort_KD) < FEWEST:
            raise UserError(f"a cohort of {len(self.cohort_KD)} vectors is too small to normalise by; take {FEWEST}")
        check(self.cohort_KD, np.arange(len(self.cohort_KD)))
        scores_KK = self.cohort_KD @ self.cohort_KD.T
        others = scores_KK[~np.eye(len(scores_KK), dtype=bool)]
        object.__setattr__(self, "place", (float(others.mean()), max(float(others.std()), LEAST_DEVIATION) / 2))

    @property
    def width(self) -> int:
        """Length of the vectors that `probes` and `enrolled` give for those of length D."""
        return (1 if self.kind in ("z", "t") else 2) * (int(self.cohort_KD.shape[1]) + 1)

    def probes(self, x_BD: Vectors) -> Vectors:
        """[B, width] of unit vectors [B, D] that search."""
        return self._joined(self._normalised(x_BD), _with_one(x_BD))

    def enrolled(self, x_BD: Vectors) -> Vectors:
        """[B, width] of unit vectors [B, D] that are searched."""
        joined = self._joined(_with_one(x_BD), self._normalised(x_BD))
        return np.asarray(joined if self.kind in ("z", "t") else joined / 2, np.float32)

    def _joined(self, by_probe: Vectors, by_enrolled: Vectors) -> Vectors:
        parts = {"t": [by_probe], "z": [by_enrolled]}.get(self.kind, [by_probe, by_enrolled])
        return np.ascontiguousarray(np.hstack(parts), np.float32)

    def _normalised(self, x_BD: Vectors) -> Vectors:
        """[B, D + 1], whose product with (y, 1) is the score of x with y in units of x's scores with the cohort."""
        mean, scale = self.place
        own_B2 = self._statistics(x_BD)
        return np.hstack([scale * x_BD / own_B2[:, 1:], mean - scale * own_B2[:, :1] / own_B2[:, 1:]])

    def _statistics(self, x_BD: Vectors) -> Vectors:
        """Mean and standard deviation of each vector's scores with the cohort, or with the nearest of it: [B, 2]."""
        scores_BK = np.asarray(x_BD, np.float32) @ self.cohort_KD.T
        if self.kind in TOP:
            top = min(TOP[self.kind], len(self.cohort_KD) // 2)
            scores_BK = np.partition(scores_BK, -top, axis=1)[:, -top:]
        deviation_B = np.full(len(scores_BK), self.place[1]) if self.kind == "csls" else scores_BK.std(axis=1)
        return np.column_stack([scores_BK.mean(axis=1), np.maximum(deviation_B, LEAST_DEVIATION)])


def roles_of(vectors_ND: Vectors, normaliser: Normaliser | None) -> Roles:
    """The samples as they search, and as they are enrolled: a score is a dot product of one of each."""
    if normaliser is None:
        return vectors_ND, vectors_ND
    return normaliser.probes(vectors_ND), normaliser.enrolled(vectors_ND)


def apart_from(cohort_KD: Vectors, vectors_ND: Vectors, labels_N: Labels) -> Labels:
    """Rows of the subjects of whom no sample is in the cohort."""
    copies_N = (vectors_ND @ cohort_KD.T).max(axis=1) >= 1 - 1e-6
    return np.flatnonzero(~np.isin(labels_N, labels_N[copies_N]))


def _with_one(x_BD: Vectors) -> Vectors:
    return np.hstack([x_BD, np.ones((len(x_BD), 1), np.float32)])


def set_aside(labels_N: Labels, share: float, most: int, seed: int) -> tuple[Labels, Labels]:
    """Rows of a cohort, one sample of each of some subjects, and the rows of all other subjects."""
    generator = np.random.default_rng([seed, 7])
    subjects = generator.permutation(np.unique(labels_N))
    chosen = subjects[: min(most, int(share * len(subjects)))]
    first = {int(label): row for row, label in reversed(list(enumerate(labels_N)))}
    cohort = np.array(sorted(first[int(label)] for label in chosen), np.int64)
    return cohort, np.flatnonzero(~np.isin(labels_N, chosen))
