"""Class sampling: which classes, how evenly, and that the others are left alone."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.head import Head
from trainer.head.optimizer import HeadOptimizer
from trainer.head.rows import SAMPLING_BLOCK, sample_classes, sampled_share
from trainer.head.settings import HeadConfig, HeadOptimizerConfig
from trainer.losses import ArcFace, CurricularFace, Margin, MVSoftmax, NormFace, Softmax, SubCenterArcFace

CPU = torch.device("cpu")


@given(
    cuts=st.lists(st.integers(0, 5000), min_size=2, max_size=5),
    rate=st.floats(0.001, 0.999),
    seed=st.integers(0, 2**62),
)
def test_any_division_of_the_classes_draws_the_same_sample(cuts: list[int], rate: float, seed: int) -> None:
    cuts = sorted(cuts)
    whole = sample_classes(cuts[0], cuts[-1], rate, seed, CPU)
    parts = [sample_classes(a, b, rate, seed, CPU) for a, b in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(parts), whole)
    assert whole.unique().numel() == whole.numel()


@pytest.mark.parametrize("rate", [0.0001, 0.1, 0.3])
def test_each_full_block_gives_its_share(rate: float) -> None:
    sampled = sample_classes(0, 8 * SAMPLING_BLOCK, rate, 5, CPU)
    per_block = torch.bincount(sampled // SAMPLING_BLOCK, minlength=8)
    assert per_block.tolist() == [max(1, round(rate * SAMPLING_BLOCK))] * 8


def test_every_class_and_every_pair_is_equally_likely() -> None:
    """Over 4000 seeds: each class at its rate, and pairs of neighbours as often as independent draws would meet."""
    draws, classes, rate = 4000, 2 * SAMPLING_BLOCK, 0.1
    hits = torch.zeros(draws, classes)
    for seed in range(draws):
        hits[seed, sample_classes(0, classes, rate, seed, CPU)] = 1
    exact = round(rate * SAMPLING_BLOCK) / SAMPLING_BLOCK
    deviation = (exact * (1 - exact) / draws) ** 0.5
    share = hits.mean(0)
    assert float((share - exact).abs().max()) < 5.5 * deviation
    assert float((share - exact).std()) == pytest.approx(deviation, rel=0.15)
    for distance in (1, 2, 32, 512):
        pairs = (hits[:, :-distance] * hits[:, distance:]).mean(0)
        spread = exact * (1 - exact**2) ** 0.5 / draws**0.5
        assert float(pairs.mean()) == pytest.approx(exact**2, rel=0.03)
        assert float((pairs - exact**2).abs().max()) < 6 * spread


@pytest.mark.parametrize("margin", [ArcFace(scale=16.0), Softmax(), SubCenterArcFace(scale=16.0, centres=2)])
def test_sampled_step_is_the_full_step_on_the_sampled_classes(margin: Margin) -> None:
    classes, D = 3000, 8
    generator = torch.Generator().manual_seed(0)
    x_BD, labels_B = torch.randn(6, D, generator=generator), torch.randint(0, classes, (6,), generator=generator)
    head = Head(margin, classes, D, HeadConfig(sample_rate=0.05, tile=64), seed=1)
    head.set_progress(17)
    x = x_BD.clone().requires_grad_()
    loss = head(x, labels_B)
    loss.backward()
    assert head.weight.grad is not None
    assert head.weight.grad.is_sparse
    rows = head.weight.grad.coalesce().indices()[0]
    chosen = (rows // head.centres).unique()
    assert bool(torch.isin(labels_B, chosen).all())  # positives are always kept
    assert abs(len(chosen) - 0.05 * classes) < 12

    small = Head(margin, len(chosen), D, HeadConfig(tile=64))
    with torch.no_grad():
        small.weight.copy_(head.weight[rows])
    y = x_BD.clone().requires_grad_()
    expected = small(y, torch.searchsorted(chosen, labels_B))
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(head.weight.grad.coalesce().values(), small.weight.grad)
    if head.bias is not None and small.bias is not None:
        assert head.bias.grad is not None
        torch.testing.assert_close(head.bias.grad.coalesce().values(), small.bias.grad)


@pytest.mark.parametrize("algorithm", ["store", "recompute"])
@pytest.mark.parametrize(
    "margin",
    [
        *(ArcFace(scale=16.0), ArcFace(scale=1000.0), Softmax(), SubCenterArcFace(scale=16.0, centres=2)),
        *(CurricularFace(scale=16.0), MVSoftmax(scale=16.0)),
    ],
    ids=["arcface", "unbounded", "softmax", "two centres", "curricularface", "mv_softmax"],
)
def test_a_corrected_class_counts_for_four_at_the_rate_of_a_quarter(margin: Margin, algorithm: str) -> None:
    """The step is that of a head without sampling, in which the drawn classes that are not of the batch are there four
    times each."""
    classes, D = 1500, 8
    generator = torch.Generator().manual_seed(0)
    x_BD = torch.randn(6, D, generator=generator, dtype=torch.float64)
    labels_B = torch.randint(0, classes, (6,), generator=generator)
    config = HeadConfig(sample_rate=0.25, sample_correction=True, algorithm=algorithm, tile=64)  # type: ignore[arg-type]
    head = Head(margin, classes, D, config, seed=1).double()
    head.set_progress(17)
    x = x_BD.clone().requires_grad_()
    loss = head(x, labels_B)
    loss.backward()
    rows, gradient = head.weight.grad.coalesce().indices()[0], head.weight.grad.coalesce().values()
    chosen = (rows // head.centres).unique()
    copies = torch.where(torch.isin(chosen, labels_B), 1, 4)

    many = chosen.repeat_interleave(copies)
    large = Head(margin, len(many), D, HeadConfig(tile=64)).double()
    of_row = (many[:, None] * head.centres + torch.arange(head.centres)).flatten()
    with torch.no_grad():
        large.weight.copy_(head.weight[of_row])
    y = x_BD.clone().requires_grad_()
    expected = large(y, torch.searchsorted(many, labels_B))
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(x.grad, y.grad)
    summed = torch.zeros_like(head.weight).index_add_(0, of_row, large.weight.grad)
    torch.testing.assert_close(gradient, summed[rows])
    if head.bias is not None:
        assert large.bias is not None
        summed = torch.zeros_like(head.bias).index_add_(0, many, large.bias.grad)
        torch.testing.assert_close(head.bias.grad.coalesce().values(), summed[chosen])


def drawn(corrected: bool, draws: int) -> dict[str, torch.Tensor]:
    """The means over the draws, and what the full softmax has, of one sample that is half learned.

    S: exp(loss) - 1 times e^t. pull: 1 - p. x, w: the gradients.
    """
    generator = torch.Generator().manual_seed(0)
    config = HeadConfig(sample_rate=0.25, sample_correction=corrected)
    head = Head(NormFace(scale=8.0), SAMPLING_BLOCK, 16, config, seed=1).double()
    x_BD = (head.weight[:1] + 0.05 * torch.randn(1, 16, generator=generator, dtype=torch.float64)).detach()

    def step() -> list[torch.Tensor]:
        x, head.weight.grad = x_BD.clone().requires_grad_(), None
        loss = head(x, torch.tensor([0]))
        loss.backward()
        return [loss.detach().expm1(), -(-loss.detach()).expm1(), x.grad, head.weight.grad.to_dense().clone()]

    found = []
    for number in range(draws):
        head.set_progress(number)
        found.append(step())
    head.eval()
    names = [f"{name} {kind}" for kind in ("mean", "spread", "full") for name in ("S", "pull", "x", "w")]
    columns = [torch.stack(column) for column in zip(*found, strict=True)]
    spread = [column.std(dim=0) / draws**0.5 for column in columns]
    return dict(zip(names, [*(column.mean(dim=0) for column in columns), *spread, *step()], strict=True))


def test_the_correction_makes_the_denominator_right_on_average_and_the_gradient_nearly() -> None:
    """And without it they are as `head.rows` says: S at the share q, the pull and the gradient as if S were q S."""
    q, draws = sampled_share(0.25), 250
    right, plain = drawn(True, draws), drawn(False, draws)
    assert abs(right["S mean"] - right["S full"]) < 5 * right["S spread"]
    assert abs(plain["S mean"] - q * plain["S full"]) < 5 * plain["S spread"]
    S, pull = float(right["S full"]), float(right["pull full"])
    assert 0.1 < pull < 0.9
    assert float(right["pull mean"]) == pytest.approx(pull, rel=0.02)
    assert float(plain["pull mean"]) == pytest.approx(q * S / (q * S + 1), rel=0.02)
    share = float(plain["pull mean"]) / pull  # of the gradient that is left
    for name in ("x", "w"):
        full = right[f"{name} full"]
        noise = float(right[f"{name} spread"].norm() / full.norm())
        assert float((right[f"{name} mean"] - full).norm() / full.norm()) < 0.03 + 1.3 * noise
        assert float((plain[f"{name} mean"] * full).sum() / full.square().sum()) == pytest.approx(share, rel=0.05)
    assert share < 0.7


def test_the_loss_without_correction_is_too_small_and_with_it_almost_right() -> None:
    """Far from learned, the first misses log(1/q); by Jensen's inequality the second is below the full loss, too."""
    generator = torch.Generator().manual_seed(0)
    x_BD, labels_B = torch.randn(8, 16, generator=generator), torch.arange(8)
    means = []
    for config in (HeadConfig(sample_rate=0.25), HeadConfig(sample_rate=0.25, sample_correction=True)):
        head = Head(ArcFace(scale=8.0), SAMPLING_BLOCK, 16, config, seed=1)
        total = 0.0
        for number in range(100):
            head.set_progress(number)
            total += float(head(x_BD, labels_B).detach())
        means.append(total / 100)
    head.eval()
    full = float(head(x_BD, labels_B).detach())
    assert means[0] == pytest.approx(full - math.log(4), abs=0.05)
    assert full - 0.05 < means[1] < full


