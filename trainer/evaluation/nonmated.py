"""The highest non-mated scores: every sample searches galleries that hold everyone but its own subject.

Axes as in `scores.py`; E hits, S subjects.
"""

from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from trainer.evaluation.scores import Labels, Vectors, identity_scores

Numbers = NDArray[np.float64]

ROUNDS = 4  # galleries, each of another enrolled sample of every subject
ONE_ROUND = 10_000  # probes from which one gallery is enough


@dataclass(frozen=True, slots=True)
class Hits:
    """The highest scores of probes with subjects that are not theirs, descending.

    Attributes:
        scores_E: scores.
        probe_E: who searched: the sample. first_E: its subject. second_E: the subject that answered.
        turn_E: in which of the galleries.
        probes_S: samples of each subject, all of which search each gallery.
        galleries: how many, each of all S subjects.
        samples_per_subject: enrolled of each.
    """

    scores_E: Numbers
    probe_E: Labels
    first_E: Labels
    second_E: Labels
    turn_E: Labels
    probes_S: Labels
    galleries: int
    samples_per_subject: int

    @property
    def subjects(self) -> int:
        return len(self.probes_S)

    @property
    def probes(self) -> int:
        return int(self.probes_S.sum())

    @property
    def comparisons(self) -> int:
        """Of a probe with a subject that is not its own."""
        return self.galleries * self.probes * (self.subjects - 1)

    def pairs_of(self, count: float) -> int:
        """How many entries `count` pairs of subjects have, if all samples of both meet in both directions."""
        return min(len(self.scores_E), max(2, ceil(2 * count * self.galleries * self.probes / self.subjects)))


def highest(
    vectors_ND: Vectors,
    labels_N: Labels,
    samples_per_subject: int,
    pairs: float,
    seed: int,
    enrolled_NE: Vectors | None = None,
) -> Hits:
    """The scores that reach highest: as many as `pairs` pairs of subjects have (see `Hits.pairs_of`).

    Args:
        enrolled_NE: the samples as they are enrolled, where that is not as they search (see `normalise.py`).
    """
    enrolled_NE = vectors_ND if enrolled_NE is None else enrolled_NE
    generator = np.random.default_rng([seed, 3])
    _, subject_N, probes_S = np.unique(labels_N, return_inverse=True, return_counts=True)
    probes, subjects = len(labels_N), len(probes_S)
    rounds = min(ROUNDS if probes < ONE_ROUND else 1, max(1, int(np.median(probes_S)) // samples_per_subject))
    wanted = min(ceil(2 * pairs * rounds * probes / subjects), rounds * probes * (subjects - 1))
    kept, floor = [np.empty((5, 0))], -np.inf
    order_N, place_N = shuffled(subject_N, generator)
    for turn in range(rounds):
        turned_N = (place_N - turn * samples_per_subject) % probes_S[subject_N[order_N]]
        rows_G = order_N[turned_N < samples_per_subject]
        for part, scores_bS in identity_scores(vectors_ND, enrolled_NE[rows_G], subject_N[rows_G]):
            mine_b = subject_N[part]
            scores_bS[np.arange(len(mine_b)), mine_b] = -np.inf
            floor = max(floor, _floor(scores_bS[scores_bS >= floor], wanted))
            row_e, column_e = np.nonzero((scores_bS >= floor) & (scores_bS > -2))
            new = [scores_bS[row_e, column_e], part.start + row_e, mine_b[row_e], column_e, np.full(len(row_e), turn)]
            kept.append(np.stack([column.astype(np.float64) for column in new]))
            if sum(found.shape[1] for found in kept) > 2 * wanted:
                kept = [_top(kept, wanted)]
                floor = max(floor, float(kept[0][0, -1]))
    scores_E, *others = _top(kept, wanted)
    probe_E, first_E, second_E, turn_E = (column_E.astype(np.int64) for column_E in others)
    return Hits(scores_E, probe_E, first_E, second_E, turn_E, probes_S, rounds, samples_per_subject)


def shuffled(labels_N: Labels, generator: np.random.Generator) -> tuple[Labels, Labels]:
    """Rows in order of label, shuffled within each, and the place of each among its label's: 0, 1, ..."""
    order_N = generator.permutation(len(labels_N))
    order_N = order_N[np.argsort(labels_N[order_N], kind="stable")]
    sorted_N = labels_N[order_N]
    return order_N, np.arange(len(sorted_N)) - np.searchsorted(sorted_N, sorted_N)


def _floor(scores_e: Vectors, wanted: int) -> float:
    """The lowest of the `wanted` highest, below which nothing can be among them."""
    if len(scores_e) <= wanted:
        return -np.inf
    return float(np.partition(scores_e, len(scores_e) - wanted)[len(scores_e) - wanted])


def _top(kept: list[Numbers], wanted: int) -> Numbers:
    """The `wanted` columns of the highest scores, descending, in an order that the blocks do not decide."""
    all_5E = np.concatenate(kept, axis=1)
    return all_5E[:, np.lexsort((all_5E[3], all_5E[1], all_5E[4], -all_5E[0]))[:wanted]]
