"""Several samples of each enrolled subject, put together in several ways: which way errs least.

Of each identity half of the samples, at most five, may be enrolled; the others are probes. A share of the identities is
not enrolled, and all their samples are non-mated probes, as in the open-set protocol.
"""

from typing import Literal

import numpy as np

from trainer.errors import UserError
from trainer.evaluation import intervals, metrics, verification
from trainer.evaluation.findings import Enrolment
from trainer.evaluation.identification import OpenSearches
from trainer.evaluation.normalise import Normaliser, roles_of
from trainer.evaluation.scores import Floats, Labels, Vectors, fused, search_mated, search_non_mated

MOST_ENROLLED = 5
Way = Literal["first", "maximum", "mean", "quality"]
WAYS: tuple[Way, ...] = ("first", "maximum", "mean", "quality")


def enrolments(
    vectors_ND: Vectors,
    labels_N: Labels,
    strangers: Labels,
    fpir: float,
    quality_N: Floats | None = None,
    seed: int = 0,
    normaliser: Normaliser | None = None,
) -> list[Enrolment]:
    """Rank-1 and FNIR at an FPIR of each way; empty where no identity has three samples.

    Args:
        strangers: identities that are not enrolled.
        quality_N: of each sample, 0 or more; None: "quality" is left out.
        normaliser: of the scores; None: they are cosines.

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
    searching_NE, _ = roles_of(vectors_ND, normaliser)
    found = []
    for way in WAYS:
        if way == "quality" and quality_N is None:
            continue
        rows = np.flatnonzero(enrolled_N & ((place_N == 0) | (way != "first")))
        gallery = vectors_ND[rows], labels_N[rows]
        if way in ("mean", "quality"):
            gallery = fused(*gallery, quality_N[rows] if way == "quality" and quality_N is not None else None)
        gallery = roles_of(gallery[0], normaliser)[1], gallery[1]
        searched = search_mated(*gallery, searching_NE[probe_N], labels_N[probe_N])
        best_P = search_non_mated(*gallery, searching_NE[stranger_rows])
        searches = OpenSearches(labels_N[probe_N], searched, labels_N[stranger_rows], best_P)
        samples = 1 if way == "first" else int(place_N[enrolled_N].max()) + 1
        found.append(_enrolment(way, samples, len(np.unique(gallery[1])), searches, fpir, seed))
    return found


def _enrolment(way: Way, samples: int, gallery_size: int, searches: OpenSearches, fpir: float, seed: int) -> Enrolment:
    subjects_P, mated, strangers_P, best_P = searches
    point = metrics.fnir_at_fpir(mated, best_P, fpir)
    sides = (mated.mate_P, subjects_P), (best_P, strangers_P)
    point = intervals.of_fnir(*sides, point, seed=seed, replicates=verification.REPLICATES)
    first_P = metrics.rank1_P(mated)
    return Enrolment(
        way=way,
        samples=samples,
        gallery_size=gallery_size,
        probes=len(subjects_P),
        rank1=float(first_P.mean()),
        rank1_interval=intervals.of_mean(first_P, subjects_P),
        fpir=None if point.fnir is None else fpir,
        fnir=point.fnir,
        fnir_interval=None if point.low is None or point.high is None else (point.low, point.high),
    )


def _places(labels_N: Labels) -> tuple[Labels, Labels, Labels]:
    """Of each sample: its identity's number, its place among the identity's samples, and how many there are."""
    _, class_N, counts_C = np.unique(labels_N, return_inverse=True, return_counts=True)
    order_N = np.argsort(class_N, kind="stable")
    place_N = np.empty(len(labels_N), np.int64)
    place_N[order_N] = np.arange(len(labels_N)) - np.repeat(np.cumsum(counts_C) - counts_C, counts_C)
    return class_N, place_N, counts_C[class_N]
