"""The protocols by which an Embedder is judged on held-out identities.

One-shot: one enrolled sample per identity, all others are probes, every identity in one gallery. Open set: a share of
the identities is not enrolled, and all their samples are probes that must come back as unknown. Verification: all
pairs, and LFW's ten folds of drawn ones. Everything is decided by the order of the samples and the seed.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError
from trainer.evaluation import metrics, report
from trainer.evaluation.geometry import angles
from trainer.evaluation.scores import Labels, MatedSearches, Vectors, check, pair_counts, search_mated, search_non_mated

RANKS = 20  # of the CMC
CONFUSIONS = 20
FOLDS = 10
FARS = (1e-2, 1e-3, 1e-4)
FPIRS = (0.01, 0.1)
DRAWS = 5  # other choices of the enrolled samples, for the spread of rank-1
REPLICATES = 1000  # of the bootstrap over subjects
UNENROLLED = 0.5  # share of the identities
MOST_PAIR_SAMPLES = 30_000  # their pairs are counted in some seconds
PAIRS_PER_FOLD = 300  # mated, and as many non-mated, as in LFW


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
    vectors_ND: Vectors, labels_N: Labels, enrolled_C: NDArray[np.int64]
) -> tuple[Labels, MatedSearches]:
    """Labels of the probes (every sample that is not enrolled), and what their searches found."""
    probe_N = np.ones(len(labels_N), dtype=bool)
    probe_N[enrolled_C] = False
    if not probe_N.any():
        raise UserError(
            f"{len(labels_N)} samples of {len(enrolled_C)} identities leave no probe; "
            "one-shot identification takes a second sample of at least one identity"
        )
    searches = search_mated(vectors_ND[enrolled_C], labels_N[enrolled_C], vectors_ND[probe_N], labels_N[probe_N])
    return labels_N[probe_N], searches


def open_set_searches(
    vectors_ND: Vectors, labels_N: Labels, share: float, seed: int
) -> tuple[Labels, MatedSearches, Labels, Vectors]:
    """Labels and findings of the mated probes, labels and best scores of the non-mated ones.

    The first sample of each identity is enrolled, but for a share of the identities, drawn by the seed.
    """
    stranger_N = np.isin(labels_N, unenrolled_identities(labels_N, share, seed))
    known_ND, known_N = vectors_ND[~stranger_N], labels_N[~stranger_N]
    enrolled_C = enrolled_rows(known_N)
    mated_labels_P, mated = one_shot_searches(known_ND, known_N, enrolled_C)
    non_mated_P = search_non_mated(known_ND[enrolled_C], known_N[enrolled_C], vectors_ND[stranger_N])
    return mated_labels_P, mated, labels_N[stranger_N], non_mated_P


def quick(vectors_ND: Vectors, labels_N: Labels) -> tuple[float, float | None]:
    """Rank-1, and FNIR at FPIR 1 % (None where the probes cannot show it), as `evaluate` finds them with seed 0.

    Raises:
        UserError: see `scores.check`; no identity with two samples, or fewer than two identities.
    """
    vectors_ND, labels_N = check(vectors_ND, labels_N)
    _, searches = one_shot_searches(vectors_ND, labels_N, enrolled_rows(labels_N))
    _, mated, _, non_mated_P = open_set_searches(vectors_ND, labels_N, UNENROLLED, seed=0)
    return float(metrics.rank1_P(searches).mean()), metrics.fnir_at_fpir(mated, non_mated_P, 0.01).fnir


def evaluate(
    vectors_ND: Vectors,
    labels_N: Labels,
    class_names: Sequence[str],
    *,
    seed: int = 0,
    unenrolled_share: float = UNENROLLED,
    source: str = "",
    model_id: str | None = None,
) -> report.Report:
    """All protocols on one set of held-out samples.

    Args:
        vectors_ND: unit vectors, in the order of the data set: the first of each identity is the enrolled one.
        labels_N: identity of each, an index into `class_names`.
        source: the data set and split, in words.

    Raises:
        UserError: input that cannot be compared, or too few identities or samples for a protocol.
    """
    vectors_ND, labels_N = check(vectors_ND, labels_N)
    if len(wrong := labels_N[(labels_N < 0) | (labels_N >= len(class_names))]):
        raise UserError(f"label {wrong[0]} has no name among {len(class_names)} classes; pass the same split's names")
    found = angles(vectors_ND, labels_N)
    return report.Report(
        source=source,
        model_id=model_id,
        seed=seed,
        identities=len(found.nearest_C),
        samples=len(labels_N),
        dimension=vectors_ND.shape[1],
        verification=verification(vectors_ND, labels_N, seed),
        one_shot=one_shot(vectors_ND, labels_N, class_names, seed),
        open_set=open_set(vectors_ND, labels_N, unenrolled_share, seed),
        geometry=report.Geometry(
            intra_mean=found.intra_mean,
            inter_smallest=found.inter_smallest,
            inter_nearest_mean=float(found.nearest_C.mean()),
        ),
    )


def verification(vectors_ND: Vectors, labels_N: Labels, seed: int) -> report.AllPairs:
    """Verification over all pairs of the samples, or of whole identities up to `MOST_PAIR_SAMPLES` of them."""
    rows = whole_identities(labels_N, MOST_PAIR_SAMPLES, seed)
    vectors_ND, labels_N = vectors_ND[rows], labels_N[rows]
    counts = pair_counts(vectors_ND, labels_N)
    curve = metrics.verification_curve(counts)
    kept = report.thinned(curve.fmr_T, curve.fnmr_T)
    return report.AllPairs(
        samples=len(labels_N),
        mated_pairs=curve.mated,
        non_mated_pairs=curve.non_mated,
        eer=metrics.equal_error_rate(curve),
        auc=metrics.area_under_curve(curve),
        tar_at_far=[metrics.tar_at_far(curve, far) for far in FARS],
        ten_fold=ten_fold(vectors_ND, labels_N, seed),
        thresholds=report.rounded(curve.thresholds_T[kept], 9),
        fmr=report.rounded(curve.fmr_T[kept]),
        fnmr=report.rounded(curve.fnmr_T[kept]),
        histogram=report.histogram_of(counts),
    )


def ten_fold(vectors_ND: Vectors, labels_N: Labels, seed: int) -> report.TenFold | None:
    """LFW-style accuracy: ten folds of identities, each of up to 300 mated and as many non-mated pairs."""
    generator = np.random.default_rng(seed)
    parts = np.array_split(generator.permutation(np.unique(labels_N)), FOLDS)
    scores, mated, folds = [], [], []
    for fold, identities in enumerate(parts):
        rows = np.flatnonzero(np.isin(labels_N, identities))
        same, different = _drawn_pairs(labels_N[rows], generator)
        size = min(len(same), len(different))
        if size == 0:
            return None
        pairs = rows[np.concatenate([same[:size], different[:size]])]
        scores.append(np.einsum("pd,pd->p", vectors_ND[pairs[:, 0]], vectors_ND[pairs[:, 1]]))
        mated.append(np.arange(2 * size) < size)
        folds.append(np.full(2 * size, fold))
    accuracies = metrics.ten_fold_accuracy(np.concatenate(scores), np.concatenate(mated), np.concatenate(folds))
    error = float(accuracies.std(ddof=1) / np.sqrt(FOLDS))
    return report.TenFold(accuracy=float(accuracies.mean()), standard_error=error, pairs=sum(map(len, folds)))


def _drawn_pairs(labels_n: Labels, generator: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Up to 300 different mated and 300 different non-mated pairs of positions, in random order."""
    if len(labels_n) < 2:
        none = np.empty((0, 2), np.int64)
        return none, none
    order_n = np.argsort(labels_n, kind="stable")
    first_n = np.searchsorted(labels_n[order_n], labels_n[order_n])
    count_n = np.searchsorted(labels_n[order_n], labels_n[order_n], side="right") - first_n
    one = generator.integers(len(labels_n), size=4 * PAIRS_PER_FOLD)
    mate = first_n[one] + generator.integers(count_n[one])
    other = generator.integers(len(labels_n), size=4 * PAIRS_PER_FOLD)
    same = _distinct(order_n[np.stack([one, mate], axis=1)], generator)
    different = np.stack([one, other], axis=1)
    return same, _distinct(different[labels_n[one] != labels_n[other]], generator)


