"""An Embedder on a protocol from a file: its images' vectors, made into templates, compared and searched as it says."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trainer.evaluation import evidence, metrics, report, verification
from trainer.evaluation.comparison import Seen
from trainer.evaluation.evidence import Evidence
from trainer.evaluation.exhibits import of_pairs
from trainer.evaluation.findings import Hardest
from trainer.evaluation.identification import ClosedSearches, OpenSearches, closed_set, open_set
from trainer.evaluation.lists import Lists, Search, read_pairs, read_runs
from trainer.evaluation.metrics import ErrorCurve
from trainer.evaluation.normalise import Normaliser, roles_of
from trainer.evaluation.protocols import COPY, Measured
from trainer.evaluation.scores import (
    CELLS,
    Labels,
    MatedSearches,
    PairCounts,
    Roles,
    Vectors,
    cell,
    check,
    fused,
    search_mated,
    search_non_mated,
)
from trainer.evaluation.templates import read_templates

_PAIRS_TOGETHER = 1 << 16
_NOTHING = Hardest(matches=[], non_matches=[])


def read_protocol(path: Path) -> Lists:
    """The protocol that a file or folder holds: see `lists`.

    Raises:
        UserError: it holds none.
    """
    if path.is_dir() or path.name == "class_labels.txt":
        return read_runs(path if path.is_dir() else path.parent)
    return read_templates(path) if path.suffix in (".yaml", ".yml") else read_pairs(path)


def templates(vectors_ND: Vectors, lists: Lists) -> Vectors:
    """The vector of each template: the normalised mean over its media, of the mean over each medium's images. [T, D]"""
    media = int(lists.medium_I.max()) + 1
    of_media_MD, code_M = fused(vectors_ND[lists.image_I], lists.template_I * media + lists.medium_I)
    return fused(of_media_MD, code_M // media)[0]


def measure_lists(
    vectors_ND: Vectors,
    lists: Lists,
    *,
    seed: int,
    source: str,
    model_id: str,
    remarks: Sequence[str] = (),
    normaliser: Normaliser | None = None,
) -> Measured:
    """The report of a protocol from a file.

    Args:
        vectors_ND: unit vectors of `lists.images`.
        normaliser: of the scores; None: they are cosines. The first of a pair searches.

    Raises:
        UserError: vectors that cannot be compared, or lists without mated or without non-mated pairs.
    """
    vectors_ND, _ = check(vectors_ND, np.arange(len(vectors_ND)))
    roles = roles_of(templates(vectors_ND, lists), normaliser)
    pairs, of_pair, shown = _compared(roles, lists, seed) if len(lists.pairs_P2) else (None, None, _NOTHING)
    closed, opened, rates = _searched(roles, lists)
    gallery = len(np.unique(lists.subject_T[lists.searches[0].gallery_G])) if lists.searches else 0
    strangers = len(np.unique(opened.strangers_P)) if opened else 0
    share = strangers / (strangers + gallery) if strangers else 0.0
    written = report.Report(
        source=source,
        model_id=model_id,
        seed=seed,
        identities=len(lists.subjects),
        samples=len(lists.images),
        dimension=vectors_ND.shape[1],
        verification=pairs,
        one_shot=closed_set(closed, gallery, rates if len(rates) > 1 else [], lists.subjects) if closed else None,
        open_set=open_set(opened, gallery, strangers, share, seed) if opened else None,
        geometry=None,
        remarks=[*remarks, *_doubts(lists, closed if normaliser is None else None)],
    )
    return Measured(written, Seen(model_id, of_pair, closed, opened), shown)


def _compared(roles: Roles, lists: Lists, seed: int) -> tuple[report.AllPairs, tuple[ErrorCurve, Evidence], Hardest]:
    """The figures of the pairs, what a comparison needs of them, and the hardest ones."""
    scores_P = pair_scores(roles, lists.pairs_P2)
    counts = PairCounts(
        *(np.bincount(cell(s), minlength=CELLS) for s in (scores_P[lists.same_P], scores_P[~lists.same_P]))
    )
    curve = metrics.verification_curve(counts)
    found = evidence.of_list(scores_P, lists.same_P, lists.subject_T[lists.pairs_P2], curve)
    first_T = np.full(len(roles[0]), -1)
    first_T[lists.template_I[::-1]] = lists.image_I[::-1]  # the first image of each template
    subject_N = np.zeros(len(lists.images), np.int64)
    subject_N[lists.image_I] = lists.subject_T[lists.template_I]
    shown = of_pairs(scores_P, lists.same_P, first_T[lists.pairs_P2], subject_N)
    pairs = verification.pairs_report(len(roles[0]), counts, curve, found, _folds(scores_P, lists), seed)
    return pairs, (curve, found), shown


def pair_scores(roles: Roles, pairs_P2: Labels) -> Vectors:
    """The score of each pair, some at a time."""
    parts = [pairs_P2[start : start + _PAIRS_TOGETHER].T for start in range(0, len(pairs_P2), _PAIRS_TOGETHER)]
    return np.concatenate([np.einsum("pd,pd->p", roles[0][one], roles[1][other]) for one, other in parts])


def _folds(scores_P: Vectors, lists: Lists) -> report.TenFold | None:
    """Accuracy by the folds of the file; None where a fold has pairs of one kind only."""
    folds = np.unique(lists.folds_P)
    kinds = {(fold, same) for fold, same in zip(lists.folds_P.tolist(), lists.same_P.tolist(), strict=True)}
    if len(folds) < 2 or len(kinds) < 2 * len(folds):
        return None
    accuracies = metrics.ten_fold_accuracy(scores_P, lists.same_P, lists.folds_P)
    error = float(accuracies.std(ddof=1) / np.sqrt(len(folds)))
    return report.TenFold(accuracy=float(accuracies.mean()), standard_error=error, pairs=len(scores_P))


def _searched(roles: Roles, lists: Lists) -> tuple[ClosedSearches | None, OpenSearches | None, list[float]]:
    """All searches of all galleries together; rank-1 of each gallery."""
    runs = [_search(roles, lists.subject_T, one) for one in lists.searches]
    closed = [run[0] for run in runs if run[0] is not None]
    opened = [run[1] for run in runs if run[1] is not None]
    rates = [float(metrics.rank1_P(one.mated).mean()) for one in closed]
    if not closed:
        return None, None, []
    subjects_P = np.concatenate([one.subjects_P for one in closed])
    columns = zip(*((m.mate_P, m.ahead_P, m.tied_P, m.rival_P) for m in (one.mated for one in closed)), strict=True)
    mated = MatedSearches(*(np.concatenate(column) for column in columns))
    together = ClosedSearches(subjects_P, mated)
    if not opened:
        return together, None, rates
    strangers_P, best_P = (np.concatenate(column) for column in zip(*opened, strict=True))
    return together, OpenSearches(subjects_P, mated, strangers_P, best_P), rates


def _search(
    roles: Roles, subject_T: Labels, search: Search
) -> tuple[ClosedSearches | None, tuple[Labels, Vectors] | None]:
    gallery = roles[1][search.gallery_G], subject_T[search.gallery_G]
    known_P = np.isin(subject_T[search.probes_P], gallery[1])
    mated_P, strangers_P = search.probes_P[known_P], search.probes_P[~known_P]
    closed = opened = None
    if len(mated_P):
        closed = ClosedSearches(subject_T[mated_P], search_mated(*gallery, roles[0][mated_P], subject_T[mated_P]))
    if len(strangers_P):
        opened = subject_T[strangers_P], search_non_mated(*gallery, roles[0][strangers_P])
    return closed, opened


def _doubts(lists: Lists, closed: ClosedSearches | None) -> list[str]:
    """Probes that are enrolled as well: by their image, and by a score of 1."""
    doubts = []
    for search in lists.searches:
        enrolled, probed = (
            lists.image_I[np.isin(lists.template_I, one)] for one in (search.gallery_G, search.probes_P)
        )
        if len(both := np.intersect1d(enrolled, probed)):
            image = lists.images[both[0]]
            name = f", such as '{image}'" if isinstance(image, str) else ""
            doubts.append(f"{len(both)} images of probes are enrolled as well{name}: searches find them too easily")
    copies = 0 if closed is None or doubts else int(np.count_nonzero(closed.mated.mate_P >= COPY))
    return doubts + [f"{copies} probes score 1 with their own subject: they are copies of enrolled images"] * (
        copies > 0
    )
