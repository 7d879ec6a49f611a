"""Wrong labels, found by embeddings: samples far from their class, and classes that are one person. numpy alone.

Axes: N samples, C classes, D dimensions of the embedding, B samples of a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data.reader import Progress
from trainer.errors import UserError

DISTANCE = 5.0  # robust standard deviations; see docs/data.md for what it finds
ALIKE = 0.9
_PASSES = 5
_PRIOR = 10  # a class's spread counts as many samples as it has, that of all classes as this many
_GAUSSIAN = 1.4826  # times the median absolute deviation: the standard deviation, of a normal distribution
_NORMAL = 3.0  # a sample within so many deviations of a class is an ordinary one of it
_BLOCK = 2**24  # numbers of one product in memory: 64 MB


@dataclass(frozen=True, slots=True)
class Suspects:
    """Samples whose label is likely wrong, the most likely first.

    Attributes:
        positions: of the samples, in the order of the vectors.
        own: cosine to the mean of the other samples of the class.
        deviations: how far `own` lies below the class's median, in robust standard deviations.
        nearest, other: label of the nearest other class, and the cosine to its mean.
        fits: whether the sample would be an ordinary one of that class (within 3 deviations of its median).
    """

    positions: NDArray[np.int64]
    own: NDArray[np.float32]
    deviations: NDArray[np.float32]
    nearest: NDArray[np.int64]
    other: NDArray[np.float32]
    fits: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Twins:
    """Pairs of labels, `first` < `second`, that are likely one person, the most likely first."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    similarity: NDArray[np.float64]


def find_suspects(
    x_ND: NDArray[np.float32],
    labels_N: NDArray[np.int64],
    classes: int,
    deviations: float = DISTANCE,
    progress: Progress | None = None,
) -> Suspects:
    """Samples that lie far from their class, and nearer to another one.

    For sample i of class y, a_i is its cosine to the mean of y's *other* samples, and d_i = (median_y a - a_i) / s_y
    with s_y the median absolute deviation of y, scaled to a standard deviation and drawn towards that of all classes
    where y has few samples. A suspect has d_i > `deviations` and a cosine to another class's mean above a_i. Suspects
    are taken out of the means and medians, and all is computed again until they stay the same (five times at most).
    So an odd picture of the right person, which no other class is nearer to, is none.

    Args:
        x_ND: unit vectors; may be memory-mapped.
        labels_N: from 0 to classes - 1.

    Raises:
        UserError: `deviations` is not above 0.
    """
    if not deviations > 0:
        raise UserError(f"--distance {deviations:g} is not allowed; give a number above 0, for example {DISTANCE:g}")
    kept_N = np.ones(len(labels_N), bool)
    for turn in range(_PASSES):
        sums_CD, counts_C = class_sums(x_ND, labels_N, classes, kept_N)
        own_N = _leave_one_out(x_ND, labels_N, kept_N, sums_CD)
        median_C, spread_C = _medians_and_spreads(own_N[kept_N], labels_N[kept_N], classes)
        deviations_N = (median_C[labels_N] - own_N) / spread_C[labels_N]
        far = np.flatnonzero(deviations_N > deviations)
        nearest, other = _nearest_others(x_ND, labels_N, far, sums_CD, counts_C)
        worse = other > own_N[far]
        far, nearest, other = far[worse], nearest[worse], other[worse]
        before, kept_N = kept_N, np.ones(len(labels_N), bool)
        kept_N[far] = False
        if progress is not None:
            progress("compare", turn + 1, _PASSES)
        if (before == kept_N).all():
            break
    fits = (median_C[nearest] - other) / spread_C[nearest] < _NORMAL
    order = np.argsort(own_N[far] - other, kind="stable")
    far = far[order]
    return Suspects(far, own_N[far], deviations_N[far].astype(np.float32), nearest[order], other[order], fits[order])


def find_twins(
    x_ND: NDArray[np.float32],
    labels_N: NDArray[np.int64],
    classes: int,
    kept_N: NDArray[np.bool_],
    alike: float = ALIKE,
    progress: Progress | None = None,
) -> Twins:
    """Classes whose means lie as near to each other as the scatter inside them says that one person's would.

    b_pq, the mean cosine of a sample of p with one of q, is about w_p, the mean cosine of two samples of p, where p and
    q are one person. The statistic is b_pq / sqrt(w_p w_q): the cosine of the two means, freed of the shortening that
    few samples give a mean, so that it does not sink with small classes. w_p is drawn towards that of all classes where
    p has few samples. C x C x D / 2 products are taken: 0.9 hours for 500,000 classes of 512 dimensions at 40 Gflop/s.

    Args:
        kept_N: the samples that count; suspects are best left out.
        alike: pairs above this are returned; 1 is what one person has on average.

    Raises:
        UserError: `alike` is not from 0 to 2.
    """
    if not 0 < alike <= 2:
        raise UserError(f"--alike {alike:g} is not allowed; give a number above 0 and up to 2, for example {ALIKE:g}")
    sums_CD, counts_C = class_sums(x_ND, labels_N, classes, kept_N)
    pairs_C = counts_C * (counts_C - 1) / 2
    within_C = (np.square(sums_CD).sum(axis=1, dtype=np.float64) - counts_C) / 2  # sum over a class's pairs
    typical = within_C.sum() / max(1.0, pairs_C.sum())
    within_C = np.maximum((within_C + _PRIOR * typical) / (pairs_C + _PRIOR), 1e-6)
    scale_C = 1 / (np.maximum(counts_C, 1) * np.sqrt(within_C))
    scaled_CD = sums_CD * scale_C[:, np.newaxis].astype(np.float32)
    first, second, similarity = [], [], []
    for rows in _blocks(classes, classes):
        found_BC = np.triu(scaled_CD[rows] @ scaled_CD[rows.start :].T, 1)
        row, column = np.nonzero(found_BC > alike)
        first.append(row + rows.start)
        second.append(column + rows.start)
        similarity.append(found_BC[row, column])
        if progress is not None:
            progress("classes", rows.stop, classes)
    values = np.concatenate(similarity).astype(np.float64)
    order = np.argsort(-values, kind="stable")
    return Twins(np.concatenate(first)[order], np.concatenate(second)[order], values[order])


