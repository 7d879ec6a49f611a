"""Tails of non-mated comparisons: all pairs, and searches of galleries that hold everyone but the probe's subject.

Axes as in `scores.py`; M subjects are at hand to be enrolled besides the probe's own, j counts a probe's candidates.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from trainer.evaluation.scores import CELLS, Labels, Vectors, cell, identity_scores, pair_blocks, pair_counts
from trainer.evaluation.tails import Numbers, Tail

# Entries of a `Tail`: scores, shares, first subjects, second subjects, enrolled entries.
Hits = tuple[Vectors, Numbers, Labels, Labels, Labels]

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
    mass_S, hits = counts_S.astype(np.float64), []
    for start, scores_bn, _, non_mated_bw in pair_blocks(sorted_ND, sorted_N):
        reached = cell(scores_bn) >= floor
        reached[:, : non_mated_bw.shape[1]] &= non_mated_bw
        row_e, column_e = np.nonzero(reached)
        first_e, second_e = subject_N[start + row_e], subject_N[start + column_e]
        hits.append((scores_bn[reached], np.full(len(row_e), 1 / trials), first_e, second_e, second_e))
    return _tail(hits, mass_S, mass_S, trials, 1)


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
    weights_j = maximum_weights(at_hand - 1, min(gallery_size, at_hand - 1))
    hits: list[Hits] = []
    gallery_mass_S = np.zeros(subjects)
    for turn in range(rounds):
        chosen_S = np.sort(generator.permutation(subjects)[:at_hand])
        gallery_mass_S[chosen_S] += 1 / rounds
        order_N, place_N = shuffled(subject_N, generator)
        rows_G = order_N[(place_N < samples_per_subject) & np.isin(subject_N[order_N], chosen_S)]
        probes_P = generator.permutation(len(labels_N))
        for scores_e, weights_e, first_e, second_e in _candidates(vectors_ND, subject_N, rows_G, probes_P, weights_j):
            shares_e = weights_e / (rounds * len(labels_N))
            hits.append((scores_e, shares_e, first_e, second_e, second_e * rounds + turn))
    return _tail(hits, counts_S.astype(np.float64), gallery_mass_S, len(labels_N), rounds)


def maximum_weights(at_hand: int, enrolled: int) -> Numbers:
    """w_j, the probability that the j-th best of M subjects is the best one of N enrolled at random; about 1 in sum."""
    weights = [enrolled / at_hand]
    while sum(weights) < 1 - FORGOTTEN and len(weights) <= at_hand - enrolled:
        rank = len(weights)
        weights.append(weights[-1] * (at_hand - enrolled - rank + 1) / (at_hand - rank))
    return np.array(weights)


def shuffled(labels_N: Labels, generator: np.random.Generator) -> tuple[Labels, Labels]:
    """Rows in order of label, shuffled within each, and the place of each among its label's: 0, 1, ..."""
    order_N = generator.permutation(len(labels_N))
    order_N = order_N[np.argsort(labels_N[order_N], kind="stable")]
    sorted_N = labels_N[order_N]
    return order_N, np.arange(len(sorted_N)) - np.searchsorted(sorted_N, sorted_N)


def _candidates(
    vectors_ND: Vectors, subject_N: Labels, rows_G: Labels, probes_P: Labels, weights_j: Numbers
) -> Iterator[tuple[Vectors, Numbers, Labels, Labels]]:
    """Each probe's candidates in one gallery, block by block: scores, weights, who searched, who answered.

    A block keeps what is at or above the score that the candidate of median weight reaches in 60 % of its probes, so
    that the rate there is 0.3 or more. Probes come in random order: one block's floor is like another's.
    """
    chosen_C = np.unique(subject_N[rows_G])
    middle = int(np.searchsorted(np.cumsum(weights_j), 0.5 * weights_j.sum()))
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
        yield best_bj[kept_bj], weights_j[rank_e], mine_b[row_e], chosen_C[column_bj[kept_bj]]


def _best(scores_bC: Vectors, count: int) -> tuple[Vectors, Labels]:
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


def _tail(hits: Sequence[Hits], probe_mass_S: Numbers, gallery_mass_S: Numbers, trials: int, galleries: int) -> Tail:
    scores_E, *others = (np.concatenate(parts) for parts in zip(*hits, strict=True))
    order_E = np.argsort(-scores_E, kind="stable")
    shares_E, first_E, second_E, enrolled_E = (column_E[order_E] for column_E in others)
    scores_E = scores_E[order_E].astype(np.float64)
    return Tail(scores_E, shares_E, first_E, second_E, enrolled_E, probe_mass_S, gallery_mass_S, trials, galleries)
