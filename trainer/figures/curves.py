"""The curves of all margins, as numbers: what their figures show.

Every number comes from the margins' own `target`, `reweight` and `per_sample`, and every slope from autograd; which
cases of a margin are drawn, and their labels, are said by its class.

Legend: T angles on a grid, in degrees where they are kept.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.losses import all_margins
from trainer.losses.margins import Case, Margin, PanelName, Positives

RAW_LENGTH = 30.0  # |x| |w| for losses on embeddings as they are
CLASSES = 10_000  # C, for the gradient: the other C - 1 centres are at right angles to the sample
ANGLES = 2873  # points on the grid of theta
PANELS: dict[PanelName, str] = {
    "softmax": "no margin",
    "multiple": "times the angle",
    "additive": "added",
    "adaptive": "by sample or class",
    "reweighting": "hard negatives too",
}
assert tuple(PANELS) == get_args(PanelName)

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class MarginCurve:
    """One margin over theta.

    Attributes:
        name: of the loss, as the config writes it.
        label: for the legend; may hold mathtext.
        length: what the target's cosine is multiplied by: the scale, or |x| |w|.
        psi_T: target logit / length.
        target_T: target logit.
        slope_T: d psi / d cos(theta).
        gradient_T: dL / d cos(theta).
    """

    name: str
    label: str
    length: float
    theta_T: Vector
    psi_T: Vector
    target_T: Vector
    slope_T: Vector
    gradient_T: Vector


@dataclass(frozen=True)
class CurveGroup:
    """Curves that share a panel."""

    name: str
    title: str
    curves: list[MarginCurve]


@dataclass(frozen=True)
class Variant:
    """A margin in one of its cases."""

    margin: Margin
    case: Case

    @property
    def length(self) -> float:
        """What the target's cosine is multiplied by: the scale, or |x| |w|."""
        return float(self.margin.scale_of(self._values(torch.float64))) if self.margin.unit_embedding else RAW_LENGTH

    def target(self, cos_T: Tensor) -> Tensor:
        """The target's logit at these cosines, by the margin itself."""
        lengths_T = torch.full_like(cos_T, self.length)
        return self.margin.target(
            Positives(
                cos_T,
                lengths_T * cos_T,
                lengths_T,
                torch.full_like(cos_T, self.case.norm),
                torch.zeros(cos_T.shape, dtype=torch.int64),
                self._values(cos_T.dtype),
                torch.full_like(cos_T, self.case.noise),
                torch.full_like(cos_T, self.case.share),
            )
        )

    def other(self, cos_T: Tensor, target_T: Tensor) -> Tensor:
        """The logit of another class at these cosines, re-weighted where the margin does that."""
        if self.margin.reweights:
            cos_T = self.reweighted(cos_T, cos_T > target_T.detach() / self.length)[0]
        return self.length * cos_T

    def reweighted(self, cos_T: Tensor, hard_T: Tensor) -> tuple[Tensor, Tensor]:
        """What the margin makes of other classes' cosines, and the slope."""
        return self.margin.reweight(cos_T, hard_T, self._values(cos_T.dtype))

    def loss(self, cos_T: Tensor, classes: int) -> Tensor:
        """The loss where the other classes' cosines are 0, and the bias too."""
        target_T = self.target(cos_T)
        negatives_T = math.log(classes - 1) + self.other(torch.zeros_like(cos_T), target_T)
        return self.margin.per_sample(negatives_T, target_T, torch.full_like(cos_T, self.case.share))

    def _values(self, dtype: torch.dtype) -> dict[str, Tensor]:
        numbers = self.margin.learnables() | self.margin.buffers() | dict(self.case.values)
        return {name: torch.tensor(value, dtype=dtype) for name, value in numbers.items()}


def variants(kind: type[Margin]) -> list[Variant]:
    """The cases in which a margin is drawn; one that names none has its defaults as the one case."""
    cases = kind.cases or (Case(curve=kind.title, row=""),)
    return [Variant(kind(**case.constants), case) for case in cases]


def panels() -> Iterator[tuple[PanelName, str, list[Variant]]]:
    """All margins of the project by the panel that shows their curves: its name, its title, what it shows."""
    for panel, title in PANELS.items():
        kinds = [kind for kind in all_margins() if kind.panel == panel]
        yield panel, title, [one for kind in kinds for one in variants(kind) if one.case.curve is not None]


def curve_groups(classes: int = CLASSES, angles: int = ANGLES) -> list[CurveGroup]:
    """psi, target logit, and the slopes of every margin, over theta from 0.25 to 179.75 degrees.

    The slope of psi = t / length is taken by cos(theta); the loss's slope is dL/dcos(theta), for C classes whose other
    centres are at right angles to the sample. The ends are left out: there an additive angle has a pole.
    """
    theta_T = torch.linspace(math.radians(0.25), math.radians(179.75), angles, dtype=torch.float64)
    return [
        CurveGroup(name, title, [_curve(variant, theta_T, classes) for variant in members])
        for name, title, members in panels()
    ]


def _curve(variant: Variant, theta_T: Tensor, classes: int) -> MarginCurve:
    cos_T = theta_T.cos().requires_grad_()
    target_T = variant.target(cos_T)
    (slope_T,) = torch.autograd.grad(target_T.sum(), cos_T)
    (gradient_T,) = torch.autograd.grad(variant.loss(cos_T, classes).sum(), cos_T)
    target_T, length = target_T.detach(), variant.length
    return MarginCurve(
        name=variant.margin.name,
        label=variant.case.curve or "",
        length=length,
        theta_T=theta_T.rad2deg().numpy(),
        psi_T=(target_T / length).numpy(),
        target_T=target_T.numpy(),
        slope_T=(slope_T / length).numpy(),
        gradient_T=gradient_T.numpy(),
    )


def negative_curves() -> CurveGroup:
    """What becomes of a hard negative's cosine under each margin that re-weights.

    `theta_T` holds the angle to the other class, `psi_T` the re-weighted cosine and `slope_T` its slope.
    """
    theta_T = torch.linspace(0, math.pi, ANGLES, dtype=torch.float64)
    curves = []
    for kind in all_margins():
        for case in kind.negatives or (Case(curve=kind.title),) if kind.reweights else ():
            variant = Variant(kind(), case)
            changed_T, slope_T = variant.reweighted(theta_T.cos(), torch.ones(ANGLES, dtype=torch.bool))
            slopes = (slope_T + torch.zeros_like(changed_T)).numpy()
            curves.append(
                MarginCurve(
                    name=variant.margin.name,
                    label=case.curve or "",
                    length=variant.length,
                    theta_T=theta_T.rad2deg().numpy(),
                    psi_T=changed_T.numpy(),
                    target_T=(variant.length * changed_T).numpy(),
                    slope_T=slopes,
                    gradient_T=slopes,
                )
            )
    return CurveGroup("negatives", "a hard negative's cosine", curves)
