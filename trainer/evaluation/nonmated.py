"""Tails of non-mated comparisons: all pairs, and searches of galleries that hold everyone but the probe's subject.

Axes as in `scores.py`; M subjects are at hand to be enrolled besides the probe's own, j counts a probe's candidates.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.evaluation.scores import (
    CELLS,
    Labels,
    Vectors,
    cell,
    identity_scores,
    pair_blocks,
    pair_counts,
)
from trainer.evaluation.tails import Numbers, Tail


@dataclass(frozen=True, slots=True)
class Hits:
    """The entries of a `Tail` while they are gathered, block by block."""

    scores: list[NDArray[np.float32]]
    shares: list[Numbers]
    first: list[Labels]
    second: list[Labels]
    enrolled: list[Labels]


ROUNDS = 4  # galleries, each of another enrolled sample of every subject
SUBGALLERY = 20  # enough subjects at hand for each that is enrolled
FORGOTTEN = 1e-6  # share of a probe's maximum that candidates beyond the last one kept would have


def pair_tail(vectors_ND: Vectors, labels_N: Labels, rate: float) -> Tail:
    """The pairs of different subjects that score highest, down to a rate of at least `rate`."""
    order_N = np.argsort(labels_N, kind="stable")
    sorted_ND, sorted_N = vectors_ND[order_N], labels_N[order_N]
    _, subject_N, counts_S = np.unique(sorted_N, return_inverse=True, return_counts=True)
    counts = pair_counts(vectors_ND, labels_N).non_mated
    trials = int(counts.sum())
    above = np.cumsum(counts[::-1])
    floor = CELLS - 1 - int(np.searchsorted(above, min(rate * trials + 2, trials)))
    scores, first, second = [], [], []
    for block in pair_blocks(sorted_ND, sorted_N):
        reached = cell(block.scores_bn) >= floor
        reached[:, : block.width] &= block.non_mated_bw
        row_e, column_e = np.nonzero(reached)
        scores.append(block.scores_bn[row_e, column_e])
        first.append(subject_N[block.start + row_e])
        second.append(subject_N[block.start + column_e])
    mass_S = counts_S.astype(np.float64)
    shares = [np.full(len(part), 1 / trials) for part in scores]
    return _tail(Hits(scores, shares, first, second, second), mass_S, mass_S, trials, 1)


def search_tail(vectors_ND: Vectors, labels_N: Labels, gallery_size: int, samples_per_subject: int, seed: int) -> Tail:
    """The best scores that searches by subjects who are not enrolled give, averaged over galleries.

    Every sample searches a gallery of the M other subjects. Where `gallery_size` N is smaller than M, the expectation
    over all galleries of N of the M subjects is taken: a probe's j-th best candidate is the maximum of such a gallery
    with probability w_j = C(M - j, N - 1) / C(M, N), which is exact and needs no drawing. Where N >= M, it is the
    maximum over all M. The tail is kept down to a rate of at least 0.3.
    """
    generator = np.random.default_rng([seed, 3])
    _, subject_N, counts_S = np.unique(labels_N, return_inverse=True, return_counts=True)
    subjects = len(counts_S)
    rounds = min(ROUNDS, max(1, int(np.median(counts_S)) // samples_per_subject))
    at_hand = min(subjects, SUBGALLERY * gallery_size + 1)
    hits = Hits([], [], [], [], [])
    gallery_mass_S = np.zeros(subjects)
    for turn in range(rounds):
        chosen_S = np.sort(generator.permutation(subjects)[:at_hand])
        gallery_mass_S[chosen_S] += 1 / rounds
        rows_G = _enrolled(subject_N, chosen_S, samples_per_subject, generator)
        probes_P = generator.permutation(len(labels_N))
        found = _candidates(vectors_ND, subject_N, rows_G, probes_P, min(gallery_size, at_hand - 1))
        hits.scores.extend(found.scores)
        hits.shares.extend(weights / (rounds * len(labels_N)) for weights in found.shares)
        hits.first.extend(found.first)
        hits.second.extend(found.second)
        hits.enrolled.extend(second * rounds + turn for second in found.second)
    return _tail(hits, counts_S.astype(np.float64), gallery_mass_S, len(labels_N), rounds)


def maximum_weights(at_hand: int, enrolled: int) -> Numbers:
    """w_j, the probability that the j-th best of M subjects is the best one of N enrolled at random; about 1 in sum."""
    weights = [enrolled / at_hand]
    while sum(weights) < 1 - FORGOTTEN and len(weights) <= at_hand - enrolled:
        rank = len(weights)
        weights.append(weights[-1] * (at_hand - enrolled - rank + 1) / (at_hand - rank))
    return np.array(weights)


def _enrolled(
    subject_N: Labels, chosen_S: Labels, samples_per_subject: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Rows of the enrolled samples: so many of each chosen subject, or all where it has fewer."""
    order_N = generator.permutation(len(subject_N))
    order_N = order_N[np.argsort(subject_N[order_N], kind="stable")]
    sorted_N = subject_N[order_N]
    place_N = np.arange(len(sorted_N)) - np.searchsorted(sorted_N, sorted_N)
    return np.asarray(order_N[(place_N < samples_per_subject) & np.isin(sorted_N, chosen_S)], dtype=np.int64)