def test_the_sample_follows_the_step_and_evaluation_uses_all() -> None:
    head = Head(ArcFace(), 3000, 8, HeadConfig(sample_rate=0.05))
    x_BD, labels_B = torch.ones(2, 8), torch.tensor([0, 1])
    losses = []
    for step in (0, 1, 0):
        head.set_progress(step)
        losses.append(float(head(x_BD, labels_B).detach()))
    assert losses[0] == losses[2] != losses[1]
    head.eval()
    assert float(head(x_BD, labels_B).detach()) == pytest.approx(
        float(Head(ArcFace(), 3000, 8)(x_BD, labels_B).detach())
    )


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("state", ["fp32", "bf16", "int8"])
def test_unsampled_rows_and_their_state_are_neither_read_nor_written(fused: bool, name: str, state: str) -> None:
    settings = HeadOptimizerConfig(name=name, state_dtype=state)  # type: ignore[arg-type]
    head = Head(Softmax(), 3000, 8, HeadConfig(sample_rate=0.05, fused=fused, tile=64, optimizer=settings))
    optimizer = HeadOptimizer(head)
    head.set_progress(3)
    x_BD, labels_B = torch.ones(2, 8), torch.tensor([7, 2999])
    probe = Head(Softmax(), 3000, 8, HeadConfig(sample_rate=0.05))
    probe.set_progress(3)
    probe(x_BD, labels_B).backward()
    assert probe.weight.grad is not None
    chosen = probe.weight.grad.coalesce().indices()[0]
    others = torch.ones(3000, dtype=torch.bool).index_fill_(0, chosen, False)
    with torch.no_grad():  # whoever reads these makes everything nan; whoever writes them changes them
        head.weight[others] = float("nan")
        assert head.bias is not None
        head.bias[others] = float("nan")
    for tensor in optimizer.state_dict().values():
        if tensor.shape[:1] == (3000,):
            tensor[others] = float("nan") if tensor.is_floating_point() else 99
    before = {key: tensor.clone() for key, tensor in optimizer.state_dict().items()}
    weight = head.weight.detach().clone()
    optimizer.prepare(0.1)
    head(x_BD, labels_B).backward()
    optimizer.step(0.1)
    assert torch.equal(head.weight[others].isnan(), weight[others].isnan())
    assert bool(torch.isfinite(head.weight[chosen]).all())
    assert not torch.equal(head.weight[chosen], weight[chosen])
    for key, tensor in optimizer.state_dict().items():
        if tensor.shape[:1] == (3000,):
            assert torch.equal(tensor[others].nan_to_num(7), before[key][others].nan_to_num(7)), key
            assert bool(torch.isfinite(tensor[chosen].float()).all()), key


