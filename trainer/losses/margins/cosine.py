"""Margins on unit embeddings and unit centres: NormFace, CosFace, ArcFace, their combination, and kin.

All are s psi(theta) for the target and s cos(theta_j) for the other classes. With c = cos(theta) and p the target's
posterior, the gradient is dL/dc = -(1 - p) s dpsi/dc for the target and p_j s for another class; each docstring gives
dpsi/dc. None of them costs communication beyond the head's own.
"""

import math
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

import torch
from torch import Tensor

from trainer.checked import Within
from trainer.errors import UserError
from trainer.losses.bounds import auto_scale, check_cosine_margin
from trainer.losses.margins import (
    AdditiveAngle,
    Case,
    Margin,
    Positives,
    Probability,
    Scale,
    Values,
    angle_boundary,
    cosine_boundary,
    monotone_cosine,
)

KINDS_OWN = math.nan  # stands for the constant that the paper gives to the kind
LEAST_SCALE = 0.01  # of a learned scale


def set_constant(spec: Margin, name: str, value: float) -> None:
    """Give a spec that is being made the constant of its kind, where it was given none."""
    if getattr(spec, name, None) is KINDS_OWN:
        object.__setattr__(spec, name, value)


def spare_far_targets(cos_B: Tensor, psi_B: Tensor) -> Tensor:
    """`easy_margin`: no margin for samples at 90 degrees or more from their centre.

    There the target jumps from psi(90 degrees) up to 0, so that a sample just beyond has a smaller loss than one just
    before.
    """
    return torch.where(cos_B > 0, psi_B, cos_B)


class NormFace(Margin):
    """Softmax on the cosine: s cos(theta). dpsi/dc = 1.

    With `learnable` the scale is a parameter that starts at `scale`, as in the authors' network, which starts it at 10.
    As there it counts as 0.01 where it is less; its gradient goes on. The default is a fixed scale, which sends no
    message and bounds the logits. For `auto` see `bounds.cosface_scale`.
    """

    formula = "s cos(theta)"
    source = (
        "Wang et al. 2017, NormFace: L2 hypersphere embedding for face verification, eq. 8; "
        "learnable: the authors' happynear/NormFace, prototxt/scaled_cosine_softmax.prototxt"
    )
    title = "NormFace"
    demo: ClassVar = {"scale": 16.0}
    panel = "softmax"
    cases = (Case(curve="NormFace, $s = 30$", row=""),)
    boundary = cosine_boundary("s", r"\cos\theta_1", "cos(theta_1)")
    eased = ()

    name: Literal["normface"] = "normface"
    scale: Scale | Literal["auto"] = 30.0
    learnable: bool = False  # learn the scale, from its value here
    probability: Probability = 0.9  # for scale: auto

    def resolve(self, classes: int, dimension: int) -> Self:
        return replace(self, scale=auto_scale(self.name, self.scale, classes, self.probability))

    def learnables(self) -> dict[str, float]:
        return {"scale": float(super().scale_of({}))} if self.learnable else {}

    def scale_of(self, values: Values) -> float | Tensor:
        if not self.learnable:
            return super().scale_of(values)
        scale = values["scale"]
        return scale + (scale.clamp_min(LEAST_SCALE) - scale).detach()

    def target(self, positives: Positives) -> Tensor:
        return positives.dots_B


