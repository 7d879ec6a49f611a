"""Margins on unit embeddings and unit centres: NormFace, CosFace, ArcFace, their combination, and kin.

All are s psi(theta) for the target and s cos(theta_j) for the other classes. With c = cos(theta) and p the target's
posterior, the gradient is dL/dc = -(1 - p) s dpsi/dc for the target and p_j s for another class; each docstring gives
dpsi/dc. None of them costs communication beyond the head's own.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from trainer.errors import UserError
from trainer.losses.margins.base import (
    AutoScale,
    Margin,
    Positives,
    Probability,
    Scale,
    auto_scale,
    check_cosine_margin,
    monotone_cosine,
)

AdditiveAngle = Annotated[float, Field(ge=0, le=math.pi, allow_inf_nan=False, description="radians")]


def with_margin(values: Any, kind: str, margin: float) -> Any:
    """A spec's fields, with the margin that its paper gives to this kind where none is given."""
    if isinstance(values, dict) and values.get("kind") == kind:
        return {"margin": margin, **values}
    return values


class NormFace(Margin):
    """Softmax on the cosine: s cos(theta). dpsi/dc = 1.

    With `learnable` the scale is a parameter that starts at `scale`; `auto` is the least scale at which a perfect
    embedding reaches the posterior `probability` (`theory.cosface_scale`).
    """

    formula: ClassVar[str] = "s cos(theta)"
    source: ClassVar[str] = "Wang et al. 2017, NormFace: L2 hypersphere embedding for face verification, eq. 8"
    eased: ClassVar[tuple[str, ...]] = ()

    name: Literal["normface"] = "normface"
    scale: AutoScale = 30.0
    learnable: bool = Field(False, description="learn the scale, from its value here")
    probability: Probability = Field(0.9, description="for scale: auto")

    def resolve(self, classes: int, dimension: int) -> Self:
        if self.scale != "auto":
            return self
        return self.model_copy(update={"scale": auto_scale(self.name, classes, self.probability)})

    def learnables(self) -> dict[str, float]:
        return {"scale": float(super().scale_of({}))} if self.learnable else {}

    def scale_of(self, values: Mapping[str, Tensor]) -> float | Tensor:
        return values["scale"] if self.learnable else super().scale_of(values)

    def target(self, positives: Positives) -> Tensor:
        return positives.dots_B


class CosFace(Margin):
    """Additive cosine margin: s (cos(theta) - m). dpsi/dc = 1.

    `auto` is the least scale at which a perfect embedding reaches the posterior `probability`. A margin that no
    arrangement of the centres allows is refused (`theory.cosine_margin`).
    """

    formula: ClassVar[str] = "s (cos(theta) - m)"
    source: ClassVar[str] = (
        "Wang et al. 2018, CosFace, eq. 4, 6 and 9; Wang et al. 2018, Additive margin softmax for face verification"
    )

    name: Literal["cosface"] = "cosface"
    scale: AutoScale = 64.0
    margin: float = Field(0.35, ge=0, allow_inf_nan=False)
    probability: Probability = Field(0.9, description="for scale: auto")

    def resolve(self, classes: int, dimension: int) -> Self:
        check_cosine_margin(self.name, self.margin, classes, dimension)
        if self.scale != "auto":
            return self
        return self.model_copy(update={"scale": auto_scale(self.name, classes, self.probability)})

    def target(self, positives: Positives) -> Tensor:
        return self.scale_of({}) * (positives.cos_B - self.margin)


class ArcFace(Margin):
    """Additive angular margin: s cos(theta + m). dpsi/dc = sin(theta + m) / sin(theta).

    The factor is the true derivative, 2.2 at theta = 20 degrees for m = 0.5. Where theta + m > pi the target goes on
    falling as s (-2 - cos(theta + m)), see `monotone_cosine`: the worse the sample, the greater its loss.
    """

    formula: ClassVar[str] = "s cos(theta + m)"
    source: ClassVar[str] = "Deng et al. 2019, ArcFace, eq. 3"

    name: Literal["arcface"] = "arcface"
    scale: Scale = 64.0
    margin: AdditiveAngle = 0.5

    def target(self, positives: Positives) -> Tensor:
        return self.scale_of({}) * monotone_cosine(positives.cos_B, 1.0, self.margin)


