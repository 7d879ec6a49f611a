"""Bounds on the constants of the losses: how large a scale must be, and how large a margin may be.

Axes: C classes, D dimension. Every bound names the paper that states it.
"""

import math

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError


def l2_softmax_scale(classes: int, probability: float) -> float:
    """The least scale for which L2-constrained softmax can reach a mean probability: log(p (C - 2) / (1 - p)).

    Ranjan, Castillo and Chellappa, "L2-constrained softmax loss for discriminative face verification" (2017), eq. 6.
    It takes each class's centre to have one opposite it and C - 2 at right angles, and leaves the opposite's
    exp(-scale) out.

    Raises:
        UserError: fewer than three classes, or a probability outside (0, 1).
    """
    _check_classes(classes, 3, "the L2-softmax scale")
    _check_probability(probability)
    return math.log(probability * (classes - 2) / (1 - probability))


def cosface_scale(classes: int, probability: float) -> float:
    """The least scale for which normalised softmax can reach a probability: (C - 1) / C log((C - 1) P / (1 - P)).

    Wang et al., "CosFace" (CVPR 2018), section 3.3; it follows from `normface_loss` with scale = l^2, and holds with
    equality where the classes are the corners of a simplex.

    Raises:
        UserError: fewer than two classes, or a probability outside (0, 1).
    """
    _check_classes(classes, 2, "the CosFace scale")
    _check_probability(probability)
    return (classes - 1) / classes * math.log((classes - 1) * probability / (1 - probability))


def normface_loss(classes: int, norm: float) -> float:
    """The least that softmax cross entropy can reach with features and class centres of length l, one sample a class:
    log(1 + (C - 1) exp(-C / (C - 1) l^2)).

    Wang et al., "NormFace: L2 hypersphere embedding for face verification" (2017), proposition 2. Without a scale
    (l = 1) it stays far above 0: 4.6 for 273 classes, where a guess costs 5.6.

    Raises:
        UserError: fewer than two classes, or a length that is not positive.
    """
    _check_classes(classes, 2, "the NormFace bound")
    if not norm > 0:
        raise UserError(f"length {norm:g} of features and centres has no bound; it must be above 0")
    return math.log1p((classes - 1) * math.exp(-classes / (classes - 1) * norm**2))


def cosine_margin(classes: int, dimension: int) -> float:
    """The largest cosine margin that perfectly placed classes can satisfy: 1 - the least possible largest cosine.

    Wang et al., "CosFace" (CVPR 2018), section 3.3: 1 - cos(2 pi / C) in the plane; C / (C - 1) for C <= D + 1, reached
    by the simplex. For more classes the paper says "much less than C / (C - 1)"; Rankin ("The closest packing of
    spherical caps in n dimensions", 1955) makes that at most 1, reached up to C = 2 D by the axes and their opposites.

    Raises:
        UserError: fewer than two classes or dimensions.
    """
    _check_classes(classes, 2, "the cosine margin")
    if dimension < 2:
        raise UserError(f"dimension {dimension} has no angles; the cosine margin is bounded from 2 dimensions on")
    if dimension == 2:
        return 1 - math.cos(2 * math.pi / classes)
    return classes / (classes - 1) if classes <= dimension + 1 else 1.0


def coco_scale(classes: int, loss: float) -> float:
    """The least scale for which congenerous cosine loss can reach a value: log((C - 1) / (exp(loss) - 1)) / 2.

    Liu, Li and Wang, "Rethinking feature discrimination and polymerization for large-scale recognition" (2017),
    section 3.2: the best case has cosine 1 to the own centre and -1 to all others.

    Raises:
        UserError: fewer than two classes, or a loss that is not positive.
    """
    _check_classes(classes, 2, "the CoCo scale")
    if not loss > 0:
        raise UserError(f"loss {loss:g} cannot be reached by any scale; ask for one above 0")
    return math.log((classes - 1) / math.expm1(loss)) / 2


def a_softmax_margin(classes: int) -> float:
    """The least m for which A-Softmax makes every class narrower than its distance to the next: 2 + sqrt(3) for two
    classes, 3 for more.

    Liu et al., "SphereFace" (CVPR 2017), properties 2 and 3; the latter takes neighbouring centres on a great circle to
    be evenly spaced.

    Raises:
        UserError: fewer than two classes.
    """
    _check_classes(classes, 2, "the margin of A-Softmax")
    return 2 + math.sqrt(3) if classes == 2 else 3.0


def simplex(classes: int, dimension: int) -> NDArray[np.float64]:
    """The corners of a regular simplex on the unit sphere, [C, D]: every cosine between two is -1 / (C - 1).

    Raises:
        UserError: fewer than two classes, or fewer dimensions than C - 1.
    """
    _check_classes(classes, 2, "a simplex")
    if dimension < classes - 1:
        raise UserError(f"a simplex of {classes} corners does not fit {dimension} dimensions; it takes {classes - 1}")
    centred_CC = np.eye(classes) - 1 / classes
    corners_CC = np.linalg.svd(centred_CC)[0][:, : classes - 1] * math.sqrt(classes / (classes - 1))
    return np.pad(corners_CC, ((0, 0), (0, dimension - classes + 1)))


def _check_classes(classes: int, least: int, what: str) -> None:
    if classes < least:
        raise UserError(f"{what} is not defined for {classes} classes; it takes {least} or more")


def _check_probability(probability: float) -> None:
    if not 0 < probability < 1:
        raise UserError(f"probability {probability:g} cannot be reached by a scale; choose one between 0 and 1")