def _distinct(pairs: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
    unique = np.unique(np.sort(pairs[pairs[:, 0] != pairs[:, 1]], axis=1), axis=0)
    return np.asarray(generator.permutation(unique)[:PAIRS_PER_FOLD], dtype=np.int64)


def whole_identities(labels_N: Labels, most: int, seed: int) -> NDArray[np.int64]:
    """Rows of identities drawn by the seed while they hold at most `most` samples; all rows where that is enough."""
    if len(labels_N) <= most:
        return np.arange(len(labels_N))
    identities_C, counts_C = np.unique(labels_N, return_counts=True)
    order_C = np.random.default_rng(seed).permutation(len(identities_C))
    kept = max(2, int(np.searchsorted(np.cumsum(counts_C[order_C]), most, side="right")))
    return np.flatnonzero(np.isin(labels_N, identities_C[order_C[:kept]]))


def one_shot(vectors_ND: Vectors, labels_N: Labels, class_names: Sequence[str], seed: int) -> report.OneShot:
    """The closed-set protocol, with the first samples enrolled and with `DRAWS` choices of random ones."""
    enrolled_C = enrolled_rows(labels_N)
    probe_labels_P, searches = one_shot_searches(vectors_ND, labels_N, enrolled_C)
    hits_P = metrics.rank1_P(searches)
    low, high = metrics.mean_interval(hits_P, probe_labels_P, seed=seed, replicates=REPLICATES)
    draws = [enrolled_rows(labels_N, seed + draw) for draw in range(DRAWS)]
    others = [float(metrics.rank1_P(one_shot_searches(vectors_ND, labels_N, rows)[1]).mean()) for rows in draws]
    every = [float(hits_P.mean()), *others]
    return report.OneShot(
        gallery_size=len(enrolled_C),
        probes=len(probe_labels_P),
        rank1=every[0],
        low=low,
        high=high,
        cmc=report.rounded(metrics.match_characteristic(searches, min(RANKS, len(enrolled_C)))),
        rank1_draws=others,
        rank1_mean=float(np.mean(every)),
        rank1_std=float(np.std(every, ddof=1)),
        confusions=_confusions(probe_labels_P, searches, class_names),
    )


def open_set(vectors_ND: Vectors, labels_N: Labels, share: float, seed: int) -> report.OpenSet:
    """The open-set protocol, with the identities that are not enrolled drawn by the seed."""
    mated_labels_P, mated, strangers_P, non_mated_P = open_set_searches(vectors_ND, labels_N, share, seed)
    points = []
    for fpir in FPIRS:
        point = metrics.fnir_at_fpir(mated, non_mated_P, fpir)
        if point.fnir is not None:
            found = (mated.mate_P, mated_labels_P), (non_mated_P, strangers_P)
            low, high = metrics.fnir_interval(*found, fpir, seed=seed, replicates=REPLICATES)
            point = point.model_copy(update={"low": low, "high": high})
        points.append(point)
    thresholds_T, fpir_T, fnir_T = metrics.identification_curve(mated.mate_P, non_mated_P)
    kept = report.thinned(fpir_T, fnir_T)
    unenrolled = len(np.unique(strangers_P))
    return report.OpenSet(
        unenrolled_share=share,
        gallery_size=len(np.unique(labels_N)) - unenrolled,
        unenrolled=unenrolled,
        mated_probes=len(mated_labels_P),
        non_mated_probes=len(strangers_P),
        points=points,
        thresholds=report.rounded(thresholds_T[kept], 9),
        fpir=report.rounded(fpir_T[kept]),
        fnir=report.rounded(fnir_T[kept]),
    )


def _confusions(probe_labels_P: Labels, searches: MatedSearches, class_names: Sequence[str]) -> list[report.Confusion]:
    """The identities most often taken for one other, by number of probes."""
    wrong_P = searches.ahead_P > 0
    taken = Counter(zip(probe_labels_P[wrong_P].tolist(), searches.rival_P[wrong_P].tolist(), strict=True))
    probes = Counter(probe_labels_P.tolist())
    worst = sorted(taken.items(), key=lambda item: (-item[1], item[0]))[:CONFUSIONS]
    return [
        report.Confusion(identity=class_names[mine], taken_for=class_names[other], probes=count, of=probes[mine])
        for (mine, other), count in worst
    ]