class CosFace(Margin):
    """Additive cosine margin: s (cos(theta) - m). dpsi/dc = 1.

    For the scale `auto` see `bounds.cosface_scale`. A margin that no arrangement of the centres allows is refused
    (`bounds.cosine_margin`).
    """

    formula = "s (cos(theta) - m)"
    source = (
        "Wang et al. 2018, CosFace, eq. 4, 6 and 9; Wang et al. 2018, Additive margin softmax for face verification"
    )
    title = "CosFace"
    demo: ClassVar = {"scale": 16.0, "margin": 0.35}
    demo_in_plane: ClassVar = {"margin": 0.1}  # 1 - cos(36 degrees) = 0.19 is the most
    cases = (Case(curve="CosFace, $m = 0.35$", row="$m=0.35$"),)
    boundary = cosine_boundary("s", r"\cos\theta_1-m", "cos(theta_1) - m")

    name: Literal["cosface"] = "cosface"
    scale: Scale | Literal["auto"] = 64.0
    margin: Annotated[float, Within(ge=0)] = 0.35
    probability: Probability = 0.9  # for scale: auto

    def resolve(self, classes: int, dimension: int) -> Self:
        check_cosine_margin(self.name, self.margin, classes, dimension)
        return replace(self, scale=auto_scale(self.name, self.scale, classes, self.probability))

    def target(self, positives: Positives) -> Tensor:
        return self.scale_of({}) * (positives.cos_B - self.margin)


class ArcFace(Margin):
    """Additive angular margin: s cos(theta + m). dpsi/dc = sin(theta + m) / sin(theta).

    The factor is the true derivative, 2.2 at theta = 20 degrees for m = 0.5.

    Beyond theta = pi - m, where the paper says nothing, the target goes on falling as s (-2 - cos(theta + m)), see
    `monotone_cosine`: the worse the sample, the greater its loss. Published code either leaves cos(theta + m), which
    rises again there and rewards a sample for moving away, or goes on with cos(theta) - m sin(m), which jumps down by
    cos(m) + m sin(m) - 1 (0.12 for m = 0.5). Neither is taken.
    """

    formula = "s cos(theta + m)"
    source = "Deng et al. 2019, ArcFace, eq. 3"
    title = "ArcFace"
    demo: ClassVar = {"scale": 16.0, "margin": 0.5}
    demo_in_plane: ClassVar = {"margin": 0.2}
    cases = (Case(curve="ArcFace, $m = 0.5$", row="$m=0.5$"),)
    boundary = angle_boundary("m")

    name: Literal["arcface"] = "arcface"
    scale: Scale = 64.0
    margin: AdditiveAngle = 0.5

    def target(self, positives: Positives) -> Tensor:
        return self.scale_of({}) * monotone_cosine(positives.cos_B, 1.0, self.margin)


class Combined(Margin):
    """All three margins: s (cos(m1 theta + m2) - m3), for any m1 >= 1. dpsi/dc = m1 sin(m1 theta + m2) / sin(theta).

    Beyond m1 theta + m2 = pi it goes on falling (`monotone_cosine`). SphereFace is (m1, 0, 0) on unit embeddings,
    ArcFace (1, m2, 0), CosFace (1, 0, m3). During the warmup m1 grows from 1, m2 and m3 from 0.
    """

    formula = "s (cos(m1 theta + m2) - m3)"
    source = "Deng et al. 2019, ArcFace, eq. 4"
    title = "combined"
    demo: ClassVar = {"scale": 16.0, "m2": 0.3, "m3": 0.2}
    demo_in_plane: ClassVar = {"m2": 0.1, "m3": 0.05}
    cases = (
        Case(curve="combined, $m_1 = 1.35$", constants={"m1": 1.35, "m2": 0.0, "m3": 0.0}),
        Case(curve="combined, $m_2 = 0.3$, $m_3 = 0.2$", row="$m_1=1$, $m_2=0.3$, $m_3=0.2$"),
    )
    boundary = cosine_boundary("s", r"\cos(m_1\theta_1+m_2)-m_3", "cos(m1 theta_1 + m2) - m3")

    name: Literal["combined"] = "combined"
    scale: Scale = 64.0
    m1: Annotated[float, Within(ge=1, le=8)] = 1.0  # times the angle
    m2: AdditiveAngle = 0.3  # plus the angle, radians
    m3: Annotated[float, Within(ge=0, le=2)] = 0.2  # minus the cosine

    def at(self, step: int, warmup: float) -> Self:
        if warmup >= 1:
            return self
        return replace(self, m1=1 + (self.m1 - 1) * warmup, m2=self.m2 * warmup, m3=self.m3 * warmup)

    def resolve(self, classes: int, dimension: int) -> Self:
        check_cosine_margin(f"{self.name}, m3", self.m3, classes, dimension)
        return self

    def target(self, positives: Positives) -> Tensor:
        return self.scale_of({}) * (monotone_cosine(positives.cos_B, self.m1, self.m2) - self.m3)


