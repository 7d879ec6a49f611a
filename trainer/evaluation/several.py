"""Several samples of each enrolled subject, put together in several ways: which way errs least.

Of each identity half of the samples, at most five, may be enrolled; the others are probes. A share of the identities is
not enrolled, and all their samples are non-mated probes, as in the open-set protocol.
"""

from typing import Literal

import numpy as np

from trainer.errors import UserError
from trainer.evaluation import intervals, metrics
from trainer.evaluation.findings import Enrolment
from trainer.evaluation.scores import Floats, Labels, Vectors, fused, search_mated, search_non_mated

MOST_ENROLLED = 5
WAYS: tuple[Literal["first", "maximum", "mean", "quality"], ...] = ("first", "maximum", "mean", "quality")


def enrolments(
    vectors_ND: Vectors,
    labels_N: Labels,
    strangers: Labels,
    fpir: float,
    *,
    quality_N: Floats | None = None,
    seed: int,
    replicates: int,
) -> list[Enrolment]:
    """Rank-1 and FNIR at an FPIR of each way; empty where no identity has three samples.

    Args:
        strangers: identities that are not enrolled.
        quality_N: of each sample, 0 or more; None: "quality" is left out.

    Raises:
        UserError: a quality that is negative or not finite.
    """
    if quality_N is not None and not (np.isfinite(quality_N) & (quality_N >= 0)).all():
        raise UserError("qualities are numbers of 0 or more; some are negative, missing or not finite")
    _, place_N, size_N = _places(labels_N)
    enrolled_N = (place_N < np.clip(size_N // 2, 1, MOST_ENROLLED)) & ~np.isin(labels_N, strangers)
    probe_N = ~enrolled_N & (size_N > 2) & ~np.isin(labels_N, strangers)
    if not probe_N.any():
        return []
    stranger_rows = np.flatnonzero(np.isin(labels_N, strangers))
    found = []
    for way in WAYS:
        if way == "quality" and quality_N is None:
            continue
        rows = np.flatnonzero(enrolled_N & ((place_N == 0) | (way != "first")))
        gallery = vectors_ND[rows], labels_N[rows]
        if way in ("mean", "quality"):
            gallery = fused(*gallery, quality_N[rows] if way == "quality" and quality_N is not None else None)
        mated = search_mated(*gallery, vectors_ND[probe_N], labels_N[probe_N])
        non_mated_P = search_non_mated(*gallery, vectors_ND[stranger_rows])
        point = metrics.fnir_at_fpir(mated, non_mated_P, fpir)
        sides = (mated.mate_P, labels_N[probe_N]), (non_mated_P, labels_N[stranger_rows])
        point = intervals.of_fnir(*sides, point, seed=seed, replicates=replicates)
        first_P = metrics.rank1_P(mated)
        found.append(
            Enrolment(
                way=way,
                samples=1 if way == "first" else int(place_N[enrolled_N].max()) + 1,
                gallery_size=len(np.unique(gallery[1])),
                probes=int(probe_N.sum()),
                rank1=float(first_P.mean()),
                rank1_interval=intervals.of_mean(first_P, labels_N[probe_N]),
                fpir=None if point.fnir is None else fpir,
                fnir=point.fnir,
                fnir_interval=None if point.low is None or point.high is None else (point.low, point.high),
            )
        )
    return found


def _places(labels_N: Labels) -> tuple[Labels, Labels, Labels]:
    """Of each sample: its identity's number, its place among the identity's samples, and how many there are."""
    _, class_N, counts_C = np.unique(labels_N, return_inverse=True, return_counts=True)
    order_N = np.argsort(class_N, kind="stable")
    place_N = np.empty(len(labels_N), np.int64)
    place_N[order_N] = np.arange(len(labels_N)) - np.repeat(np.cumsum(counts_C) - counts_C, counts_C)
    return class_N, place_N, counts_C[class_N]
