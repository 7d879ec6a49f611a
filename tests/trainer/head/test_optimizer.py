"""The head's optimizer against the textbook steps, its low-precision states, and its checkpoint."""

from typing import Any

import numpy as np
import pytest
import torch

from trainer.config import load
from trainer.errors import UserError
from trainer.head import Head
from trainer.head.optimizer import LEAST_SCALE, HeadOptimizer
from trainer.head.rounding import Noise, RowState, to_bf16
from trainer.head.settings import HeadConfig, HeadOptimizerConfig
from trainer.losses import ArcFace, Margin, NormFace, Softmax
from trainer.losses.margins import MAX_SCALE
from trainer.objective import Objective

CPU = torch.device("cpu")


def batch(seed: int = 0, classes: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 16, generator=generator), torch.randint(0, classes, (8,), generator=generator)


def train(margin: Margin, config: dict[str, Any], steps: int = 5, lr: float = 0.1, **head: Any) -> Head:
    made = Head(margin, 40, 16, HeadConfig(tile=16, optimizer=HeadOptimizerConfig(**config), **head), seed=2)
    optimizer = HeadOptimizer(made)
    for step in range(steps):
        optimizer.prepare(lr)
        made(*batch(step % 6)).backward()
        optimizer.step(lr)
        optimizer.zero_grad()
    return made


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_rows_with_a_length_step_as_in_torch(name: str) -> None:
    found = train(Softmax(), {"name": name, "weight_decay": 0.01})
    wanted = Head(Softmax(), 40, 16, HeadConfig(tile=16), seed=2)
    assert wanted.bias is not None
    rows, bias = [{"params": [wanted.weight], "weight_decay": 0.01}], [{"params": [wanted.bias], "weight_decay": 0.0}]
    optimizer = (
        torch.optim.SGD(rows + bias, lr=0.1, momentum=0.9) if name == "sgd" else torch.optim.AdamW(rows + bias, lr=0.1)
    )
    for step in range(5):
        optimizer.zero_grad()
        wanted(*batch(step)).backward()
        optimizer.step()
    torch.testing.assert_close(found.weight, wanted.weight, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(found.bias, wanted.bias, atol=1e-5, rtol=1e-3)


def test_unit_rows_move_on_the_sphere() -> None:
    """Against the formulas of the module, row by row in float64."""
    head = Head(ArcFace(scale=16.0), 40, 16, seed=2)
    optimizer = HeadOptimizer(head)
    w, v = head.weight.detach().double().clone(), torch.zeros(40, 16, dtype=torch.float64)
    for step in range(4):
        head(*batch(step)).backward()
        assert head.weight.grad is not None
        gradient = head.weight.grad.double()
        for row in range(40):
            v[row] = 0.9 * v[row] + gradient[row]
            v[row] = v[row] - (v[row] @ w[row]) * w[row]
            moved = w[row] - 0.1 * v[row]
            w[row] = moved / moved.norm()
        optimizer.step(0.1)
        optimizer.zero_grad()
    torch.testing.assert_close(head.weight.detach().double(), w, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(40))


@pytest.mark.parametrize("margin", [ArcFace(scale=16.0), Softmax()])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@pytest.mark.parametrize("algorithm", ["store", "recompute"])
def test_stepping_inside_the_backward_is_the_same(margin: Margin, name: str, weights: str, algorithm: str) -> None:
    """Exactly in fp32; with bf16 centres the gradient on its way is not rounded to bf16, so a rounding may differ."""
    fused = train(margin, {"name": name}, fused=True, param_dtype=weights, algorithm=algorithm)
    apart = train(margin, {"name": name}, param_dtype=weights, algorithm=algorithm)
    assert fused.weight.grad is None
    tolerance = 1e-6 if weights == "fp32" else 0.05
    torch.testing.assert_close(fused.weight, apart.weight, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(list(fused.parameters())[1:], list(apart.parameters())[1:], atol=1e-2, rtol=1e-2)


def test_a_fused_head_wants_its_learning_rate_first() -> None:
    head = Head(ArcFace(), 40, 16, HeadConfig(fused=True))
    HeadOptimizer(head)
    with pytest.raises(RuntimeError, match="prepare"):
        head(*batch()).backward()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize(("state", "weights"), [("bf16", "fp32"), ("int8", "fp32"), ("int8", "bf16")])
def test_low_precision_trains_like_fp32(name: str, state: str, weights: str) -> None:
    """The loss after 60 small steps is within 3 % of the fp32 loss, which has fallen by a third and more."""
    losses = {}
    for key, config in {"fp32": {}, "low": {"state_dtype": state}}.items():
        lr = 0.02
        extra = {"param_dtype": weights} if key == "low" else {}
        head = train(NormFace(scale=16.0), config | {"name": name}, steps=60, lr=lr, **extra)
        losses[key] = sum(float(head(*batch(step)).detach()) for step in range(6)) / 6
    start = Head(NormFace(scale=16.0), 40, 16, seed=2)
    first = sum(float(start(*batch(step)).detach()) for step in range(6)) / 6
    assert losses["fp32"] < 0.7 * first
    assert losses["low"] == pytest.approx(losses["fp32"], rel=0.03)


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_rounding_is_right_in_the_mean(kind: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 64, generator=generator)
    total, draws = torch.zeros(4, 64), 2000
    for seed in range(draws):
        state = RowState(torch.zeros(4, 64), kind)
        state.write(slice(0, 4), values, Noise(seed, 64, CPU)(slice(0, 4), 0))
        total += state.read(slice(0, 4))
    step = values.abs().amax(1, keepdim=True) / 127 if kind == "int8" else values.abs() * 2**-7
    bias = (total / draws - values).abs() / step
    assert float(bias.max()) < 5 * 0.5 / draws**0.5
    once = (state.read(slice(0, 4)) - values).abs() / step
    assert float(once.max()) <= 1.0001
    assert float(once.mean()) > 0.1  # it does round


def test_to_bf16_keeps_what_bf16_can_hold() -> None:
    values = torch.tensor([[0.0, 1.0, -2.5, 1e-30, -3e38]]).bfloat16().float()
    for bits in (0, 65535):
        assert torch.equal(to_bf16(values, torch.full((1, 5), bits, dtype=torch.int32)).float(), values)


def test_noise_belongs_to_the_row_not_to_the_rank() -> None:
    noise = Noise(3, 8, CPU)
    whole = noise(slice(0, 1024), 1)
    assert torch.equal(noise(slice(100, 300), 1), whole[100:300])
    assert torch.equal(noise(torch.tensor([5, 700]), 1), noise(torch.tensor([5, 1724]), 1)[:2])
    assert not torch.equal(whole, noise(slice(0, 1024), 2))
    assert not torch.equal(whole, noise(slice(1024, 2048), 1))
    assert 0 <= int(whole.min()) <= int(whole.max()) < 65536
    assert float(whole.float().mean()) == pytest.approx(32768, rel=0.02)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("state", ["fp32", "bf16", "int8"])
def test_a_checkpoint_continues_exactly(name: str, state: str) -> None:
    config = HeadConfig(optimizer=HeadOptimizerConfig(name=name, state_dtype=state))  # type: ignore[arg-type]
    head = Head(Softmax(), 40, 16, config, seed=2)
    optimizer = HeadOptimizer(head)

    def steps(head: Head, optimizer: HeadOptimizer, numbers: range) -> None:
        for step in numbers:
            head(*batch(step)).backward()
            optimizer.step(0.1)
            optimizer.zero_grad()

    steps(head, optimizer, range(3))
    saved = {key: tensor.clone() for key, tensor in head.state_dict().items()}
    saved_state = {key: tensor.clone() for key, tensor in optimizer.state_dict().items()}
    steps(head, optimizer, range(3, 6))
    other = Head(Softmax(), 40, 16, config, seed=9)
    continued = HeadOptimizer(other)
    other.load_state_dict(saved)
    continued.load_state_dict(saved_state)
    other.seed = head.seed  # the seed comes from the config, and decides the rounding
    steps(other, continued, range(3, 6))
    assert torch.equal(other.weight, head.weight)


def test_a_state_of_another_kind_is_refused() -> None:
    def made(**settings: Any) -> HeadOptimizer:
        return HeadOptimizer(Head(ArcFace(), 40, 16, HeadConfig(optimizer=HeadOptimizerConfig(**settings))))

    state = made(state_dtype="int8").state_dict()
    with pytest.raises(UserError, match=r"'rows.first' is torch.int8 .* resume with the head.optimizer settings"):
        made().load_state_dict(state)
    with pytest.raises(UserError, match=r"'rows.second' is absent"):
        made(name="adamw", state_dtype="int8").load_state_dict(state)


def test_state_costs_the_promised_bytes() -> None:
    for state, expected in (("fp32", 4.0), ("bf16", 2.0), ("int8", 1 + 4 / 512)):
        settings = HeadOptimizerConfig(state_dtype=state)  # type: ignore[arg-type]
        head = Head(ArcFace(), 1000, 512, HeadConfig(param_dtype="bf16", optimizer=settings))
        size = sum(tensor.numel() * tensor.element_size() for tensor in HeadOptimizer(head).state_dict().values())
        assert size / (1000 * 512) == pytest.approx(expected, rel=1e-3)
        assert head.weight.element_size() == 2


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_learnable_scale_stays_usable(name: str) -> None:
    settings = HeadOptimizerConfig(name=name)  # type: ignore[arg-type]
    head = Head(NormFace(learnable=True), 20, 8, HeadConfig(optimizer=settings))
    optimizer = HeadOptimizer(head)
    for gradient, bound in ((1e9, LEAST_SCALE), (-1e9, MAX_SCALE)):
        head.scalars["scale"].grad = torch.tensor(gradient)
        for _ in range(3):
            optimizer.step(1e6)
        assert float(head.scalars["scale"].detach()) == pytest.approx(bound)


def test_a_fused_head_trains_as_an_objective_like_one_that_is_not() -> None:
    ends = []
    for fused in ("true", "false"):
        config = load(None, ["loss=arcface", f"head.fused={fused}", "backbone.dimension=8", "scaling.workers=1"])
        objective = Objective(config, 30, [5] * 30, torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        for step in range(3):
            x_BD = torch.randn(6, 8, generator=generator, requires_grad=True)
            objective.set_progress(step, 1.0)
            loss, _ = objective(x_BD, torch.arange(6), [f"{k}" for k in range(6)])
            objective.prepare(0.1)
            loss.backward()
            objective.step(0.1)
        centres = objective.geometry().centres
        assert centres is not None
        ends.append(centres(torch.arange(30)).rows_cKD)
    np.testing.assert_allclose(*ends, rtol=1.3e-6, atol=1e-5)