def _candidates(
    vectors_ND: Vectors, subject_N: Labels, rows_G: NDArray[np.int64], probes_P: NDArray[np.int64], enrolled: int
) -> Hits:
    """Each probe's candidates in one gallery, block by block, with their weights as shares.

    A block keeps what is at or above the score that the candidate of median weight reaches in 60 % of its probes, so
    that the rate there is 0.3 or more. Probes come in random order: one block's floor is like another's.
    """
    chosen_C = np.unique(subject_N[rows_G])
    weights_j = maximum_weights(len(chosen_C) - 1, min(enrolled, len(chosen_C) - 1))
    middle = int(np.searchsorted(np.cumsum(weights_j), 0.5 * weights_j.sum()))
    hits = Hits([], [], [], [], [])
    for part, scores_bC in identity_scores(vectors_ND[probes_P], vectors_ND[rows_G], subject_N[rows_G]):
        mine_b = subject_N[probes_P[part]]
        column_b = np.minimum(np.searchsorted(chosen_C, mine_b), len(chosen_C) - 1)
        # a probe whose own subject is not there leaves out another one, so that all have the same number of candidates
        absent_b = np.flatnonzero(chosen_C[column_b] != mine_b)
        column_b[absent_b] = absent_b % len(chosen_C)
        scores_bC[np.arange(len(scores_bC)), column_b] = -np.inf
        best_bj, column_bj = _best(scores_bC, len(weights_j))
        kept_bj = best_bj >= np.quantile(best_bj[:, middle], 0.4)
        row_e, rank_e = np.nonzero(kept_bj)
        hits.scores.append(best_bj[kept_bj])
        hits.shares.append(weights_j[rank_e])
        hits.first.append(mine_b[row_e])
        hits.second.append(chosen_C[column_bj[kept_bj]])
    return hits


def _best(scores_bC: Vectors, count: int) -> tuple[Vectors, NDArray[np.int64]]:
    """The highest scores of each row, descending, and their columns."""
    if count == 1:
        column_b1 = np.argmax(scores_bC, axis=1)[:, None]
        return np.take_along_axis(scores_bC, column_b1, axis=1), column_b1
    if count < scores_bC.shape[1]:
        column_bj = np.argpartition(scores_bC, -count, axis=1)[:, -count:]
    else:
        column_bj = np.broadcast_to(np.arange(scores_bC.shape[1]), scores_bC.shape)
    order_bj = np.argsort(-np.take_along_axis(scores_bC, column_bj, axis=1), axis=1, kind="stable")
    column_bj = np.take_along_axis(column_bj, order_bj, axis=1)
    return np.take_along_axis(scores_bC, column_bj, axis=1), column_bj


def _tail(hits: Hits, probe_mass_S: Numbers, gallery_mass_S: Numbers, trials: int, galleries: int) -> Tail:
    scores_E = np.concatenate(hits.scores).astype(np.float64)
    order_E = np.argsort(-scores_E, kind="stable")
    return Tail(
        scores_E=scores_E[order_E],
        shares_E=np.concatenate(hits.shares)[order_E],
        first_E=np.concatenate(hits.first)[order_E],
        second_E=np.concatenate(hits.second)[order_E],
        enrolled_E=np.concatenate(hits.enrolled)[order_E],
        probe_mass_S=probe_mass_S,
        gallery_mass_S=gallery_mass_S,
        trials=trials,
        galleries=galleries,
    )
