"""Margins: what makes the target's logit harder."""

from typing import ClassVar, Literal

from trainer.losses.base import Family, LossSpec


class Margin(LossSpec):
    family: ClassVar[Family] = "margin"


class ArcFace(Margin):
    formula: ClassVar[str] = "s cos(theta + m)"
    source: ClassVar[str] = "Deng et al. 2019"
    name: Literal["arcface"] = "arcface"
    scale: float = 64.0
    margin: float = 0.5


class CosFace(Margin):
    formula: ClassVar[str] = "s (cos theta - m)"
    source: ClassVar[str] = "Wang et al. 2018"
    name: Literal["cosface"] = "cosface"
    scale: float = 64.0
    margin: float = 0.35
