"""The table of binary decision boundaries: what each margin asks for between two classes, in formulas and in degrees.

The formulas are written here for print; every number comes from the margins' own `target` and `reweight`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import torch

from trainer.figures.plot_margins import BoundaryRow
from trainer.losses.margins.adaptive import AdaFace, CurricularFace, MagFace, MVSoftmax
from trainer.losses.margins.cosine import (
    ArcFace,
    Combined,
    CosFace,
    DynamicMargin,
    ElasticFace,
    NormFace,
    SubCenterArcFace,
)
from trainer.losses.margins.multiple import ASoftmax, LSoftmax
from trainer.losses.margins.softmax import Focal, L2Softmax, ModifiedSoftmax, Softmax, WeightedSoftmax
from trainer.figures.curves import HIGH_NORM, LOW_NORM, NORMS, Variant

RIGHT_ANGLE = math.pi / 2


@dataclass(frozen=True)
class _Entry:
    """A row of the table before its numbers: the formula as mathtext and as plain text, and the setting (mathtext)."""

    label: str
    variant: Variant
    tex: str
    text: str
    setting: str = ""


def boundary_rows(apart: float = RIGHT_ANGLE) -> list[BoundaryRow]:
    """The table of binary decision boundaries: for each margin the boundary of class 1, and where it lies.

    The numbers are for two classes whose centres are `apart` radians apart, and a sample between them in their plane,
    theta_1 from the first and apart - theta_1 from the second. Class 1 is decided with its margin up to the angle at
    which its target logit equals the other's logit. The gap is the angle that neither class owns. Both are None where
    the margin leaves a class nothing.
    """
    rows = []
    for entry in _entries():
        angle = _boundary_angle(entry.variant, apart)
        rows.append(
            BoundaryRow(
                name=entry.variant.margin.name,
                label=entry.label,
                tex=entry.tex,
                text=entry.text,
                setting=entry.setting,
                apart_degrees=math.degrees(apart),
                boundary_degrees=None if angle is None else math.degrees(angle),
                gap_degrees=None if angle is None else math.degrees(apart - 2 * angle),
                region_degrees=_region(entry.variant),
            )
        )
    return rows


def _entries() -> list[_Entry]:
    plain = r"(w_1-w_2)\cdot x+b_1-b_2=0", "(w_1 - w_2).x + b_1 - b_2 = 0"
    scaled = r"\alpha(w_1-w_2)\cdot\hat{x}+b_1-b_2=0", "alpha (w_1 - w_2).x/|x| + b_1 - b_2 = 0"
    large = (
        r"\Vert x\Vert(\Vert w_1\Vert\cos m\theta_1-\Vert w_2\Vert\cos\theta_2)=0",
        "|x| (|w_1| cos(m theta_1) - |w_2| cos(theta_2)) = 0",
    )
    sphere = r"\Vert x\Vert(\cos m\theta_1-\cos\theta_2)=0", "|x| (cos(m theta_1) - cos(theta_2)) = 0"
    several = (
        r"s(\cos(\theta_1+m)-\cos\theta_2)=0,\ \theta_j=\mathrm{min}_k\,\theta_{jk}",
        "s (cos(theta_1 + m) - cos(theta_2)) = 0, theta_j = min_k theta_jk",
    )
    combined = r"s(\cos(m_1\theta_1+m_2)-m_3-\cos\theta_2)=0", "s (cos(m1 theta_1 + m2) - m3 - cos(theta_2)) = 0"
    cosine = r"s(\cos\theta_1-m-\cos\theta_2)=0", "s (cos(theta_1) - m - cos(theta_2)) = 0"
    ada = r"s(\cos(\theta_1-mz)-m(1+z)-\cos\theta_2)=0", "s (cos(theta_1 - m z) - m (1 + z) - cos(theta_2)) = 0"
    equal, equal_lengths = r"$\Vert w_1\Vert=\Vert w_2\Vert$, $b_1=b_2$", r"$\Vert w_1\Vert=\Vert w_2\Vert$"
    half = MappingProxyType({"t": 0.5})
    return [
        _Entry("softmax", Variant(Softmax(), ""), *plain, equal),
        _Entry("weighted softmax", Variant(WeightedSoftmax(), ""), *plain, equal),
        _Entry("focal", Variant(Focal(), ""), *plain, equal),
        _Entry(
            "modified softmax",
            Variant(ModifiedSoftmax(), ""),
            *_cosines(r"\Vert x\Vert", r"\cos\theta_1", "cos(theta_1)"),
        ),
        _Entry("$L_2$-softmax", Variant(L2Softmax(), ""), *scaled, equal),
        _Entry("NormFace", Variant(NormFace(), ""), *_cosines("s", r"\cos\theta_1", "cos(theta_1)")),
        *(_Entry("L-Softmax", Variant(LSoftmax(margin=m), ""), *large, f"$m={m}$, {equal_lengths}") for m in (2, 3, 4)),
        _Entry("A-Softmax", Variant(ASoftmax(lambda_min=0.0), ""), *sphere, "$m=4$"),
        _Entry("CosFace", Variant(CosFace(), ""), *cosine, "$m=0.35$"),
        _Entry("ArcFace", Variant(ArcFace(), ""), *_added("m"), "$m=0.5$"),
        _Entry("combined", Variant(Combined(), ""), *combined, "$m_1=1$, $m_2=0.3$, $m_3=0.2$"),
        _Entry("sub-centre ArcFace", Variant(SubCenterArcFace(), ""), *several, "$m=0.5$"),
        _Entry("AdaFace", Variant(AdaFace(), "", LOW_NORM, values=NORMS), *ada, "$m=0.4$, $z=-1$"),
        _Entry("AdaFace", Variant(AdaFace(), "", HIGH_NORM, values=NORMS), *ada, "$m=0.4$, $z=1$"),
        _Entry("MagFace", Variant(MagFace(), "", 10.0), *_added(r"m(\Vert x\Vert)"), r"$\Vert x\Vert=10$, $m=0.45$"),
        _Entry("MagFace", Variant(MagFace(), "", 110.0), *_added(r"m(\Vert x\Vert)"), r"$\Vert x\Vert=110$, $m=0.8$"),
        _Entry("ElasticFace", Variant(ElasticFace(), ""), *_added("m_i"), "$m_i=0.5$"),
        _Entry("dynamic", Variant(DynamicMargin(), "", share=1.0), *_added("m_c"), "$m_c=0.5$"),
        _Entry("CurricularFace", Variant(CurricularFace(), "", values=half), *_added("m"), "$m=0.5$"),
        _Entry("MV-softmax", Variant(MVSoftmax(), ""), *cosine, "$m=0.35$"),
    ]


def _cosines(factor: str, first_tex: str, first_text: str) -> tuple[str, str]:
    """s (first - cos(theta_2)) = 0, as mathtext and as plain text."""
    text = f"{factor} ({first_text} - cos(theta_2)) = 0"
    return rf"{factor}({first_tex}-\cos\theta_2)=0", text.replace(r"\Vert x\Vert", "|x|")


def _added(margin: str) -> tuple[str, str]:
    return _cosines("s", rf"\cos(\theta_1+{margin})", f"cos(theta_1 + {margin})")


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
