"""Networks from samples to embeddings, made by their name in the config."""

import difflib
from typing import Any

from torch import nn

from trainer.backbones.networks import (
    MLP,
    SMALL_UNITS,
    UNITS,
    ConvNet,
    IResNet,
    MobileFaceNet,
    ResNet,
    VisionTransformer,
)
from trainer.config import BackboneConfig
from trainer.errors import UserError

NAMES = ("convnet", *SMALL_UNITS, *UNITS, "mobilefacenet", "vit", "mlp", "timm:<name>")


def build(config: BackboneConfig, channels: int, height: int, width: int) -> nn.Module:
    """The backbone: float images_BCHW in [-1, 1] to x_BD, not normalised, with fresh weights from torch's generator.

    Args:
        channels, height, width: of images; of spectrograms 1, frequency and time; of vectors dimension, 1 and 1. All
            networks take any size from 16 x 16, `mlp` takes any at all.

    Raises:
        UserError: the name is not known, the samples are too small, or timm cannot be used.
    """
    if config.name == "mlp":
        return MLP(channels * height * width, config.dimension, config.width, config.dropout)
    if min(height, width) < 16:
        raise UserError(
            f"samples of {height} x {width} are too small for backbone.name={config.name}, which takes 16 x 16 or "
            "more; of images raise data.height and data.width, for vectors and small spectrograms take the mlp"
        )
    D, dropout = config.dimension, config.dropout
    match config.name:
        case "convnet":
            return ConvNet(channels, height, width, dimension=D, first=config.width, dropout=dropout)
        case "mobilefacenet":
            return MobileFaceNet(channels, height, width, D, dropout)
        case "vit":
            return VisionTransformer(channels, height, width, D, dropout)
        case name if name in SMALL_UNITS:
            return ResNet(SMALL_UNITS[name], channels, height, width, dimension=D, first=config.width, dropout=dropout)
        case name if name in UNITS:
            return IResNet(UNITS[name], channels, height, width, dimension=D, dropout=dropout)
        case name if name.startswith("timm:"):
            return _from_timm(name.removeprefix("timm:"), config, channels, height, width)
        case name:
            close = difflib.get_close_matches(name, NAMES, 1)
            hint = f"did you mean '{close[0]}'? " if close else ""
            raise UserError(f"backbone.name '{name}' is not known; {hint}allowed: {', '.join(NAMES)}")


def _from_timm(name: str, config: BackboneConfig, channels: int, height: int, width: int) -> nn.Module:
    """A timm network without its classifier, and a linear layer with batch norm to D."""
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        raise UserError(
            f"backbone.name 'timm:{name}' needs timm, which cannot be imported here ({error}); "
            "install it with pip install 'hypersphere[timm]', or choose another backbone"
        ) from error
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), 3)
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() lists what it has"
        raise UserError(f"backbone.name 'timm:{name}' is not a model of timm {timm.__version__}; {hint}")
    options: dict[str, Any] = {"num_classes": 0, "in_chans": channels, "drop_rate": config.dropout}
    if timm.get_pretrained_cfg(name).fixed_input_size:  # position embeddings: the network is made for one size
        options["img_size"] = (height, width)
    features = timm.create_model(name, pretrained=False, **options)
    return nn.Sequential(
        features, nn.Linear(features.num_features, config.dimension, bias=False), nn.BatchNorm1d(config.dimension)
    )
