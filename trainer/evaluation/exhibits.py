"""What a reader wants to see of a set of embeddings: the pairs that fool it, and FPIR as the gallery grows."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from trainer.evaluation import intervals
from trainer.evaluation.findings import Growth, Hardest, HardPair
from trainer.evaluation.scores import Labels, Roles, Vectors, identity_scores, pair_blocks

SHOWN = 8  # pairs of each kind
_KEPT = 256  # candidates of a block
SIZES = 25  # of the gallery


def hardest(vectors_ND: Vectors, labels_N: Labels, enrolled_ND: Vectors) -> Hardest:
    """The pairs of all samples that are hardest to tell apart, or to bring together."""
    order_N = np.argsort(labels_N, kind="stable")
    sorted_N = labels_N[order_N]
    matches, non_matches = [], []
    for start, scores_bn, mated_bw, non_mated_bw in pair_blocks(vectors_ND[order_N], sorted_N, enrolled_ND[order_N]):
        width = mated_bw.shape[1]
        row_e, column_e = np.nonzero(mated_bw)
        non_matches.append(_lowest(scores_bn[row_e, column_e], order_N[start + row_e], order_N[start + column_e]))
        scores_bn[:, :width][~non_mated_bw] = -np.inf
        flat_e = np.argpartition(scores_bn.ravel(), -min(_KEPT, scores_bn.size))[-_KEPT:]
        flat_e = flat_e[np.isfinite(scores_bn.ravel()[flat_e])]
        row_e, column_e = np.divmod(flat_e, scores_bn.shape[1])
        scores_e = -scores_bn.ravel()[flat_e]
        matches.append(_lowest(scores_e, order_N[start + row_e], order_N[start + column_e]))
    return Hardest(matches=_chosen(matches, labels_N, -1), non_matches=_chosen(non_matches, labels_N, 1))


def of_pairs(scores_P: Vectors, same_P: NDArray[np.bool_], rows_P2: Labels, labels_N: Labels) -> Hardest:
    """The same of listed pairs; `rows_P2` are the two samples of each."""
    matches = _lowest(-scores_P[~same_P], *rows_P2[~same_P].T)
    non_matches = _lowest(scores_P[same_P], *rows_P2[same_P].T)
    return Hardest(matches=_chosen([matches], labels_N, -1), non_matches=_chosen([non_matches], labels_N, 1))


def _lowest(scores_e: Vectors, first_e: Labels, second_e: Labels) -> tuple[Vectors, Labels, Labels]:
    lowest = np.argsort(scores_e, kind="stable")[:_KEPT]
    return scores_e[lowest], first_e[lowest], second_e[lowest]


def _chosen(parts: Iterable[tuple[Vectors, Labels, Labels]], labels_N: Labels, sign: int) -> list[HardPair]:
    """The lowest of each two subjects."""
    scores_e, first_e, second_e = (np.concatenate(column) for column in zip(*parts, strict=True))
    found: list[HardPair] = []
    seen: set[tuple[int, ...]] = set()
    for place in np.argsort(scores_e, kind="stable").tolist():
        first, second = int(first_e[place]), int(second_e[place])
        subjects = tuple(sorted((int(labels_N[first]), int(labels_N[second]))))
        if subjects not in seen and len(found) < SHOWN:
            seen.add(subjects)
            found.append(HardPair(first=first, second=second, score=sign * float(scores_e[place])))
    return found


def growth(roles: Roles, labels_N: Labels, enrolled_C: Labels, threshold: float) -> Growth:
    """FPIR(N, T) of every sample as a stranger to galleries of N of the other subjects.

    With k of the M others at or above T, a gallery of N of them returns somebody with chance 1 - C(M - k, N) / C(M, N).

    Args:
        enrolled_C: one row of each subject.
    """
    others, reached_N = len(enrolled_C) - 1, np.empty(len(labels_N), np.int64)
    column_N = np.searchsorted(labels_N[enrolled_C], labels_N)
    for part, scores_bC in identity_scores(roles[0], roles[1][enrolled_C], labels_N[enrolled_C]):
        scores_bC[np.arange(len(scores_bC)), column_N[part]] = -np.inf
        reached_N[part] = np.count_nonzero(scores_bC >= threshold, axis=1)
    sizes = np.unique(np.geomspace(1, others, SIZES).round().astype(np.int64))
    # log of (1 - N/M)(1 - N/(M-1)) ... over the k that reach T
    chance_SN = []
    for size in sizes.tolist():
        left = np.maximum(1 - size / np.arange(others, 0, -1), 0)
        none_k = np.concatenate([[1.0], np.cumprod(left)])
        chance_SN.append(1 - none_k[reached_N])
    low, high = zip(*(intervals.of_mean(chance_N, labels_N) for chance_N in chance_SN), strict=True)
    return Growth(
        threshold=threshold,
        sizes=sizes.tolist(),
        fpir=[float(chance_N.mean()) for chance_N in chance_SN],
        low=list(low),
        high=list(high),
    )