class Combined(Margin):
    """All three margins: s (cos(m1 theta + m2) - m3), for any m1 >= 1. dpsi/dc = m1 sin(m1 theta + m2) / sin(theta).

    Beyond m1 theta + m2 = pi it goes on falling (`monotone_cosine`). SphereFace is (m1, 0, 0) on unit embeddings,
    ArcFace (1, m2, 0), CosFace (1, 0, m3). During the warm-up m1 grows from 1, m2 and m3 from 0.
    """

    formula: ClassVar[str] = "s (cos(m1 theta + m2) - m3)"
    source: ClassVar[str] = "Deng et al. 2019, ArcFace, eq. 4"

    name: Literal["combined"] = "combined"
    scale: Scale = 64.0
    m1: float = Field(1.0, ge=1, le=8, allow_inf_nan=False, description="times the angle")
    m2: AdditiveAngle = Field(0.3, description="plus the angle, radians")
    m3: float = Field(0.2, ge=0, le=2, allow_inf_nan=False, description="minus the cosine")

    def at(self, step: int, warm: float) -> Self:
        if warm >= 1:
            return self
        return self.model_copy(update={"m1": 1 + (self.m1 - 1) * warm, "m2": self.m2 * warm, "m3": self.m3 * warm})

    def resolve(self, classes: int, dimension: int) -> Self:
        check_cosine_margin(f"{self.name}, m3", self.m3, classes, dimension)
        return self

    def target(self, positives: Positives) -> Tensor:
        return self.scale_of({}) * (monotone_cosine(positives.cos_B, self.m1, self.m2) - self.m3)


class SubCenterArcFace(ArcFace):
    """ArcFace with K centres a class: cos(theta_j) = max over k of cos(theta_jk), for the target and all others.

    The gradient goes to the nearest centre alone. Outliers of a noisy class gather at centres of their own.
    """

    formula: ClassVar[str] = "s cos(theta + m), cos(theta_j) = max_k cos(theta_jk)"
    source: ClassVar[str] = "Deng et al. 2020, Sub-center ArcFace, eq. 3 and 4"

    name: Literal["sub_center_arcface"] = "sub_center_arcface"  # type: ignore[assignment]
    centres: int = Field(3, ge=1, le=64, description="K")

    def centres_per_class(self) -> int:
        return self.centres


class DynamicMargin(Margin):
    """ArcFace with a margin a class: m_c = a n_c^(-power) + b, a and b such that m_c spans [least, greatest].

    Rare classes get the greatest margin. dpsi/dc = sin(theta + m_c) / sin(theta).
    """

    formula: ClassVar[str] = "s cos(theta + m_c), m_c = a n_c^(-1/4) + b in [0.05, 0.5]"
    source: ClassVar[str] = (
        "Ha et al. 2020, Google landmark recognition with sub-center ArcFace and dynamic margins, eq. 3"
    )
    eased: ClassVar[tuple[str, ...]] = ("least", "greatest")

    name: Literal["dynamic"] = "dynamic"
    scale: Scale = 64.0
    least: AdditiveAngle = 0.05
    greatest: AdditiveAngle = 0.5
    power: float = Field(0.25, gt=0, le=4, allow_inf_nan=False)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.least > self.greatest:
            raise ValueError(f"least {self.least} is more than greatest {self.greatest}; exchange them")
        return self

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
        if positives.class_values_B is None:
            raise UserError("dynamic: the margin depends on how many samples each class has; give class_counts")
        margin_B = self.least + (self.greatest - self.least) * positives.class_values_B.to(positives.cos_B.dtype)
        return self.scale_of({}) * monotone_cosine(positives.cos_B, 1.0, margin_B)


class ElasticFace(Margin):
    """ArcFace (or CosFace) with a margin drawn anew for each sample and step: m_i ~ N(m, sigma).

    The numbers come from (seed, step) and the sample's place in the global batch, so they do not depend on the number
    of ranks. dpsi/dc as in ArcFace (CosFace), with m_i.
    """

    formula: ClassVar[str] = "s cos(theta + m_i), m_i ~ N(m, sigma)"
    source: ClassVar[str] = "Boutros et al. 2022, ElasticFace, eq. 5 and 6"
    noisy: ClassVar[bool] = True
    eased: ClassVar[tuple[str, ...]] = ("margin", "sigma")

    name: Literal["elasticface"] = "elasticface"
    kind: Literal["arc", "cos"] = "arc"
    scale: Scale = 64.0
    margin: AdditiveAngle = Field(0.5, description="mean; radians for kind arc; the default for kind cos is 0.35")
    sigma: float = Field(0.0125, ge=0, le=1, allow_inf_nan=False, description="standard deviation")

    @model_validator(mode="before")
    @classmethod
    def _default_by_kind(cls, values: Any) -> Any:
        return with_margin(values, "cos", 0.35)

    def resolve(self, classes: int, dimension: int) -> Self:
        if self.kind == "cos":
            check_cosine_margin(self.name, self.margin, classes, dimension)
        return self

    def target(self, positives: Positives) -> Tensor:
        if positives.noise_B is None:
            raise ValueError("ElasticFace.target needs noise_B")
        margin_B = self.margin + self.sigma * positives.noise_B.to(positives.cos_B.dtype)
        if self.kind == "cos":
            return self.scale_of({}) * (positives.cos_B - margin_B)
        return self.scale_of({}) * monotone_cosine(positives.cos_B, 1.0, margin_B)