class SubCenterArcFace(ArcFace):
    """ArcFace with K centres a class: cos(theta_j) = max over k of cos(theta_jk), for the target and all others.

    The gradient goes to the nearest centre alone. Outliers of a noisy class gather at centres of their own. Beyond
    theta + m = pi as ArcFace.
    """

    formula = "s cos(theta + m), cos(theta_j) = max_k cos(theta_jk)"
    source = "Deng et al. 2020, Sub-center ArcFace, eq. 3 and 4"
    title = "sub-centre ArcFace"
    demo: ClassVar = {"scale": 16.0, "margin": 0.5, "centres": 2}
    cases = (Case(curve="sub-centre ArcFace, $m = 0.5$", row="$m=0.5$"),)
    boundary = (
        r"s(\cos(\theta_1+m)-\cos\theta_2)=0,\ \theta_j=\mathrm{min}_k\,\theta_{jk}",
        "s (cos(theta_1 + m) - cos(theta_2)) = 0, theta_j = min_k theta_jk",
    )

    name: Literal["sub_center_arcface"] = "sub_center_arcface"  # type: ignore[assignment]
    centres: Annotated[int, Within(ge=1, le=64)] = 3  # K

    def centres_per_class(self) -> int:
        return self.centres


class DynamicMargin(Margin):
    """ArcFace with a margin a class: m_c = a n_c^(-power) + b, a and b such that m_c spans [least, greatest].

    Rare classes get the greatest margin. dpsi/dc = sin(theta + m_c) / sin(theta); beyond theta + m_c = pi as ArcFace.
    """

    formula = "s cos(theta + m_c), m_c = a n_c^(-1/4) + b in [0.05, 0.5]"
    source = "Ha et al. 2020, Google landmark recognition with sub-center ArcFace and dynamic margins, eq. 3"
    title = "dynamic margin"
    demo: ClassVar = {"scale": 16.0}
    demo_in_plane: ClassVar = {"greatest": 0.2}
    eased = ("least", "greatest")
    panel = "adaptive"
    cases = (Case(curve="dynamic, $m_c = 0.05$", share=0.0), Case(row="$m_c=0.5$", share=1.0))
    boundary = angle_boundary("m_c")

    name: Literal["dynamic"] = "dynamic"
    scale: Scale = 64.0
    least: AdditiveAngle = 0.05
    greatest: AdditiveAngle = 0.5
    power: Annotated[float, Within(gt=0, le=4)] = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.least > self.greatest:
            raise UserError(f"least {self.least} is more than greatest {self.greatest}; exchange them")

    def per_class(self, counts_C: Tensor) -> Tensor:
        """n_c^(-power), as the share in [0, 1] of the way from the least to the greatest margin.

        A class without samples counts as if it had one; where all counts are equal the share is 1.
        """
        rarity_C = counts_C.to(torch.float64).clamp_min(1) ** -self.power
        least, greatest = rarity_C.min(), rarity_C.max()
        if greatest == least:
            return torch.ones_like(rarity_C, dtype=torch.float32)
        return ((rarity_C - least) / (greatest - least)).float()

    def target(self, positives: Positives) -> Tensor:
        assert positives.class_values_B is not None, "from `per_class`"
        margin_B = self.least + (self.greatest - self.least) * positives.class_values_B.to(positives.cos_B.dtype)
        return self.scale_of({}) * monotone_cosine(positives.cos_B, 1.0, margin_B)