@pytest.mark.parametrize("fused", [False, True])
def test_a_bias_where_no_class_takes_part(fused: bool) -> None:
    settings = HeadOptimizerConfig(weight_decay=0)
    head = Head(Softmax(), 100, 8, HeadConfig(sample_rate=0.001, fused=fused, optimizer=settings))
    optimizer = HeadOptimizer(head)
    before = head.weight.detach().clone()
    skipped = 0
    for step in range(30):
        head.set_progress(step)
        optimizer.prepare(0.1)
        x_BD = torch.ones(2, 8, requires_grad=True)
        head(x_BD, torch.tensor([-1, -1])).backward()
        optimizer.step(0.1)
        optimizer.zero_grad()
        skipped += int(x_BD.grad is not None and not x_BD.grad.any())
    assert skipped == 30  # padding alone
    torch.testing.assert_close(head.weight.detach(), before, atol=0, rtol=0)


def test_a_sampled_backward_adds_up_with_a_whole_one() -> None:
    head = Head(ArcFace(), 3000, 8, HeadConfig(sample_rate=0.05))
    x_BD, labels_B = torch.ones(2, 8), torch.tensor([0, 1])
    head(x_BD, labels_B).backward()
    assert head.weight.grad is not None
    first = head.weight.grad.to_dense().clone()
    head.weight.grad = None
    head.eval()
    head(x_BD, labels_B).backward()
    second = head.weight.grad.clone()
    head.weight.grad = None
    head.train()
    head(x_BD, labels_B).backward()
    head.eval()
    head(x_BD, labels_B).backward()
    torch.testing.assert_close(head.weight.grad, first + second)


def test_adamw_corrects_a_bias_by_its_own_steps() -> None:
    """The first step of a class sampled late is as long as the first step of any: the learning rate."""
    head = Head(Softmax(), 3000, 8, HeadConfig(sample_rate=0.05, optimizer=HeadOptimizerConfig(name="adamw")))
    optimizer = HeadOptimizer(head)
    seen = torch.zeros(3000, dtype=torch.bool)
    assert head.bias is not None
    for step in range(4):
        head.set_progress(step)
        before = head.bias.detach().clone()
        head(torch.ones(2, 8), torch.tensor([7, 2999])).backward()
        assert head.bias.grad is not None
        chosen = head.bias.grad.coalesce().indices()[0]
        new = chosen[~seen[chosen]]
        seen[chosen] = True
        optimizer.step(0.01)
        optimizer.zero_grad()
        change = (head.bias.detach() - before)[new].abs()
        assert len(new) > 0
        torch.testing.assert_close(change, torch.full_like(change, 0.01), rtol=1e-2, atol=0)
