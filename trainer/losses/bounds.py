"""Bounds on the constants of the losses: how large a scale must be, and how large a margin may be.

Axes: C classes, D dimension. Every bound names the paper that states it. What has no bound raises a UserError: too few
classes or dimensions, a probability outside (0, 1), a loss that is not positive.
"""

import math
from typing import Literal

from trainer.errors import UserError


def l2_softmax_scale(classes: int, probability: float) -> float:
    """The least scale for which L2-constrained softmax can reach a mean probability: log(p (C - 2) / (1 - p)).

    Ranjan, Castillo and Chellappa, "L2-constrained softmax loss for discriminative face verification" (2017), eq. 6.
    It takes each class's centre to have one opposite it and C - 2 at right angles, and leaves the opposite's
    exp(-scale) out.
    """
    _check(classes, 3, "the L2-softmax scale", probability)
    return math.log(probability * (classes - 2) / (1 - probability))


def cosface_scale(classes: int, probability: float) -> float:
    """The least scale for which normalised softmax can reach a probability: (C - 1) / C log((C - 1) P / (1 - P)).

    Wang et al., "CosFace" (CVPR 2018), section 3.3; it is reached where the classes are the corners of a simplex.
    """
    _check(classes, 2, "the CosFace scale", probability)
    return (classes - 1) / classes * math.log((classes - 1) * probability / (1 - probability))


def cosine_margin(classes: int, dimension: int) -> float:
    """The largest cosine margin that perfectly placed classes can satisfy: 1 - the least possible largest cosine.

    Wang et al., "CosFace" (CVPR 2018), section 3.3: 1 - cos(2 pi / C) in the plane; C / (C - 1) for C <= D + 1, reached
    by the simplex. For more classes the paper says "much less than C / (C - 1)"; Rankin ("The closest packing of
    spherical caps in n dimensions", 1955) makes that at most 1, reached up to C = 2 D by the axes and their opposites.
    """
    _check(classes, 2, "the cosine margin")
    if dimension < 2:
        raise UserError(f"dimension {dimension} has no angles; the cosine margin is bounded from 2 dimensions on")
    if dimension == 2:
        return 1 - math.cos(2 * math.pi / classes)
    return classes / (classes - 1) if classes <= dimension + 1 else 1.0


def coco_scale(classes: int, loss: float) -> float:
    """The least scale for which congenerous cosine loss can reach a value: log((C - 1) / (exp(loss) - 1)) / 2.

    Liu, Li and Wang, "Rethinking feature discrimination and polymerization for large-scale recognition" (2017),
    section 3.2: the best case has cosine 1 to the own centre and -1 to all others.
    """
    _check(classes, 2, "the CoCo scale")
    if not loss > 0:
        raise UserError(f"loss {loss:g} cannot be reached by any scale; ask for one above 0")
    return math.log((classes - 1) / math.expm1(loss)) / 2


def auto_scale(name: str, scale: float | Literal["auto"], classes: int, probability: float) -> float:
    """The scale as given; for `auto` the least one at which a perfect embedding reaches the posterior probability."""
    if scale != "auto":
        return scale
    return positive_scale(f"{name}: scale", cosface_scale(classes, probability), classes, f"probability {probability}")


def positive_scale(what: str, scale: float, classes: int, goal: str) -> float:
    """A scale computed for `auto`; one that is not positive would turn the loss around: a UserError."""
    if scale <= 0:
        raise UserError(
            f"{what} 'auto' is {scale:.3g} for {classes} classes and {goal}; it must be positive, so give a number "
            "for it or change what it is computed from"
        )
    return scale


def check_cosine_margin(name: str, margin: float, classes: int, dimension: int) -> None:
    """A margin of the cosine that no arrangement of the centres can satisfy (`cosine_margin`) is a UserError."""
    greatest = cosine_margin(classes, dimension)
    if margin > greatest:
        raise UserError(
            f"{name}: margin {margin} of the cosine is more than {greatest:.4g}, the most that {classes} centres in "
            f"{dimension} dimensions allow; choose a smaller margin"
        )


def _check(classes: int, least: int, what: str, probability: float = 0.5) -> None:
    if classes < least:
        raise UserError(f"{what} is not defined for {classes} classes; it takes {least} or more")
    if not 0 < probability < 1:
        raise UserError(f"probability {probability:g} cannot be reached by a scale; choose one between 0 and 1")