class ElasticFace(Margin):
    """ArcFace (or CosFace) with a margin drawn anew for each sample and step: m_i ~ N(m, sigma).

    The numbers come from (seed, step) and the sample's place in the global batch, so they do not depend on the number
    of ranks. dpsi/dc as in ArcFace (CosFace), with m_i; beyond pi as ArcFace, and where m_i is below 0 and theta below
    -m_i the angle counts as 0.

    `plus` is ElasticFace+: the margins drawn for a batch are given to its samples by rising cosine, the greatest to the
    sample that is furthest from its centre. The order is that of the global batch. Costs one more message of [B].
    The authors' code (fdbtrs/ElasticFace, losses.py) sorts both and then takes the margins by the sorting's own
    numbers, where their inverse is wanted, so that a sample gets another's margin; taken is what the paper describes.

    sigma: the code's own default is 0.0125, but its config, with which the published models are trained, has 0.05, and
    for `plus` 0.0175 (arc) and 0.02 (cos). These are the defaults.
    """

    formula = "s cos(theta + m_i), m_i ~ N(m, sigma)"
    source = "Boutros et al. 2022, ElasticFace, eq. 5 and 6"
    title = "ElasticFace"
    demo: ClassVar = {"scale": 16.0, "margin": 0.5, "sigma": 0.05}
    demo_in_plane: ClassVar = {"margin": 0.2, "sigma": 0.02}
    noisy = True
    eased = ("margin", "sigma")
    panel = "adaptive"
    cases = (Case(curve="ElasticFace, $m_i = 0.4$", constants={"sigma": 0.05}, noise=-2.0), Case(row="$m_i=0.5$"))
    boundary = angle_boundary("m_i")

    name: Literal["elasticface"] = "elasticface"
    kind: Literal["arc", "cos"] = "arc"
    scale: Scale = 64.0
    margin: AdditiveAngle = KINDS_OWN  # mean; arc: 0.5, radians; cos: 0.35
    plus: bool = False  # ElasticFace+: greater margins for samples further from their centre
    sigma: Annotated[float, Within(ge=0, le=1)] = KINDS_OWN  # standard deviation; 0.05; plus: arc 0.0175, cos 0.02

    def __post_init__(self) -> None:
        arc = self.kind == "arc"
        set_constant(self, "margin", 0.5 if arc else 0.35)
        set_constant(self, "sigma", (0.0175 if arc else 0.02) if self.plus else 0.05)
        super().__post_init__()

    @property
    def compares_samples(self) -> bool:
        return self.plus

    def resolve(self, classes: int, dimension: int) -> Self:
        if self.kind == "cos":
            check_cosine_margin(self.name, self.margin, classes, dimension)
        return self

    def target(self, positives: Positives) -> Tensor:
        assert positives.noise_B is not None, "of a `noisy` margin"
        noise_B = self._by_distance(positives) if self.plus else positives.noise_B
        margin_B = self.margin + self.sigma * noise_B.to(positives.cos_B.dtype)
        if self.kind == "cos":
            return self.scale_of({}) * (positives.cos_B - margin_B)
        return self.scale_of({}) * monotone_cosine(positives.cos_B, 1.0, margin_B)

    @staticmethod
    def _by_distance(positives: Positives) -> Tensor:
        """The valid samples' noise, dealt out among them: the greatest to the least cosine. Padding keeps its own."""
        assert positives.noise_B is not None
        assert positives.batch_cos_B is not None, "of a margin that `compares_samples`"
        valid_B = positives.labels_B >= 0
        nearest_first_B = torch.where(valid_B, positives.batch_cos_B, torch.inf).argsort(descending=True, stable=True)
        rising_B = torch.where(valid_B, positives.noise_B, -torch.inf).argsort(stable=True)  # padding is first in both
        return torch.empty_like(positives.noise_B).scatter(0, nearest_first_B, positives.noise_B[rising_B])
