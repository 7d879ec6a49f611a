"""Every loss that a config can name."""

from typing import Annotated, get_args

from pydantic import Field

from trainer.losses.base import LossSpec
from trainer.losses.margins import Margin
from trainer.losses.margins_cosine import (
    ArcFace,
    Combined,
    CosFace,
    DynamicMargin,
    ElasticFace,
    NormFace,
    SubCenterArcFace,
)

AnyLoss = NormFace | CosFace | ArcFace | Combined | SubCenterArcFace | DynamicMargin | ElasticFace
Loss = Annotated[AnyLoss, Field(discriminator="name")]


def by_name() -> dict[str, type[LossSpec]]:
    """The losses by the name that the config writes."""
    return {spec.model_fields["name"].default: spec for spec in get_args(AnyLoss)}


__all__ = [
    "AnyLoss",
    "ArcFace",
    "Combined",
    "CosFace",
    "DynamicMargin",
    "ElasticFace",
    "Loss",
    "LossSpec",
    "Margin",
    "NormFace",
    "SubCenterArcFace",
    "by_name",
]
