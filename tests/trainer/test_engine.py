"""The engine on two ranks: gradients are averaged, the head is left alone, and its state survives a restart."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.ranks import run_on_ranks
from trainer.config import BackboneConfig, Config, EngineConfig, OptimizerConfig
from trainer.data.stream import DataConfig
from trainer.engine import Engine
from trainer.errors import UserError

CASES = [(0, False, "sgd"), (0, True, "adamw"), (1, False, "sgd"), (2, False, "adamw"), (2, True, "sgd")]


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


def make(stage: int, bf16: bool, name: str, clipping: float = 0.0, momentum: float = 0.9) -> Engine:
    settings = EngineConfig(zero_stage=stage, bf16=bf16, gradient_clipping=clipping, ema_decay=0.9)  # type: ignore[arg-type]
    optimizer = OptimizerConfig(name=name, lr=0.1, momentum=momentum)  # type: ignore[arg-type]
    backbone = BackboneConfig(norm_group=4)  # a worker's share
    config = Config(engine=settings, optimizer=optimizer, data=DataConfig(batch_size=8), backbone=backbone)
    return Engine(small_network(), config, torch.device("cpu"))


def steps(engine: Engine, rank: int, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        x_BD = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + rank))
        loss = engine(x_BD).square().mean()
        engine.backward(loss)
        engine.step(0.05)
        losses.append(float(loss))
    return losses


def goes_on_after_a_restart(rank: int) -> None:
    for stage, bf16, name in CASES:
        engine = make(stage, bf16, name)
        steps(engine, rank, 0, 3)
        state = {key: value.clone() for key, value in engine.state().items()}
        expected = steps(engine, rank, 3, 6)
        again = make(stage, bf16, name)
        again.load_state(state)
        assert steps(again, rank, 3, 6) == expected, (stage, bf16, name)
        assert {key.partition(".")[0] for key in state} >= {"weight", "buffer", "optimizer", "ema"}
        one, other = engine.state(), again.state()
        assert [key for key in one if not torch.equal(one[key], other[key])] == []
        assert int(one["ema.count"]) == 6


def averages_and_leaves_the_head_alone(rank: int) -> None:
    """One step against plain torch on the whole batch; the clipping is far below the head's gradient."""
    for stage in (0, 1, 2):
        centres = nn.Parameter(torch.full((4,), 2.0))
        engine = make(stage, False, "sgd", clipping=1e-3)
        module = engine.module
        before = {name: value.clone() for name, value in engine.state().items()}
        x_BD = torch.randn(4, 8, generator=torch.Generator().manual_seed(rank))
        loss = (engine(x_BD) * centres).square().mean() * 100
        engine.backward(loss)
        plain = small_network()
        plain_centres = nn.Parameter(torch.full((4,), 2.0))
        both = [torch.randn(4, 8, generator=torch.Generator().manual_seed(r)) for r in (0, 1)]
        ((plain(both[rank]) * plain_centres).square().mean() * 100).backward()
        assert plain_centres.grad is not None
        assert centres.grad is not None
        torch.testing.assert_close(centres.grad, plain_centres.grad)
        engine.step(1.0)
        torch.testing.assert_close(centres.grad, plain_centres.grad)
        gradients = []
        for x_r in both:
            copy = small_network()
            ((copy(x_r) * plain_centres.detach()).square().mean() * 100).backward()
            gradients.append([p.grad for p in copy.parameters()])
        mean = [(a + b) / 2 for a, b in zip(*gradients, strict=True) if a is not None and b is not None]
        norm = torch.sqrt(sum((g.square().sum() for g in mean), torch.tensor(0.0)))
        after = engine.state()
        for (name, parameter), gradient in zip(module.named_parameters(), mean, strict=True):
            start = before[f"weight.{name}"]
            decay = 5e-4 * start if parameter.ndim > 1 else 0.0
            clipped = gradient * 1e-3 / norm
            # Nesterov's first step is (1 + momentum) times the gradient.
            torch.testing.assert_close(after[f"weight.{name}"], start - 1.9 * (clipped + decay), atol=2e-6, rtol=1e-4)


def the_same_gradients_at_every_stage(rank: int) -> None:
    """With momentum 0 and the rate 1 a step is the averaged gradient; weight decay is the same in all."""
    taken: list[dict[str, torch.Tensor]] = []
    for stage in (0, 1, 2):
        engine = make(stage, True, "sgd", momentum=0.0)
        before = engine.state()
        x_BD = torch.randn(4, 8, generator=torch.Generator().manual_seed(rank))
        engine.backward(engine(x_BD).square().mean() * 100)
        engine.step(1.0)
        after = engine.state()
        taken.append({name: before[name] - after[name] for name in before if name.startswith("weight.")})
    for stage in (1, 2):
        for name, gradient in taken[0].items():
            torch.testing.assert_close(taken[stage][name], gradient, rtol=1e-6, atol=1e-6, msg=f"{name}, ZeRO {stage}")


def averages(rank: int, size: int, folder: Path) -> None:
    for stage in (0, 2):
        engine = make(stage, False, "sgd")  # AdamW makes whole steps of the noise of a bias before a batch norm
        for step in range(6):
            x_BD = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
            engine.backward(engine(x_BD.chunk(size)[rank], step).square().mean())
            engine.step(0.01)
        save_file(
            {name: value.contiguous() for name, value in engine.state().items()}, folder / f"{size}-{stage}-{rank}"
        )


def test_the_average_of_two_ranks_is_that_of_one(tmp_path: Path) -> None:
    for size in (1, 2):
        run_on_ranks(size, averages, size, tmp_path)
    for stage in (0, 2):
        one, two, other = (load_file(tmp_path / name) for name in (f"1-{stage}-0", f"2-{stage}-0", f"2-{stage}-1"))
        for name in one:
            if name.startswith("ema."):
                torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)
                assert torch.equal(two[name], other[name])
        assert not torch.allclose(one["ema.0.weight"], one["weight.0.weight"], rtol=1e-3)


def test_bf16_adds_gradients_up_in_fp32_at_every_stage() -> None:
    run_on_ranks(2, the_same_gradients_at_every_stage)


def test_state_survives_a_restart_at_every_stage() -> None:
    run_on_ranks(2, goes_on_after_a_restart)


def test_gradients_are_averaged_and_the_head_is_left_alone() -> None:
    run_on_ranks(2, averages_and_leaves_the_head_alone)


def refuses_another_backbone(rank: int, _: Path) -> None:
    engine = make(0, False, "sgd")
    state = engine.state()
    with pytest.raises(UserError, match="missing"):
        engine.load_state({key: value for key, value in state.items() if key != "weight.0.weight"})
    with pytest.raises(UserError, match="shape"):
        engine.load_state(state | {"weight.0.weight": torch.zeros(3, 3)})


def test_a_state_of_another_backbone_is_refused(tmp_path: Path) -> None:
    run_on_ranks(2, refuses_another_backbone, tmp_path)
