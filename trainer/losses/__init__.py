"""Every loss that a config can name."""

from typing import Annotated, Any, get_args

from pydantic import Field

from trainer.losses.base import LossSpec
from trainer.losses.centres import Center, CenterInvariant
from trainer.losses.coco import CoCo
from trainer.losses.margins.base import Margin
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
from trainer.losses.pairs import Contrastive, Marginal
from trainer.losses.projections import TPE, TSE
from trainer.losses.ranges import Range
from trainer.losses.triplets import Triplet

AnyLoss = (
    Softmax
    | WeightedSoftmax
    | Focal
    | ModifiedSoftmax
    | LSoftmax
    | ASoftmax
    | L2Softmax
    | NormFace
    | CoCo
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
    | Contrastive
    | Marginal
    | Triplet
    | TSE
    | TPE
    | Center
    | CenterInvariant
    | Range
)
Loss = Annotated[AnyLoss, Field(discriminator="name")]


def by_name() -> dict[str, type[LossSpec]]:
    """The losses by the name that the config writes."""
    return {spec.model_fields["name"].default: spec for spec in get_args(AnyLoss)}


def table() -> list[dict[str, Any]]:
    """What each loss says of itself, as plain values: name, family, formula, defaults, source."""
    return [
        {
            "name": name,
            "family": spec.family,
            "formula": spec.formula,
            "defaults": spec.defaults(),
            "source": spec.source,
        }
        for name, spec in by_name().items()
    ]


__all__ = [
    "TPE",
    "TSE",
    "ASoftmax",
    "AdaFace",
    "AnyLoss",
    "ArcFace",
    "Center",
    "CenterInvariant",
    "CoCo",
    "Combined",
    "Contrastive",
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
    "Marginal",
    "ModifiedSoftmax",
    "NormFace",
    "Range",
    "Softmax",
    "SubCenterArcFace",
    "Triplet",
    "WeightedSoftmax",
    "by_name",
    "table",
]
