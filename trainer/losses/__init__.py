"""Every loss that a config can name."""

from typing import Annotated, get_args

from pydantic import Field

from trainer.losses.base import LossSpec
from trainer.losses.margins import Margin
from trainer.losses.margins_adaptive import AdaFace, CurricularFace, MagFace, MVSoftmax
from trainer.losses.margins_cosine import (
    ArcFace,
    Combined,
    CosFace,
    DynamicMargin,
    ElasticFace,
    NormFace,
    SubCenterArcFace,
)
from trainer.losses.margins_multiple import ASoftmax, LSoftmax
from trainer.losses.margins_softmax import Focal, L2Softmax, ModifiedSoftmax, Softmax, WeightedSoftmax

AnyLoss = (
    Softmax
    | WeightedSoftmax
    | Focal
    | ModifiedSoftmax
    | LSoftmax
    | ASoftmax
    | L2Softmax
    | NormFace
    | CosFace
    | ArcFace
    | Combined
    | SubCenterArcFace
    | AdaFace
    | MagFace
    | ElasticFace
    | DynamicMargin
    | CurricularFace
    | MVSoftmax
)
Loss = Annotated[AnyLoss, Field(discriminator="name")]


def by_name() -> dict[str, type[LossSpec]]:
    """The losses by the name that the config writes."""
    return {spec.model_fields["name"].default: spec for spec in get_args(AnyLoss)}


__all__ = [
    "ASoftmax",
    "AdaFace",
    "AnyLoss",
    "ArcFace",
    "Combined",
    "CosFace",
    "CurricularFace",
    "DynamicMargin",
    "ElasticFace",
    "Focal",
    "L2Softmax",
    "LSoftmax",
    "Loss",
    "LossSpec",
    "MVSoftmax",
    "MagFace",
    "Margin",
    "ModifiedSoftmax",
    "NormFace",
    "Softmax",
    "SubCenterArcFace",
    "WeightedSoftmax",
    "by_name",
]
