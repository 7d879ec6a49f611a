"""The protocols by which an Embedder is judged on held-out identities.

One-shot: one enrolled sample per identity, all others are probes, every identity in one gallery. Open set: a share of
the identities is not enrolled, and all their samples are probes that must come back as unknown. Verification: all
pairs, and LFW's ten folds of drawn ones. Everything is decided by the order of the samples and the seed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError
from trainer.evaluation import metrics, report, verification
from trainer.evaluation.comparison import Seen
from trainer.evaluation.exhibits import growth, hardest
from trainer.evaluation.findings import Growth, Hardest, HardPair, Retrieval
from trainer.evaluation.geometry import angles
from trainer.evaluation.groups import differentials
from trainer.evaluation.identification import FPIRS, ClosedSearches, OpenSearches, closed_set, open_set
from trainer.evaluation.normalise import Normaliser, roles_of
from trainer.evaluation.retrieval import retrieval
from trainer.evaluation.scores import (
    Floats,
    Labels,
    Roles,
    Vectors,
    check,
    search_mated,
    search_non_mated,
)
from trainer.evaluation.several import enrolments

DRAWS = 5  # other choices of the enrolled samples, for the spread of rank-1
UNENROLLED = 0.5  # share of the identities
MOST_RETRIEVED = 10_000  # samples; the time grows with the square
GROUP_FAR, ENROLMENT_FPIR = 1e-3, 0.01
COPY = 1 - 1e-6  # the score from which on two samples are the same one


Together = Callable[[metrics.Scores], metrics.Scores]


def enrolled_rows(labels_N: Labels, seed: int | None = None) -> NDArray[np.int64]:
    """One sample of each identity, in order of label: the first one, or one drawn by the seed. [C]"""
    if seed is None:
        return np.asarray(np.unique(labels_N, return_index=True)[1], dtype=np.int64)
    order_N = np.random.default_rng([seed, len(labels_N)]).permutation(len(labels_N))
    return np.asarray(order_N[np.unique(labels_N[order_N], return_index=True)[1]], dtype=np.int64)


def unenrolled_identities(labels_N: Labels, share: float, seed: int) -> Labels:
    """The identities that the open-set protocol keeps out of the gallery: at least one, and never all.

    Raises:
        UserError: a share outside (0, 1), or fewer than two identities.
    """
    identities_C = np.unique(labels_N)
    if not 0 < share < 1 or len(identities_C) < 2:
        raise UserError(
            f"a share of {share:g} of {len(identities_C)} identities cannot be left unenrolled; "
            "the share lies between 0 and 1, and there must be two identities or more"
        )
    count = min(max(round(share * len(identities_C)), 1), len(identities_C) - 1)
    return np.sort(np.random.default_rng(seed).permutation(identities_C)[:count])


def one_shot_searches(
    vectors_ND: Vectors,
    labels_N: Labels,
    enrolled_C: NDArray[np.int64],
    part: slice = slice(None),
    enrolled_ND: Vectors | None = None,
) -> ClosedSearches:
    """What the searches of all samples that are not enrolled found; or of a part of them.

    `enrolled_ND`: the samples as they are enrolled, where that is not as they search (see `normalise.py`).
    """
    probes_P = np.delete(np.arange(len(labels_N)), enrolled_C)
    if not len(probes_P):
        raise UserError(
            f"{len(labels_N)} samples of {len(enrolled_C)} identities leave no probe; "
            "one-shot identification takes a second sample of at least one identity"
        )
    probes_P = probes_P[part]
    gallery_CD = (vectors_ND if enrolled_ND is None else enrolled_ND)[enrolled_C]
    searches = search_mated(gallery_CD, labels_N[enrolled_C], vectors_ND[probes_P], labels_N[probes_P])
    return ClosedSearches(labels_N[probes_P], searches)


def open_set_searches(
    vectors_ND: Vectors,
    labels_N: Labels,
    share: float,
    seed: int,
    part: slice = slice(None),
    enrolled_ND: Vectors | None = None,
) -> OpenSearches:
    """What the mated and the non-mated searches found; or a part of each; arguments as of `one_shot_searches`.

    The first sample of each identity is enrolled, but for a share of the identities, drawn by the seed.
    """
    stranger_N = np.isin(labels_N, unenrolled_identities(labels_N, share, seed))
    known_ND, known_N = vectors_ND[~stranger_N], labels_N[~stranger_N]
    gallery_ND = known_ND if enrolled_ND is None else enrolled_ND[~stranger_N]
    enrolled_C = enrolled_rows(known_N)
    strangers_P = np.flatnonzero(stranger_N)[part]
    non_mated_P = search_non_mated(gallery_ND[enrolled_C], known_N[enrolled_C], vectors_ND[strangers_P])
    closed = one_shot_searches(known_ND, known_N, enrolled_C, part, gallery_ND)
    return OpenSearches(*closed, labels_N[strangers_P], non_mated_P)


def quick(
    vectors_ND: Vectors, labels_N: Labels, part: slice = slice(None), together: Together = lambda part_P: part_P
) -> tuple[float, float | None]:
    """Rank-1, and FNIR at FPIR 1 % (None where the probes cannot show it), as `measure` finds them with seed 0.

    Args:
        part: of the probes, to search here.
        together: of what this part's probes found, what those of all parts did, in any order.

    Raises:
        UserError: see `scores.check`; no identity with two samples, or fewer than two identities.
    """
    vectors_ND, labels_N = check(vectors_ND, labels_N)
    _, searches = one_shot_searches(vectors_ND, labels_N, enrolled_rows(labels_N), part)
    _, mated, _, non_mated_P = open_set_searches(vectors_ND, labels_N, UNENROLLED, 0, part)
    first_P, mate_P, best_P = (together(found_P) for found_P in (metrics.rank1_P(searches), mated.mate_P, non_mated_P))
    if len(best_P) * 0.01 < metrics.SHOWN_ERRORS:
        return float(first_P.mean()), None
    return float(first_P.mean()), float(np.mean(mate_P < metrics.threshold_at(best_P, 0.01)))


class Measured(NamedTuple):
    """A Report, what a comparison with another Embedder needs beside it, and the pairs that a reader wants to see."""

    report: report.Report
    seen: Seen
    hardest: Hardest


def measure(
    vectors_ND: Vectors,
    labels_N: Labels,
    class_names: Sequence[str],
    *,
    seed: int = 0,
    unenrolled_share: float = UNENROLLED,
    source: str = "",
    model_id: str | None = None,
    groups: Mapping[str, tuple[Labels, Sequence[str]]] | None = None,
    quality_N: Floats | None = None,
    remarks: Sequence[str] = (),
    normaliser: Normaliser | None = None,
) -> Measured:
    """All protocols on one set of held-out samples.

    Args:
        vectors_ND: unit vectors, in the order of the data set: the first of each identity is the enrolled one.
        labels_N: identity of each, an index into `class_names`.
        source: the data set and split, in words.
        groups: by attribute, the group of each sample and the groups' names.
        quality_N: of each sample, for templates that are weighted by it.
        remarks: what is known to be doubtful about the data.
        normaliser: of the scores, by a cohort of other subjects; None: they are cosines.

    Raises:
        UserError: input that cannot be compared, or too few identities or samples for a protocol.
    """
    vectors_ND, labels_N = check(vectors_ND, labels_N)
    _check_names(labels_N, class_names)
    identities, roles = len(np.unique(labels_N)), roles_of(vectors_ND, normaliser)
    pairs, curve, evidence = verification.verification(roles[0], labels_N, seed, roles[1])
    closed, drawn = _drawn(roles, labels_N, seed)
    opened = open_set_searches(roles[0], labels_N, unenrolled_share, seed, enrolled_ND=roles[1])
    strangers = unenrolled_identities(labels_N, unenrolled_share, seed)
    several = enrolments(vectors_ND, labels_N, strangers, ENROLMENT_FPIR, quality_N, seed, normaliser)
    written = report.Report(
        source=source,
        model_id=model_id,
        seed=seed,
        identities=identities,
        samples=len(labels_N),
        dimension=vectors_ND.shape[1],
        verification=pairs,
        one_shot=closed_set(closed, identities, drawn, class_names),
        open_set=open_set(opened, identities - len(strangers), len(strangers), unenrolled_share, seed),
        geometry=_geometry(vectors_ND, labels_N),
        enrolments=several,
        retrieval=_retrieved(roles, labels_N, seed),
        growth=_growth(roles, labels_N, opened),
        groups=[differentials(roles, labels_N, *of, name, GROUP_FAR) for name, of in (groups or {}).items()],
        remarks=[*remarks, *_doubts(labels_N, class_names, pairs, _copies(vectors_ND, labels_N))],
    )
    return Measured(written, Seen(model_id or "", (curve, evidence), closed, opened), _hardest(roles, labels_N, seed))


def _drawn(roles: Roles, labels_N: Labels, seed: int) -> tuple[ClosedSearches, list[float]]:
    """The searches with the first samples enrolled, and rank-1 with `DRAWS` choices of random ones."""
    draws = (enrolled_rows(labels_N, seed + draw) for draw in range(DRAWS))

    def searches(rows: Labels) -> ClosedSearches:
        return one_shot_searches(roles[0], labels_N, rows, enrolled_ND=roles[1])

    rates = [float(metrics.rank1_P(searches(rows).mated).mean()) for rows in draws]
    return searches(enrolled_rows(labels_N)), rates


def _check_names(labels_N: Labels, class_names: Sequence[str]) -> None:
    if len(wrong := labels_N[(labels_N < 0) | (labels_N >= len(class_names))]):
        raise UserError(f"label {wrong[0]} has no name among {len(class_names)} classes; pass the same split's names")
    if len(identities := np.unique(labels_N)) < 2:
        raise UserError(f"{len(identities)} class cannot be told from others; evaluate on two classes or more")


def _retrieved(roles: Roles, labels_N: Labels, seed: int) -> Retrieval:
    rows = verification.whole_identities(labels_N, MOST_RETRIEVED, seed)
    return retrieval(roles[0][rows], labels_N[rows], roles[1][rows])


def _geometry(vectors_ND: Vectors, labels_N: Labels) -> report.Geometry:
    found = angles(vectors_ND, labels_N)
    nearest = float(found.nearest_C.mean())
    return report.Geometry(intra_mean=found.intra_mean, inter_smallest=found.inter_smallest, inter_nearest_mean=nearest)


def _growth(roles: Roles, labels_N: Labels, found: OpenSearches) -> Growth | None:
    """At the threshold of the lowest FPIR that the strangers show."""
    shown = [fpir for fpir in FPIRS if len(found.non_mated_P) * fpir >= metrics.SHOWN_ERRORS]
    if not shown:
        return None
    threshold = metrics.threshold_at(found.non_mated_P, max(shown[0], 0.01))
    return growth(roles, labels_N, enrolled_rows(labels_N), threshold)


def _hardest(roles: Roles, labels_N: Labels, seed: int) -> Hardest:
    rows = verification.whole_identities(labels_N, verification.MOST_PAIR_SAMPLES, seed)
    found = hardest(roles[0][rows], labels_N[rows], roles[1][rows])
    return Hardest(
        matches=[_moved(pair, rows) for pair in found.matches],
        non_matches=[_moved(pair, rows) for pair in found.non_matches],
    )


def _moved(pair: HardPair, rows: Labels) -> HardPair:
    return HardPair(first=int(rows[pair.first]), second=int(rows[pair.second]), score=pair.score)


def _copies(vectors_ND: Vectors, labels_N: Labels) -> int:
    """Probes whose cosine with the enrolled sample of their identity is 1."""
    first_N = enrolled_rows(labels_N)[np.unique(labels_N, return_inverse=True)[1]]
    cosines_N = np.einsum("nd,nd->n", vectors_ND, vectors_ND[first_N])
    return int(np.count_nonzero((cosines_N >= COPY) & (first_N != np.arange(len(labels_N)))))


def _doubts(labels_N: Labels, class_names: Sequence[str], pairs: report.AllPairs, copies: int) -> list[str]:
    """What makes the figures doubtful, by name."""
    sizes_C = np.bincount(labels_N, minlength=len(class_names))
    empty, single = np.flatnonzero(sizes_C == 0), np.flatnonzero(sizes_C == 1)
    edges = pairs.histogram.edges
    doubts = []
    if len(empty):
        doubts.append(
            f"{len(empty)} identities have no sample, such as '{class_names[empty[0]]}': they are in no figure"
        )
    if len(single):
        first = class_names[single[0]]
        doubts.append(
            f"{len(single)} identities have one sample, such as '{first}': nothing tells if they are found again"
        )
    if copies and len(edges) > 2:
        doubts.append(
            f"{copies} probes score 1 with the enrolled sample of their identity: copies of it make the errors look "
            "smaller; look for them with 'hypersphere data check'"
        )
    if len(edges) == 2:
        doubts.append(f"all pairs score {edges[0]:.4f}: the embeddings have collapsed, and every figure is chance")
    return doubts
