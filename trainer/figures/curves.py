"""The curves of all margins, as numbers: what their figures show.

Every number comes from the margins' own `target`, `reweight` and `per_sample`, and every slope from autograd. Only the
names for print are written here.

Legend: T angles on a grid.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from trainer.figures.plot_margins import Curve, CurveGroup
from trainer.losses.margins.base import Margin, Positives
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

RAW_LENGTH = 30.0  # |x| |w| for losses on embeddings as they are
CLASSES = 10_000  # C, for the gradient: the other C - 1 centres are at right angles to the sample
ANGLES = 2873  # points on the grid of theta


@dataclass(frozen=True)
class Variant:
    """A margin under certain circumstances.

    Attributes:
        label: for the legend; mathtext.
        norm: |x|, for margins that depend on it.
        noise: the drawn standard normal number, for ElasticFace.
        share: what `per_class` gave the sample's class: the way to the greatest margin, or a class weight.
        values: running statistics.
    """

    margin: Margin
    label: str
    norm: float = 1.0
    noise: float = 0.0
    share: float = 1.0
    values: Mapping[str, float] = field(default_factory=dict)

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
                torch.full_like(cos_T, self.norm),
                torch.zeros(cos_T.shape, dtype=torch.int64),
                self._values(cos_T.dtype),
                torch.full_like(cos_T, self.noise),
                torch.full_like(cos_T, self.share),
            )
        )

    def other(self, cos_T: Tensor, target_T: Tensor) -> Tensor:
        """The logit of another class at these cosines, re-weighted where the margin does that."""
        if self.margin.reweights:
            hard_T = cos_T > target_T.detach() / self.length
            cos_T = self.margin.reweight(cos_T, hard_T, self._values(cos_T.dtype))[0]
        return self.length * cos_T

    def loss(self, cos_T: Tensor, classes: int) -> Tensor:
        """The loss where the other classes' cosines are 0, and the bias too."""
        target_T = self.target(cos_T)
        negatives_T = math.log(classes - 1) + self.other(torch.zeros_like(cos_T), target_T)
        return self.margin.per_sample(negatives_T, target_T, torch.full_like(cos_T, self.share))

    def _values(self, dtype: torch.dtype) -> dict[str, Tensor]:
        numbers = self.margin.learnables() | self.margin.buffers() | dict(self.values)
        return {name: torch.tensor(value, dtype=dtype) for name, value in numbers.items()}


# AdaFace's running statistics, and norms 3.1 deviations from their mean, where z = -1 and 1 (h = 0.333).
NORMS = MappingProxyType({"norm_mean": 20.0, "norm_std": 4.0})
LOW_NORM, HIGH_NORM = 20.0 - 3.1 * 4.0, 20.0 + 3.1 * 4.0


def variants() -> dict[str, tuple[str, list[Variant]]]:
    """All margins of the project by kind: name to (title, variants), with the papers' constants."""
    return {
        "softmax": (
            "no margin",
            [
                Variant(Softmax(), "softmax"),
                Variant(WeightedSoftmax(), r"weighted softmax, $w_c = 2$", share=2.0),
                Variant(Focal(), r"focal, $\gamma = 2$"),
                Variant(ModifiedSoftmax(), "modified softmax"),
                Variant(L2Softmax(), r"$L_2$-softmax, $\alpha = 40$"),
                Variant(NormFace(), r"NormFace, $s = 30$"),
            ],
        ),
        "multiple": (
            "times the angle",
            [
                *(Variant(LSoftmax(margin=m), rf"L-Softmax, $m = {m}$") for m in (1, 2, 3, 4)),
                Variant(ASoftmax(lambda_min=0.0), r"A-Softmax, $m = 4$"),
                Variant(ASoftmax(), r"A-Softmax, $m = 4$, $\lambda = 5$"),
            ],
        ),
        "additive": (
            "added",
            [
                Variant(CosFace(), r"CosFace, $m = 0.35$"),
                Variant(ArcFace(), r"ArcFace, $m = 0.5$"),
                Variant(SubCenterArcFace(), r"sub-centre ArcFace, $m = 0.5$"),
                Variant(Combined(m1=1.35, m2=0.0, m3=0.0), r"combined, $m_1 = 1.35$"),
                Variant(Combined(), r"combined, $m_2 = 0.3$, $m_3 = 0.2$"),
            ],
        ),
        "adaptive": (
            "by sample or class",
            [
                Variant(AdaFace(), r"AdaFace, $z = -1$", norm=LOW_NORM, values=NORMS),
                Variant(AdaFace(), r"AdaFace, $z = 1$", norm=HIGH_NORM, values=NORMS),
                Variant(MagFace(), r"MagFace, $\Vert x\Vert = 10$", norm=10.0),
                Variant(MagFace(), r"MagFace, $\Vert x\Vert = 110$", norm=110.0),
                Variant(ElasticFace(sigma=0.05), r"ElasticFace, $m_i = 0.4$", noise=-2.0),
                Variant(DynamicMargin(), r"dynamic, $m_c = 0.05$", share=0.0),
            ],
        ),
        "reweighting": (
            "hard negatives too",
            [
                Variant(CurricularFace(), r"CurricularFace, $t = 0.5$", values=MappingProxyType({"t": 0.5})),
                Variant(MVSoftmax(), r"MV-AM, $m = 0.35$"),
                Variant(MVSoftmax(kind="arc", margin=0.5), r"MV-Arc, $m = 0.5$"),
            ],
        ),
    }


