"""The losses of 1, 2 and 3 ranks are the same, up to the order of sums: every backbone, every ZeRO stage."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from tests.ranks import folder_of_shapes, run_on_ranks
from trainer import train
from trainer.backbones import networks
from trainer.config import Config, load
from trainer.data.importers import ImportOptions
from trainer.data.importers.run import run_import
from trainer.train import Record, run

WORLDS = (1, 2, 3)
STEPS = 12
# Backbone, ZeRO stage, group of batch norm: 8 is inside every share of the 24 samples, 10 (24 are cut into 12 and 12)
# goes over borders between three of them, 0 is all 24.
CASES = [
    ("convnet", 0, 8),
    ("convnet", 1, 0),
    ("iresnet18", 1, 8),
    ("iresnet18", 2, 10),
    ("mobilefacenet", 2, 8),
    ("vit", 2, 0),
    ("mlp", 1, 10),
    ("timm:normed", 2, 0),
]
# fp32 has 6e-8; what ranks add up in another order differs by some of these, and each step of a training multiplies
# the difference by 1.2 and more. Where batch norm sees the rank's share, the losses differ by 0.1 and more.
TOLERANCE = 5e-4


class Normed(nn.BatchNorm2d):
    """As timm has it: a batch norm that goes on with dropout and an activation."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(x_BCHW)))


def timm_like() -> ModuleType:
    """What this project uses of timm: the tests' environment has none, since it needs torchvision."""

    def create_model(name: str, **options: object) -> nn.Module:
        network = nn.Sequential(nn.Conv2d(1, 8, 3, 2), Normed(8), nn.AdaptiveAvgPool2d(3), nn.Flatten())
        network.num_features = 72
        return network

    module = ModuleType("timm")
    module.is_model = lambda name: True
    module.get_pretrained_cfg = lambda name: SimpleNamespace(fixed_input_size=False)
    module.create_model = create_model
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    source = folder_of_shapes(folder / "images", identities=10, samples=8)
    run_import("folder", source, folder / "data", ImportOptions(holdout_share=0.3))
    return folder / "data"


def config(data: Path, out: Path, *overrides: str) -> Config:
    """With a short last batch in each epoch, and rates at which a difference does not grow fast."""
    overrides = (
        *(f"data.path={data}", f"run.out={out}", "data.batch_size=24", "run.epochs=99", f"run.max_steps={STEPS}"),
        *("run.log_every=1", "run.eval_every=0", "backbone.dimension=16", "backbone.width=8", "backbone.dropout=0.2"),
        *("data.height=24", "data.width=24", "augment.translate=0.1", "optimizer.lr=0.003", "head.optimizer.lr=0.1"),
        *("engine.gradient_clipping=1", "loss=cosface", "loss.scale=8", "loss.margin=0.2", *overrides),
    )
    return load(None, list(overrides))


def losses(settings: Config) -> list[float]:
    found: list[Record] = []
    run(settings, resume=False, report=found.append)
    return [record.values["loss"] for record in found if record.kind == "step"]


def trains(rank: int, size: int, data: Path, folder: Path) -> None:
    sys.modules["timm"] = timm_like()
    train._Run.save = lambda self: None  # would take most of the time
    networks.VIT_DEPTH, networks.VIT_WIDTH = 2, 48  # larger ones would only take longer
    networks.WIDTHS, networks.STEM, networks.LAST = (8, 16, 24, 32), 16, 64
    for number, (name, stage, group) in enumerate(CASES):
        settings = config(
            data, folder / f"{size}-{number}", f"scaling.workers={size}", f"backbone.name={name}",
            f"engine.zero_stage={stage}", f"backbone.norm_group={group}",
        )  # fmt: skip
        found = losses(settings)
        if rank == 0:
            (folder / f"{size}-{number}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worlds")
    for size in WORLDS:
        run_on_ranks(size, trains, size, data, folder)
    return folder


@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_any_number_of_ranks_gives_the_same_losses(trained: Path, number: int) -> None:
    one, *others = (torch.tensor(json.loads((trained / f"{size}-{number}.json").read_text())) for size in WORLDS)
    assert len(one) == STEPS
    differences = [float(((other - one) / one).abs().max()) for other in others]
    print(CASES[number], [f"{difference:.1e}" for difference in differences])
    assert max(differences) < TOLERANCE
