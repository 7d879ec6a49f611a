"""The configs that the project ships: each one loads, and names a backbone that its images fit."""

from pathlib import Path

import pytest
import torch

from trainer.backbones import build
from trainer.config import load

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_loads_and_its_backbone_takes_its_images(path: Path) -> None:
    config = load(path)
    with torch.device("meta"):
        backbone = build(config.backbone, 3, config.data.height, config.data.width)
        x_BD = backbone(torch.empty(2, 3, config.data.height, config.data.width))
    assert x_BD.shape == (2, config.backbone.dimension)


def test_there_is_a_config_for_the_demo() -> None:
    assert "demo" in [path.stem for path in CONFIGS]