def curve_groups(classes: int = CLASSES, angles: int = ANGLES) -> list[CurveGroup]:
    """psi, target logit, and the slopes of every margin, over theta from 0.25 to 179.75 degrees.

    The slope of psi = t / length is taken by cos(theta); the loss's slope is dL/dcos(theta), for C classes whose other
    centres are at right angles to the sample. The ends are left out: there an additive angle has a pole.
    """
    theta_T = torch.linspace(math.radians(0.25), math.radians(179.75), angles, dtype=torch.float64)
    groups = []
    for kind, (title, members) in variants().items():
        curves = [_curve(variant, theta_T, classes) for variant in members]
        groups.append(CurveGroup(kind, title, curves))
    return groups


def _curve(variant: Variant, theta_T: Tensor, classes: int) -> Curve:
    cos_T = theta_T.cos().requires_grad_()
    target_T = variant.target(cos_T)
    (slope_T,) = torch.autograd.grad(target_T.sum(), cos_T)
    (gradient_T,) = torch.autograd.grad(variant.loss(cos_T, classes).sum(), cos_T)
    target_T, length = target_T.detach(), variant.length
    return Curve(
        name=variant.margin.name,
        label=variant.label,
        length=length,
        theta_T=theta_T.rad2deg().numpy(),
        psi_T=(target_T / length).numpy(),
        target_T=target_T.numpy(),
        slope_T=(slope_T / length).numpy(),
        gradient_T=gradient_T.numpy(),
    )


def negative_curves(t: tuple[float, ...] = (0.0, 0.5, 1.0)) -> CurveGroup:
    """What becomes of a hard negative's cosine under CurricularFace at some t, and under MV-softmax.

    `theta_T` holds the angle to the other class, `psi_T` the re-weighted cosine and `slope_T` its slope.
    """
    margins: list[tuple[Margin, str, dict[str, float]]] = [
        (CurricularFace(), rf"CurricularFace, $t = {value:g}$", {"t": value}) for value in t
    ]
    margins.append((MVSoftmax(), rf"MV-softmax, $w = {MVSoftmax().emphasis:g}$", {}))
    theta_T = torch.linspace(0, math.pi, ANGLES, dtype=torch.float64)
    curves = []
    for margin, label, values in margins:
        numbers = {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
        changed_T, slope_T = margin.reweight(theta_T.cos(), torch.ones(ANGLES, dtype=torch.bool), numbers)
        length = float(margin.scale_of({}))
        curves.append(
            Curve(
                margin.name,
                label,
                length,
                theta_T.rad2deg().numpy(),
                changed_T.numpy(),
                (length * changed_T).numpy(),
                (slope_T + torch.zeros_like(changed_T)).numpy(),
                (slope_T + torch.zeros_like(changed_T)).numpy(),
            )
        )
    return CurveGroup("negatives", "a hard negative's cosine", curves)
