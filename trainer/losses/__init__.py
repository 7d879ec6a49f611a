"""Every loss that a config can name."""

from typing import Any

from trainer.losses.base import LossSpec
from trainer.losses.centres import Center, CenterInvariant, Range
from trainer.losses.elementary import ELEMENTARY
from trainer.losses.margins import Margin
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
from trainer.losses.margins.softmax import (
    ASoftmax,
    Focal,
    L2Softmax,
    LSoftmax,
    ModifiedSoftmax,
    Softmax,
    WeightedSoftmax,
)
from trainer.losses.pairs import CoCo, Contrastive, Marginal
from trainer.losses.triplets import TPE, TSE, Triplet

# In the order of the literature. A new loss is a file of its own and a line here.
LOSSES: tuple[type[LossSpec], ...] = (
    *(Softmax, WeightedSoftmax, Focal, ModifiedSoftmax, LSoftmax, ASoftmax, L2Softmax, NormFace, CoCo, CosFace),
    *(ArcFace, Combined, SubCenterArcFace, AdaFace, MagFace, ElasticFace, DynamicMargin, CurricularFace, MVSoftmax),
    *(Contrastive, Marginal, Triplet, TSE, TPE),
    *(Center, CenterInvariant, Range),
)


def by_name() -> dict[str, type[LossSpec]]:
    """The losses by the name that the config writes."""
    return {spec().name: spec for spec in LOSSES}


def all_margins() -> list[type[Margin]]:
    """The losses that are a head's margin."""
    return [spec for spec in LOSSES if issubclass(spec, Margin)]


def table() -> list[dict[str, Any]]:
    """What each loss says of itself, as plain values; at the end the elementary losses that the others grew from, which
    a config cannot name."""
    rows: list[tuple[object, ...]] = [
        (one().name, one.family, one.formula, one.defaults(), one.source) for one in LOSSES
    ]
    rows += [(e.name, "elementary", f"{e.formula}; derivative: {e.gradient}", {}, e.source) for e in ELEMENTARY]
    return [dict(zip(("name", "family", "formula", "defaults", "source"), row, strict=True)) for row in rows]
