"""The geometry of trained features: neural collapse, and the angles within and between identities.

Axes: N samples, C classes, D dimension. All sums in float64. The ideal of a trained classifier is the simplex
equiangular tight frame (Papyan, Han and Donoho, "Prevalence of neural collapse during the terminal phase of deep
learning training", PNAS 2020): each class one point, the points equally long and equally far apart in angle. M holds
the class means, centred; W the class centres. The measures, which all but the last tend to 0:

within_between: NC1, tr(S_W S_B^+) / C.
equinorm_features: NC2, coefficient of variation of the norms of M's rows; equinorm_centres: of W's.
equiangular_features: NC2, standard deviation of the cosines between different rows; equiangular_centres likewise.
maximal_angle_features: NC2, mean |cos + 1 / (C - 1)| over those cosines; maximal_angle_centres likewise.
self_duality: NC3, the Frobenius norm of W / |W| - M / |M|.
nearest_centre_agreement: NC4, share of samples for which W x + b decides like the nearest class mean; it tends to 1.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError

Matrix = NDArray[np.float64]
ROWS = 1 << 10  # of the class-by-class cosines, at a time
TINY = np.finfo(np.float64).tiny


def neural_collapse(
    features_ND: NDArray[np.floating],
    labels_N: NDArray[np.integer],
    centres_CD: NDArray[np.floating] | None = None,
    bias_C: NDArray[np.floating] | None = None,
) -> dict[str, float]:
    """How far features and class centres are from a simplex equiangular tight frame: the measures by name.

    Args:
        features_ND: embeddings, normalised or not.
        labels_N: class of each, 0 ... C - 1; every class of `centres_CD` must occur.
        centres_CD: the head's class centres W; without them only the first measures, of the features, are given.
        bias_C: the head's bias b, if it has one.

    Raises:
        UserError: fewer than two classes, or centres that do not fit the labels and features.
    """
    x_ND: Matrix = np.asarray(features_ND, dtype=np.float64)
    classes_C, index_N = np.unique(labels_N, return_inverse=True)
    if len(classes_C) < 2:
        raise UserError(f"{len(classes_C)} class has no geometry; neural collapse is measured on two classes or more")
    means_CD = class_means(x_ND, index_N, len(classes_C))
    centred_CD = means_CD - means_CD.mean(axis=0)
    within = _within_between(x_ND - means_CD[index_N], centred_CD)
    measures = {"within_between": within, **_frame(centred_CD, "features")}
    if centres_CD is None:
        return measures
    w_CD = np.asarray(centres_CD, dtype=np.float64)
    if w_CD.shape != means_CD.shape or classes_C[0] != 0 or classes_C[-1] != len(classes_C) - 1:
        raise UserError(
            f"class centres of shape {w_CD.shape} do not fit {len(classes_C)} classes (labels {classes_C[0]} to "
            f"{classes_C[-1]}) of dimension {x_ND.shape[1]}; pass one centre per class that occurs"
        )
    unit_w_CD, unit_m_CD = (matrix / max(float(np.linalg.norm(matrix)), TINY) for matrix in (w_CD, centred_CD))
    measures |= _frame(w_CD, "centres") | {"self_duality": float(np.linalg.norm(unit_w_CD - unit_m_CD))}
    scores_NC = x_ND @ w_CD.T + (0 if bias_C is None else bias_C)
    return measures | {"nearest_centre_agreement": _agreement(x_ND, means_CD, scores_NC)}


def class_means(features_ND: Matrix, index_N: NDArray[np.int64], classes: int) -> Matrix:
    """Mean of the features of each class, [C, D]."""
    order_N = np.argsort(index_N, kind="stable")
    starts_C = np.searchsorted(index_N[order_N], np.arange(classes))
    sums_CD = np.add.reduceat(features_ND[order_N], starts_C, axis=0)
    return np.asarray(sums_CD / np.bincount(index_N, minlength=classes)[:, None], dtype=np.float64)


def _within_between(deviations_ND: Matrix, centred_CD: Matrix) -> float:
    """tr(S_W S_B^+) / C with S_W the mean of dd^T over samples and S_B the mean of mm^T over classes.

    In the eigenbasis of S_B only the diagonal of S_W is needed: sum_i mean(<d, v_i>^2) / lambda_i.
    """
    classes = len(centred_CD)
    values_D, vectors_DD = np.linalg.eigh(centred_CD.T @ centred_CD / classes)
    kept_D = values_D > max(values_D[-1], 0) * len(values_D) * np.finfo(np.float64).eps * 16
    if not kept_D.any():
        return float("inf")  # all class means are one point: nothing separates the classes
    within_D = np.square(deviations_ND @ vectors_DD[:, kept_D]).mean(axis=0)
    return float(np.sum(within_D / values_D[kept_D]) / classes)


def _frame(rows_CD: Matrix, what: str) -> dict[str, float]:
    """The three measures of NC2 of these rows."""
    classes = len(rows_CD)
    norms_C = np.linalg.norm(rows_CD, axis=1)
    unit_CD = rows_CD / np.maximum(norms_C, TINY)[:, None]
    cosines = np.concatenate([_others(unit_CD, start) for start in range(0, classes, ROWS)])
    return {
        f"equinorm_{what}": float(norms_C.std() / max(norms_C.mean(), TINY)),
        f"equiangular_{what}": float(cosines.std()),
        f"maximal_angle_{what}": float(np.abs(cosines + 1 / (classes - 1)).mean()),
    }


def _others(unit_CD: Matrix, start: int) -> Matrix:
    """Cosines of ROWS rows from `start` on with every other row, flat."""
    cosines_bC = unit_CD[start : start + ROWS] @ unit_CD.T
    mine_b = np.arange(len(cosines_bC))
    other_bC = np.ones(cosines_bC.shape, dtype=bool)
    other_bC[mine_b, start + mine_b] = False
    return np.asarray(cosines_bC[other_bC], dtype=np.float64)


def _agreement(x_ND: Matrix, means_CD: Matrix, scores_NC: Matrix) -> float:
    nearest_N = np.argmax(x_ND @ means_CD.T - np.square(means_CD).sum(axis=1) / 2, axis=1)
    return float(np.mean(np.argmax(scores_NC, axis=1) == nearest_N))


@dataclass(frozen=True, slots=True)
class Angles:
    """Angles in degrees about the class centres, which are the normalised means of the normalised features.

    Attributes:
        intra_N: each sample with its own class centre.
        nearest_C: each class centre with the nearest other one.
        inter_histogram: all pairs of centres, counted in 180 bins of one degree.
    """

    intra_N: Matrix
    nearest_C: Matrix
    inter_histogram: NDArray[np.int64]

    @property
    def intra_mean(self) -> float:
        return float(self.intra_N.mean())

    @property
    def inter_smallest(self) -> float:
        return float(self.nearest_C.min())


def angles(features_ND: NDArray[np.floating], labels_N: NDArray[np.integer]) -> Angles:
    """Intra- and inter-class angles (Deng et al., ArcFace, CVPR 2019, table 3: Intra1 and Inter2).

    Raises:
        UserError: fewer than two classes, or a feature of length zero.
    """
    classes_C, index_N = np.unique(labels_N, return_inverse=True)
    if len(classes_C) < 2:
        raise UserError(f"{len(classes_C)} class has no angles to others; angles are measured on two classes or more")
    unit_ND = _unit_rows(np.asarray(features_ND, dtype=np.float64), "feature")
    centres_CD = _unit_rows(class_means(unit_ND, index_N, len(classes_C)), "mean of class")
    own_ND = centres_CD[index_N]
    # 2 atan2(|a - b|, |a + b|) keeps its digits near 0, where the arc cosine loses half of them
    apart_N = np.linalg.norm(unit_ND - own_ND, axis=1)
    intra_N = 2 * np.arctan2(apart_N, np.linalg.norm(unit_ND + own_ND, axis=1))
    nearest_C = np.empty(len(classes_C))
    histogram = np.zeros(180, np.int64)
    for start in range(0, len(classes_C), ROWS):
        cosines = _others(centres_CD, start).reshape(-1, len(classes_C) - 1)
        degrees = np.degrees(np.arccos(np.clip(cosines, -1, 1)))
        nearest_C[start : start + ROWS] = degrees.min(axis=1)
        histogram += np.histogram(degrees, bins=180, range=(0, 180))[0]
    return Angles(np.degrees(intra_N), nearest_C, histogram // 2)


def _unit_rows(rows: Matrix, what: str) -> Matrix:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not (norms > 1e-12).all():
        raise UserError(f"{what} {int(np.argmin(norms))} has length {norms.min():.3g}: it has no direction")
    return np.asarray(rows / norms, dtype=np.float64)
