"""Embeddings of any length that fp32 can write: every loss gives what it gives in fp64, where squares are numbers."""

import copy
import math

import pytest
import torch
from torch import nn

from tests.trainer.head.cases import CLASSES as HEAD_CLASSES
from tests.trainer.head.cases import DIMENSION as HEAD_DIMENSION
from tests.trainer.head.cases import MARGINS
from tests.trainer.head.cases import problem as head_problem
from tests.trainer.objective.cases import CASES, CLASSES, DIMENSION, LABELS, problem
from trainer.distributed import Group
from trainer.head import Head
from trainer.losses import Center, LossSpec
from trainer.losses.batch import LARGEST, BatchLoss, unit_vectors, widened
from trainer.losses.margins import Margin
from trainer.objective.sharded import BatchLossModule, CentreModule

SHORT = (1e-44, 1e-40, 1e-37, 1e-30, 1e-21)  # the first two are subnormal, the last has a square that is none
LONG = (1e17, 1e21, 1e37)  # from 2e19 on the square is infinite
INFINITE = torch.finfo(torch.float32).max  # beyond it


def module_of(spec: LossSpec) -> nn.Module:
    if isinstance(spec, Margin):
        counts = [1 + 3 * (c % 7) for c in range(HEAD_CLASSES)]
        return Head(spec, HEAD_CLASSES, HEAD_DIMENSION, seed=3, class_counts=counts)
    if isinstance(spec, Center):
        centres = CentreModule(spec, CLASSES, DIMENSION, group=Group())
        centres.load_state_dict({"centres": problem(6)[1]})
        return centres
    assert isinstance(spec, BatchLoss)
    module = BatchLossModule(spec, CLASSES, DIMENSION, group=Group())
    module.started.fill_(True)
    return module


def check(spec: LossSpec, length: float) -> None:
    if isinstance(spec, Margin):
        x, labels = head_problem(10).x_BD, head_problem(10).labels_B
    else:
        x, labels = problem(5)[0], torch.tensor(LABELS)
    x_single = (x * length).float().requires_grad_()
    x_exact = x_single.detach().double().requires_grad_()
    single = module_of(spec)
    exact = copy.deepcopy(single).double()
    found, expected = single(x_single, labels), exact(x_exact, labels)
    found.backward()
    expected.backward()
    assert x_single.grad is not None
    assert x_exact.grad is not None
    wanted = float(expected.detach())
    assert float(found.detach()) == (pytest.approx(wanted, rel=2e-4, abs=1e-6) if wanted < INFINITE else math.inf)
    assert bool(x_single.grad.isfinite().all())
    limited = x_exact.grad.clamp(-LARGEST, LARGEST)
    unit = limited.abs().amax().clamp_min(1e-300)  # the norm's squares would leave fp64
    error = float((x_single.grad.double() / unit - limited / unit).norm() / (limited / unit).norm().clamp_min(1e-6))
    assert error < 2e-3 + 1e-44 / float(unit)  # a few of the least steps of fp32


@pytest.mark.parametrize("length", SHORT)
@pytest.mark.parametrize("name", MARGINS)
def test_margins_on_short_embeddings(name: str, length: float) -> None:
    check(MARGINS[name], length)


@pytest.mark.parametrize("length", LONG)
@pytest.mark.parametrize("name", MARGINS)
def test_margins_on_long_embeddings(name: str, length: float) -> None:
    """Where |x| is in the logit, as far as some times |x| is a number of fp32."""
    if MARGINS[name].unit_embedding or length < 1e37:
        check(MARGINS[name], length)


@pytest.mark.parametrize("length", SHORT + LONG)
@pytest.mark.parametrize("name", CASES)
def test_losses_on_embeddings(name: str, length: float) -> None:
    check(CASES[name][0], length)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_beyond_the_numbers_is_the_greatest_of_them(dtype: torch.dtype) -> None:
    """Also in a network in bf16, whose embeddings the losses get in fp32."""
    x = torch.tensor([[1e-38, 0.0]], dtype=dtype, requires_grad=True)
    (100 * unit_vectors(x.float())[0, 1]).backward()
    assert x.grad is not None
    assert x.grad[0].tolist() == [0, LARGEST]


def test_short_embeddings_of_a_network_in_bf16() -> None:
    head = Head(MARGINS["arcface"], HEAD_CLASSES, HEAD_DIMENSION, seed=3)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(4, HEAD_DIMENSION, generator=generator)
    direction = (1 + drawn) * (drawn - 0.5).sign()  # no number below 1, so that none is subnormal
    losses = []
    for length in (1.0, 2.0**-126):  # a power of two, so that both are the same directions in 8 bits
        x = (direction * length).bfloat16().requires_grad_()
        loss = head(x, torch.arange(4))
        loss.backward()
        assert x.grad is not None
        assert bool(x.grad.isfinite().all())
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_a_null_embedding_stays_one_without_gradient() -> None:
    x = torch.zeros(1, 2, requires_grad=True)
    unit = unit_vectors(x)
    unit.sum().backward()
    assert unit.tolist() == [[0, 0]]
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 0]]
    wide = torch.ones(2, dtype=torch.float64)
    assert widened(wide) is wide
