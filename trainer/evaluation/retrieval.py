"""Retrieval among all samples: recall@k and mAP@R, with ties broken by lot, in expectation.

Each sample whose identity has another one is a query, all other samples are what is searched. R is the number of the
others of its identity. Scores in the same cell of `scores.GRID` (rounded) tie. Axes as in `scores.py`.
"""

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError
from trainer.evaluation import intervals
from trainer.evaluation.findings import Retrieval
from trainer.evaluation.scores import BLOCK, STEPS, Labels, Vectors

KS = (1, 2, 4, 8)
Numbers = NDArray[np.float64]


def retrieval(vectors_ND: Vectors, labels_N: Labels, enrolled_ND: Vectors | None = None) -> Retrieval:
    """recall@k (Jegou et al., TPAMI 2011) and mAP@R (Musgrave, Belongie and Lim, "A metric learning reality check",
    ECCV 2020), with intervals by subject. `enrolled_ND`: as for `scores.pair_blocks`.

    Raises:
        UserError: no identity has two samples.
    """
    _, class_N, counts_C = np.unique(labels_N, return_inverse=True, return_counts=True)
    queries_Q = np.flatnonzero(counts_C[class_N] > 1)
    if not len(queries_Q):
        raise UserError(f"{len(labels_N)} samples of as many identities: none has another to retrieve")
    others_ND = vectors_ND if enrolled_ND is None else enrolled_ND
    recall_QK, precision_Q = np.empty((len(queries_Q), len(KS))), np.empty(len(queries_Q))
    rows = max(1, BLOCK // len(labels_N))
    for start in range(0, len(queries_Q), rows):
        query_b = queries_Q[start : start + rows]
        scores_bN = np.rint(vectors_ND[query_b] @ others_ND.T * np.float32(STEPS))
        scores_bN[np.arange(len(query_b)), query_b] = -np.inf  # a sample does not retrieve itself
        for place, (query, scores_N) in enumerate(zip(query_b.tolist(), scores_bN, strict=True), start):
            mates = int(counts_C[class_N[query]]) - 1
            same_n, group_n = _first(scores_N, class_N == class_N[query], max(mates, KS[-1]))
            recall_QK[place] = _recalls(same_n, group_n)
            precision_Q[place] = average_precision(same_n, group_n, mates)
    subjects_Q = labels_N[queries_Q]
    low, high = zip(*(intervals.of_mean(column_Q, subjects_Q) for column_Q in recall_QK.T), strict=True)
    return Retrieval(
        queries=len(queries_Q),
        ks=list(KS),
        recall=recall_QK.mean(axis=0).tolist(),
        recall_low=list(low),
        recall_high=list(high),
        map_at_r=float(precision_Q.mean()),
        map_interval=intervals.of_mean(precision_Q, subjects_Q),
    )


def _first(scores_N: Numbers, same_N: NDArray[np.bool_], wanted: int) -> tuple[NDArray[np.bool_], Labels]:
    """The first candidates, whole groups of ties, in falling order: is it a mate, where its group begins."""
    wanted = min(wanted, len(scores_N) - 1)
    near_n = np.flatnonzero(scores_N >= np.partition(scores_N, -wanted)[-wanted])
    order_n = near_n[np.argsort(-scores_N[near_n], kind="stable")]
    falling_n = -scores_N[order_n]
    return same_N[order_n], np.searchsorted(falling_n, falling_n)


def _recalls(same_n: NDArray[np.bool_], group_n: Labels) -> Numbers:
    """The chance that a mate is among the first k: with `before` others ahead of the first mate's group, which has
    `mates` mates and `others`, it is 1 - C(others, j) / C(others + mates, j), j = k - before."""
    if not same_n.any():
        return np.zeros(len(KS))
    first = group_n[np.argmax(same_n)]
    inside_n = group_n == first
    mates, others = int(same_n[inside_n].sum()), int((~same_n[inside_n]).sum())
    found = []
    for k in KS:
        drawn = k - int(first)
        miss = 1.0
        for turn in range(max(drawn, 0)):
            miss *= max(others - turn, 0) / max(others + mates - turn, 1)
        found.append(1 - miss)
    return np.array(found)


def average_precision(same_n: NDArray[np.bool_], group_n: Labels, mates: int) -> float:
    """1/R times the sum over the first R places of precision at each place that holds a mate.

    In a group of n that tie, m of them mates, after c candidates of which r are mates, the j-th place holds a mate with
    chance m / n and then r + 1 + (j - 1) (m - 1) / (n - 1) mates are among the first c + j (McSherry and Najork,
    "Computing information retrieval performance measures efficiently in the presence of tied scores", ECIR 2008).
    """
    place_R = np.arange(min(mates, len(same_n)))
    start_R = group_n[place_R]
    sizes_n, hits_n = np.bincount(group_n), np.bincount(group_n, weights=same_n)
    size_R, hits_R = sizes_n[start_R], hits_n[start_R]
    before_R = np.concatenate([[0], np.cumsum(hits_n)])[start_R]
    further_R = (place_R - start_R) * (hits_R - 1) / np.maximum(size_R - 1, 1)
    expected_R = hits_R / size_R * (before_R + 1 + further_R) / (place_R + 1)
    return float(expected_R.sum() / mates)
