"""The elementary losses against their formulas, one sample at a time, with gradients."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.losses.elementary import ELEMENTARY, focal_loss, l2_regularized_softmax

Z = [-3.0, -0.4, 0.2, 0.9, 2.5, 0.7]
REAL = [1.0, -0.5, 0.1, 3.0, 2.4, -2.0]
SIGNS = [1.0, -1.0, 1.0, 1.0, -1.0, -1.0]
BITS = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0]
PROBABILITIES = [0.1, 0.35, 0.5, 0.98, 0.4, 0.01]


def huber(z: float, t: float) -> float:
    return (z - t) ** 2 / 2 if abs(z - t) < 1 else abs(z - t) - 0.5


def focal(z: float, t: float) -> float:
    p = 1 / (1 + math.exp(-z))
    p_t, a_t = (p, 0.25) if t == 1 else (1 - p, 0.75)
    return -a_t * (1 - p_t) ** 2 * math.log(p_t)


PER_SAMPLE: dict[str, tuple[list[float], list[float], Callable[[float, float], float]]] = {
    "l1": (Z, REAL, lambda z, t: abs(z - t)),
    "l2": (Z, REAL, lambda z, t: (z - t) ** 2),
    "huber": (Z, REAL, huber),
    "binary_cross_entropy": (PROBABILITIES, BITS, lambda p, t: -t * math.log(p) - (1 - t) * math.log(1 - p)),
    "logistic": (Z, SIGNS, lambda z, t: math.log(1 + math.exp(-t * z))),
    "hinge": (Z, SIGNS, lambda z, t: max(0.0, 1 - t * z)),
    "exponential": (Z, SIGNS, lambda z, t: math.exp(-t * z)),
    "binary_focal": (Z, BITS, focal),
}
TABLE = {row.name: row for row in ELEMENTARY}


def test_the_set_is_whole() -> None:
    assert list(TABLE) == [
        *["l1", "l2", "huber", "binary_cross_entropy", "logistic", "hinge", "exponential", "softmax_l2", "binary_focal"]
    ]
    assert all(row.formula and row.gradient and row.source for row in ELEMENTARY)


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_value_and_slope(name: str) -> None:
    predictions, targets, formula = PER_SAMPLE[name]
    x = torch.tensor(predictions, dtype=torch.float64, requires_grad=True)
    loss = TABLE[name].function(x, torch.tensor(targets).double())
    loss.backward()
    assert float(loss.detach()) == pytest.approx(sum(map(formula, predictions, targets)) / len(predictions))
    step = 1e-6
    slopes = [
        (formula(z + step, t) - formula(z - step, t)) / (2 * step) for z, t in zip(predictions, targets, strict=True)
    ]
    assert x.grad is not None
    assert (x.grad * len(predictions)).tolist() == pytest.approx(slopes, rel=1e-6, abs=1e-8)


def softmax_regression(x: Tensor, w: Tensor, bias: Tensor, labels: list[int], decay: float) -> Any:
    total = x.sum() * 0
    for row, label in zip(x, labels, strict=True):
        z = [row @ w[c] + bias[c] for c in range(len(w))]
        total = total - torch.log(torch.exp(z[label]) / sum(torch.exp(value) for value in z))
    return total / len(labels) + decay / 2 * sum(value**2 for value in w.flatten())


def test_softmax_regression_with_l2() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w, bias = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 3), (4, 3), (4,)))
    labels = [0, 3, 3, 1, 2]
    w.requires_grad_()
    bias.requires_grad_()
    found = l2_regularized_softmax(x, w, bias, torch.tensor(labels), 0.1)
    expected = softmax_regression(x, w, bias, labels, 0.1)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found, (w, bias)), torch.autograd.grad(expected, (w, bias))
    torch.testing.assert_close(*gradients)


def test_focal_keeps_its_digits_at_both_ends() -> None:
    """and without fading or balance it is half the binary cross entropy."""
    z = torch.tensor([-200.0, 200.0, -200.0, 200.0], dtype=torch.float64, requires_grad=True)
    loss = focal_loss(z, torch.tensor([1.0, 1, 0, 0], dtype=torch.float64))
    loss.backward()
    assert float(loss.detach()) == pytest.approx((0.25 * 200 + 0.75 * 200) / 4)
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()
    plain = focal_loss(torch.tensor(Z), torch.tensor(BITS), gamma=0.0, balance=0.5)
    torch.testing.assert_close(
        plain, torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(Z), torch.tensor(BITS)) / 2
    )
