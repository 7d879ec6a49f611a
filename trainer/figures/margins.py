"""What margins do, as numbers: their curves over the angle, and the table of binary decision boundaries.

Every number comes from the margins' own `target`, `reweight` and `per_sample`, and every slope from autograd; which
cases of a margin are shown, their labels, and the formula of the boundary are said by its class.

Legend: T angles on a grid, in degrees where they are kept.
"""

import math
import re
from collections.abc import Iterator, Sequence
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
RIGHT_ANGLE = math.pi / 2
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
        slope_T: d psi / d cos(theta).
        gradient_T: dL / d cos(theta).
    """

    name: str
    label: str
    length: float
    theta_T: Vector
    psi_T: Vector
    slope_T: Vector
    gradient_T: Vector

    @property
    def target_T(self) -> Vector:
        """The target logit."""
        return self.length * self.psi_T


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
    return MarginCurve(
        name=variant.margin.name,
        label=variant.case.curve or "",
        length=variant.length,
        theta_T=theta_T.rad2deg().numpy(),
        psi_T=(target_T.detach() / variant.length).numpy(),
        slope_T=(slope_T / variant.length).numpy(),
        gradient_T=gradient_T.numpy(),
    )


def negative_curves() -> CurveGroup:
    """What becomes of a hard negative's cosine under each margin that re-weights.

    `theta_T` holds the angle to the other class, `psi_T` the re-weighted cosine, `slope_T` and `gradient_T` its slope.
    """
    theta_T = torch.linspace(0, math.pi, ANGLES, dtype=torch.float64)
    degrees_T, curves = theta_T.rad2deg().numpy(), []
    for kind in all_margins():
        for case in kind.negatives or (Case(curve=kind.title),) if kind.reweights else ():
            one = Variant(kind(), case)
            changed_T, slope_T = one.reweighted(theta_T.cos(), torch.ones(ANGLES, dtype=torch.bool))
            slopes_T, name = (slope_T + torch.zeros_like(changed_T)).numpy(), one.margin.name
            curve = MarginCurve(name, case.curve or "", one.length, degrees_T, changed_T.numpy(), slopes_T, slopes_T)
            curves.append(curve)
    return CurveGroup("negatives", "a hard negative's cosine", curves)


@dataclass(frozen=True)
class BoundaryRow:
    """The binary decision boundary of a margin.

    Attributes:
        name: of the loss, as the config writes it.
        label, setting: for print; may hold mathtext.
        tex, text: the boundary of class 1, as mathtext without dollars and as plain text.
        apart_degrees: between the two centres.
        boundary_degrees: angle to the first centre up to which class 1 is decided; None where it is nowhere.
        gap_degrees: between the boundaries of both classes.
        region_degrees: pairs (theta_1, least theta_2 for which class 1 is decided).
    """

    name: str
    label: str
    tex: str
    text: str
    setting: str
    apart_degrees: float
    boundary_degrees: float | None
    gap_degrees: float | None
    region_degrees: tuple[tuple[float, float], ...]


def boundary_rows(apart: float = RIGHT_ANGLE) -> list[BoundaryRow]:
    """The table of binary decision boundaries: for each margin the boundary of class 1, and where it lies.

    The numbers are for two classes whose centres are `apart` radians apart, and a sample between them in their plane,
    theta_1 from the first and apart - theta_1 from the second. Class 1 is decided with its margin up to the angle at
    which its target logit equals the other's logit. The gap is the angle that neither class owns. Both are None where
    the margin leaves a class nothing.
    """
    return [
        _row(variant, variant.case.row, apart)
        for kind in all_margins()
        for variant in variants(kind)
        if variant.case.row is not None
    ]


def _row(variant: Variant, setting: str, apart: float) -> BoundaryRow:
    margin, angle = variant.margin, _boundary_angle(variant, apart)
    tex, text = margin.boundary or _from_formula(margin)
    here, gap = (None, None) if angle is None else (math.degrees(angle), math.degrees(apart - 2 * angle))
    region = _region(variant)
    return BoundaryRow(margin.name, margin.title, tex, text, setting, math.degrees(apart), here, gap, region)


def _from_formula(margin: Margin) -> tuple[str, str]:
    """The boundary of a margin that gives none: its formula for class 1 equals the plain logit of class 2."""
    text = margin.formula.replace("theta", "theta_1") + " = s cos(theta_2)"
    tex = re.sub(r"cos|sin|theta|psi|alpha|lambda", lambda word: rf"\{word[0]} ", text)
    return tex.replace(r"\theta _", r"\theta_"), text


def _boundary_angle(variant: Variant, apart: float) -> float | None:
    """The greatest theta_1 up to which class 1 is decided; None where it is not decided even at its own centre."""

    def lead(angle: float) -> float:
        cos_1 = torch.tensor([math.cos(angle)], dtype=torch.float64)
        target_1 = variant.target(cos_1)
        other_1 = variant.other(torch.tensor([math.cos(apart - angle)], dtype=torch.float64), target_1)
        return float(target_1 - other_1)

    if lead(0.0) <= 0:
        return None
    low, high = 0.0, apart
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if lead(middle) > 0 else (low, middle)
    return (low + high) / 2


def _region(variant: Variant) -> tuple[tuple[float, float], ...]:
    """The boundary of class 1 in the plane of both angles: for theta_1 the least theta_2, in degrees, where it exists.

    Class 1 is decided where the target's logit reaches s cos(theta_2): theta_2 >= arccos(psi(theta_1)).
    """
    theta_T = torch.linspace(0, math.pi, 361, dtype=torch.float64)
    psi_T = variant.target(theta_T.cos()) / variant.length
    kept_T = psi_T >= -1
    least_T = psi_T.clamp(-1, 1).acos()
    return tuple(zip(theta_T[kept_T].rad2deg().tolist(), least_T[kept_T].rad2deg().tolist(), strict=True))


def boundary_markdown(rows: Sequence[BoundaryRow]) -> str:
    """The table for a page."""
    where = f"boundary at θ₁ (centres {rows[0].apart_degrees:g}° apart)"
    lines = [f"| loss | decision boundary of class 1 | numbers for | {where} | gap |", "|---|---|---|---:|---:|"]
    for row in rows:
        known = row.boundary_degrees is not None
        numbers = f"{row.boundary_degrees:.2f}° | {row.gap_degrees:.2f}°" if known else "none | none"
        formula = row.text.replace("|", r"\|")
        lines.append(f"| {row.name} | `{formula}` | {_plain(row.setting)} | {numbers} |")
    return "\n".join(lines) + "\n"


def boundary_records(rows: Sequence[BoundaryRow]) -> list[dict[str, object]]:
    """The table as plain values, for JSON."""
    return [
        {
            "name": row.name,
            "boundary": row.text,
            "setting": _plain(row.setting).replace(r"\|", "|"),
            "apart_degrees": row.apart_degrees,
            "boundary_degrees": row.boundary_degrees,
            "gap_degrees": row.gap_degrees,
        }
        for row in rows
    ]


def _plain(text: str) -> str:
    return text.replace("$", "").replace(r"\Vert ", r"\|").replace(r"\Vert", r"\|").replace("=", " = ")
