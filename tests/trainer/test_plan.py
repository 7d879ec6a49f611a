"""The rehearsal: its figures are those of the tensors, and real Ray workers leave nothing behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.trainer.test_world import config, data
from trainer.backbones import build, networks
from trainer.errors import UserError
from trainer.plan import rehearse
from trainer.train import Record

__all__ = ["data"]  # the fixture
CLASSES, D = 7, 16  # identities that the data set trains on
CASES: dict[str, tuple[str, ...]] = {
    "plain": ("backbone.name=iresnet18",),
    "recompute": ("backbone.name=iresnet18", "backbone.recompute=true"),
    "accumulate": ("backbone.name=iresnet18", "engine.accumulate=3", "backbone.norm_group=4"),
    "ZeRO 2": ("backbone.name=iresnet18", "engine.zero_stage=2", "optimizer.name=adamw", "engine.ema_decay=0.9"),
}


def plans(rank: int, data: Path, folder: Path) -> None:
    networks.WIDTHS = (16, 32, 48, 64)
    found = {}
    for name, overrides in CASES.items():
        records: list[Record] = []
        rehearse(config(data, folder / "run", *overrides), records.append)
        (found[name],) = (record.values for record in records if record.kind == "plan")
    with pytest.raises(UserError, match="holds no weights to begin with"):
        rehearse(config(data, folder / "run", f"init.weights={folder}"), lambda _: None)
    with torch.device("meta"):
        made = build(config(data, folder, *CASES["plain"]).backbone, 1, 24, 24)
    found["backbone"] = {"bytes": 4.0 * sum(parameter.numel() for parameter in made.parameters())}
    if rank == 0:
        (folder / "plans.json").write_text(json.dumps(found))


def test_each_part_has_its_bytes(data: Path, tmp_path: Path) -> None:
    run_on_ranks(2, plans, data, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["plans.json"]
    found = json.loads((tmp_path / "plans.json").read_text())
    plain, zero = found["plain"], found["ZeRO 2"]
    size = found["backbone"]["bytes"]
    assert plain["gradients"] == plain["moments"] == size
    assert plain["class centres"] == plain["their state"] - 8 == 4 * 4 * D  # the larger share of 7 is 4
    assert zero["gradients"] == size / 2
    assert zero["moments"] == pytest.approx(size, rel=1e-3)  # two, of half the weights
    assert zero["moving average"] == pytest.approx(zero["weights"], rel=1e-3)
    assert found["recompute"]["activations"] < 0.5 * plain["activations"]
    assert found["accumulate"]["activations"] == pytest.approx(plain["activations"] / 3, rel=0.2)


def test_dry_run_does_a_step_on_ray_workers_and_leaves_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "runs" / "one"
    line = ["train", "--dry-run", f"data.path={data}", f"run.out={out}", "data.batch_size=24", "data.height=24"]
    line += ["data.width=24", "backbone.name=convnet", "scaling.workers=2", "tracking.enabled=false"]
    result = subprocess.run([sys.executable, "-m", "serving.cli", *line], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "batch_size: 24" in result.stdout
    for part in ("weights", "gradients", "moments", "class centres", "their state", "activations"):
        assert f" {part} " in result.stdout
    assert list(tmp_path.iterdir()) == []