def class_sums(
    x_ND: NDArray[np.float32], labels_N: NDArray[np.int64], classes: int, kept_N: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Sum [C, D] and number [C] of the kept vectors of each class, in blocks of a memory-mapped array."""
    sums_CD = np.zeros((classes, x_ND.shape[1]), np.float32)
    for block in _blocks(len(x_ND), x_ND.shape[1]):
        labels_B = labels_N[block][kept_N[block]]
        order = np.argsort(labels_B, kind="stable")
        present, starts = np.unique(labels_B[order], return_index=True)
        if len(present):
            sums_CD[present] += np.add.reduceat(x_ND[block][kept_N[block]][order], starts, axis=0)
    return sums_CD, np.bincount(labels_N[kept_N], minlength=classes)


def _leave_one_out(
    x_ND: NDArray[np.float32], labels_N: NDArray[np.int64], kept_N: NDArray[np.bool_], sums_CD: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Cosine of each sample to the mean of the others of its class that are kept; 1 where there is none."""
    own_N = np.empty(len(x_ND), np.float32)
    for block in _blocks(len(x_ND), x_ND.shape[1]):
        x_BD = x_ND[block]
        rest_BD = sums_CD[labels_N[block]] - x_BD * kept_N[block, np.newaxis]
        length_B = np.linalg.norm(rest_BD, axis=1)
        dots_B = np.einsum("bd,bd->b", x_BD, rest_BD)
        alone_B = length_B < 1e-3  # what rounding leaves of a sum of unit vectors, once all are taken off again
        own_N[block] = np.where(alone_B, 1, dots_B / np.where(alone_B, 1, length_B))
    return own_N


def _medians_and_spreads(
    values: NDArray[np.float32], labels: NDArray[np.int64], classes: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Median and robust standard deviation of each class; the median over all where a class has no value."""
    overall = float(np.median(values)) if len(values) else 1.0
    median_C, counts_C = _class_medians(values, labels, classes, overall)
    off = np.abs(values - median_C[labels])
    typical = float(np.median(off)) if len(off) else 0.0
    off_C, _ = _class_medians(off, labels, classes, typical)
    spread_C = _GAUSSIAN * (counts_C * off_C + _PRIOR * typical) / (counts_C + _PRIOR)
    return median_C, np.maximum(spread_C, 1e-6)


def _class_medians(
    values: NDArray[np.floating], labels: NDArray[np.int64], classes: int, empty: float
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    ordered = values[np.lexsort((values, labels))].astype(np.float64)
    counts_C = np.bincount(labels, minlength=classes)
    starts_C = np.cumsum(counts_C) - counts_C
    median_C = np.full(classes, empty)
    full = counts_C > 0
    low, high = (starts_C + (counts_C - 1) // 2)[full], (starts_C + counts_C // 2)[full]
    median_C[full] = (ordered[low] + ordered[high]) / 2
    return median_C, counts_C


def _nearest_others(
    x_ND: NDArray[np.float32],
    labels_N: NDArray[np.int64],
    rows: NDArray[np.int64],
    sums_CD: NDArray[np.float32],
    counts_C: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Of these rows alone: the nearest class that is not the sample's own, and the cosine to its mean."""
    means_CD = sums_CD / np.maximum(np.linalg.norm(sums_CD, axis=1, keepdims=True), 1e-12)
    nearest, cosine = np.empty(len(rows), np.int64), np.empty(len(rows), np.float32)
    for block in _blocks(len(rows), len(means_CD)):
        cosines_BC = x_ND[rows[block]] @ means_CD.T
        cosines_BC[:, counts_C == 0] = -2
        cosines_BC[np.arange(len(cosines_BC)), labels_N[rows[block]]] = -2
        nearest[block] = cosines_BC.argmax(axis=1)
        cosine[block] = cosines_BC.max(axis=1)
    return nearest, cosine


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    """Runs of rows with about `_BLOCK` numbers each."""
    step = max(1, _BLOCK // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
