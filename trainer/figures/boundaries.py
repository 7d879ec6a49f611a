"""The table of binary decision boundaries: what each margin asks for between two classes, in formulas and in degrees.

The formulas are those of the margins' classes; every number comes from the margins' own `target` and `reweight`.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from trainer.figures.curves import Variant, variants
from trainer.losses import all_margins
from trainer.losses.margins import Margin

RIGHT_ANGLE = math.pi / 2


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
    return BoundaryRow(
        name=margin.name,
        label=margin.title,
        tex=tex,
        text=text,
        setting=setting,
        apart_degrees=math.degrees(apart),
        boundary_degrees=None if angle is None else math.degrees(angle),
        gap_degrees=None if angle is None else math.degrees(apart - 2 * angle),
        region_degrees=_region(variant),
    )


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
    return bisect(lead, 0.0, apart)


def bisect(falling: Callable[[float], float], low: float, high: float) -> float:
    """Where a function that falls from above 0 to below 0 crosses it, to 1e-12."""
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low + high) / 2


def _region(variant: Variant) -> tuple[tuple[float, float], ...]:
    """The boundary of class 1 in the plane of both angles: for theta_1 the least theta_2, in degrees, where it exists.

    Class 1 is decided where the target's logit reaches s cos(theta_2): theta_2 >= arccos(psi(theta_1)).
    """
    theta_T = torch.linspace(0, math.pi, 361, dtype=torch.float64)
    psi_T = variant.target(theta_T.cos()) / variant.length
    kept_T = psi_T >= -1
    least_T = psi_T.clamp(-1, 1).acos()
    return tuple(
        (float(a), float(b)) for a, b in zip(theta_T[kept_T].rad2deg(), least_T[kept_T].rad2deg(), strict=True)
    )


def boundary_markdown(rows: Sequence[BoundaryRow]) -> str:
    """The table for a page."""
    lines = [
        f"| loss | decision boundary of class 1 | numbers for | boundary at θ₁ (centres {rows[0].apart_degrees:g}° "
        "apart) | gap |",
        "|---|---|---|---:|---:|",
    ]
    for row in rows:
        known = row.boundary_degrees is not None and row.gap_degrees is not None
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
