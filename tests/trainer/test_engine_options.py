"""What a config can ask of the engine: each on two ranks against one, and against the run without it."""

import json
from pathlib import Path

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.trainer.test_world import config, data, losses
from trainer import train
from trainer.backbones import networks

__all__ = ["data"]  # the fixture

SMALL = ("backbone.name=iresnet18", "backbone.norm_group=4", "run.max_steps=6")
ADAMW = ("backbone.name=mlp", "optimizer.name=adamw", "optimizer.lr=0.001", "engine.zero_stage=1", "run.max_steps=6")
PAIRS = ("data.identities_per_batch=6", "auxiliary=[triplet]", *SMALL)
MLP = ("backbone.name=mlp", "backbone.norm_group=4", "run.max_steps=6")
# Name: the same without it, how near their losses are, and the config. None: they are others.
CASES: dict[str, tuple[str, float | None, tuple[str, ...]]] = {
    "plain": ("plain", 0, SMALL),
    "accumulate": ("plain", 5e-4, (*SMALL, "engine.accumulate=3")),
    "accumulate, ZeRO 2": ("plain", 5e-4, (*SMALL, "engine.accumulate=3", "engine.zero_stage=2")),
    "pairs": ("pairs", 0, PAIRS),
    "accumulate, pairs": ("pairs", 5e-4, (*PAIRS, "engine.accumulate=3")),
    "recompute": ("plain", 0, (*SMALL, "backbone.recompute=true")),
    "recompute, accumulate": ("accumulate", 0, (*SMALL, "backbone.recompute=true", "engine.accumulate=3")),
    "channels last": ("plain", 5e-4, (*SMALL, "backbone.channels_last=true")),
    "channels last, ZeRO 1": ("plain", 5e-4, (*SMALL, "backbone.channels_last=true", "engine.zero_stage=1")),
    "average": ("plain", 0, (*SMALL, "engine.ema_decay=0.9")),
    "rates": ("plain", None, (*SMALL, "optimizer.layer_decay=0.7", "optimizer.rates={'stem.*': 0.1}")),
    "adamw": ("adamw", 0, ADAMW),
    "offload": ("adamw", 5e-4, (*ADAMW, "engine.offload=true")),
    "offload, ZeRO 2": ("adamw", 5e-4, (*ADAMW, "engine.offload=true", "engine.zero_stage=2")),
    "mlp": ("mlp", 0, MLP),
    "compile": ("mlp", 5e-4, (*MLP, "backbone.compile=true")),
    "compile, accumulate": ("mlp", 5e-4, (*MLP, "backbone.compile=true", "engine.accumulate=3")),
}


def trains(rank: int, size: int, data: Path, folder: Path) -> None:
    train._Run.save = lambda self: None  # type: ignore[method-assign]  # would take most of the time
    networks.WIDTHS = (8, 16, 24, 32)
    found = {
        name: losses(config(data, folder / f"{size}-{number}", f"scaling.workers={size}", *overrides))
        for number, (name, (_, _, overrides)) in enumerate(CASES.items())
    }
    if rank == 0:
        (folder / f"{size}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("options")
    for size in (1, 2):
        run_on_ranks(size, trains, size, data, folder)
    texts = {size: json.loads((folder / f"{size}.json").read_text()) for size in (1, 2)}
    return {size: {name: torch.tensor(found) for name, found in cases.items()} for size, cases in texts.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_losses_are_those_of_one_rank_and_of_the_run_without_it(
    trained: dict[int, dict[str, torch.Tensor]], name: str
) -> None:
    torch.testing.assert_close(trained[2][name], trained[1][name], rtol=5e-4, atol=0)
    without, tolerance, _ = CASES[name]
    for found in trained.values():
        if tolerance is None:
            assert found[name][0] == found[without][0]
            assert not torch.allclose(found[name], found[without], rtol=1e-3)
        else:
            torch.testing.assert_close(found[name], found[without], rtol=tolerance, atol=0)
