"""The head on two and three ranks equals the oracle on one; each world size is started once, for all cases."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.trainer.head.cases import CLASSES, DIMENSION, MARGINS, close, compare, make_head, problem
from trainer.distributed import Group
from trainer.errors import UserError
from trainer.head import Head
from trainer.head.optimizer import HeadOptimizer
from trainer.head.settings import HeadConfig, HeadOptimizerConfig
from trainer.losses import ArcFace, CosFace, CurricularFace, ElasticFace, NormFace, Softmax


@pytest.mark.parametrize("size", [2, 3])
def test_on_ranks(size: int) -> None:
    run_on_ranks(size, work)


def work(rank: int) -> None:
    group = Group.current()
    for check in CHECKS:
        check(group)


def every_margin(group: Group) -> None:
    for name in MARGINS:
        configs = [HeadConfig(algorithm=algorithm, tile=3) for algorithm in ("store", "recompute")]
        compare(name, configs, 4 * group.size, group)


def rows_with_a_length(group: Group) -> None:
    for name in ("arcface", "sub_center_arcface", "curricularface"):
        compare(name, [HeadConfig(algorithm="store", rows="free", tile=3)], 4 * group.size, group)


def more_ranks_than_classes(group: Group) -> None:
    for name in ("arcface", "softmax", "sub_center_arcface", "mv_softmax"):
        compare(name, [HeadConfig(algorithm="store")], 4 * group.size, group, classes=2)


def messages(group: Group) -> None:
    """Three a step; one more for learnable scalars, and one for margins that compare samples."""
    for margin, expected in (
        (ArcFace(), 3),
        (ArcFace(scale=1000.0), 3),
        (Softmax(), 3),
        (NormFace(learnable=True), 4),
        (CurricularFace(), 4),
        (ElasticFace(), 3),
        (ElasticFace(plus=True), 4),
    ):
        head = make_head(margin, HeadConfig(), [1] * CLASSES, group)
        x_bD = torch.ones(4, DIMENSION, dtype=torch.float64, requires_grad=True)
        for _ in range(2):  # the first step also compares the ranks' batch sizes
            group.traffic.reset()
            head(x_bD, torch.arange(4)).backward()
        assert group.traffic.calls == expected, margin.name
    size, batch = group.size, 4 * group.size
    head = Head(ArcFace(), CLASSES, DIMENSION, HeadConfig(), group=group)
    x_bD = torch.ones(4, DIMENSION, requires_grad=True)
    head(x_bD, torch.arange(4))
    group.traffic.reset()
    head(x_bD, torch.arange(4)).backward()
    gather, reduce, scatter = 4 * (4 * DIMENSION + 8), 2 * 4 * batch * 2, 4 * batch * DIMENSION
    assert group.traffic.bytes == pytest.approx((size - 1) * gather + (size - 1) / size * (reduce + scatter))


def only_padding(group: Group) -> None:
    head = make_head(ArcFace(), HeadConfig(), [1] * CLASSES, group)
    x_bD = torch.ones(4, DIMENSION, dtype=torch.float64, requires_grad=True)
    loss = head(x_bD, torch.full((4,), -1))
    loss.backward()
    assert float(loss.detach()) == 0
    assert not x_bD.grad.any()
    assert not head.weight.grad.any()


def faults_are_named_on_every_rank(group: Group) -> None:
    head = make_head(ArcFace(), HeadConfig(), [1] * CLASSES, group)
    x_bD, labels_b, keys = torch.ones(4, DIMENSION, dtype=torch.float64), torch.arange(4), ["a", "b", "c", "d"]
    last = group.rank == group.size - 1
    if last:
        labels_b[2] = CLASSES
    who = "sample 'c'" if last else f"slot 2 of rank {group.size - 1}"
    with pytest.raises(UserError, match=f"{who} has label 13, but the head has the classes 0 to 12"):
        head(x_bD, labels_b, keys)
    x_bD, labels_b = x_bD.clone(), torch.arange(4)
    if last:
        x_bD[1, 0] = float("nan")
    who = "sample 'b'" if last else f"slot 1 of rank {group.size - 1}"
    with pytest.raises(UserError, match=f"{who} has an embedding that is not finite"):
        head(x_bD, labels_b, keys)
    other = make_head(ArcFace(), HeadConfig(), [1] * CLASSES, group)
    with pytest.raises(UserError, match="batches of sizes"):
        other(x_bD[: 3 if last else 4], labels_b[: 3 if last else 4], keys)


def training_is_the_same_on_one_rank(group: Group) -> None:
    """Sampling, rounding and random margins follow the seed, not the number of ranks: the same steps either way."""
    for optimizer in (
        HeadOptimizerConfig(),
        HeadOptimizerConfig(state_dtype="int8"),
        HeadOptimizerConfig(name="adamw", state_dtype="bf16"),
    ):
        for config in (
            HeadConfig(sample_rate=0.2, sample_correction=True, tile=64),
            HeadConfig(param_dtype="bf16", fused=True, tile=64),
            HeadConfig(sample_rate=0.3, fused=True),
        ):
            assert_same_training(group, replace(config, optimizer=optimizer))


def assert_same_training(group: Group, config: HeadConfig) -> None:
    classes, b = 2500, 4
    given = problem(b * group.size, classes)
    trained = []
    for ranks in (group, Group()):
        margin = CosFace(scale=16.0) if config.sample_rate > 0.2 else Softmax()
        head = Head(margin, classes, DIMENSION, config, seed=5, group=ranks)
        optimizer = HeadOptimizer(head)
        mine = slice(group.rank * b, (group.rank + 1) * b) if ranks is group else slice(None)
        for step in range(3):
            head.set_progress(step)
            optimizer.prepare(0.1)
            head(given.x_BD[mine].float(), given.labels_B[mine]).backward()
            optimizer.step(0.1)
            optimizer.zero_grad()
        trained.append(head)
    sharded, whole = trained
    start, stop = sharded.rows.start, sharded.rows.stop
    found, wanted = sharded.weight.detach().float(), whole.weight[start:stop].float()
    # Sums in another order differ in their last bit, which now and then makes a rounding fall the other way.
    exact = config.optimizer.state_dtype == "fp32" and config.param_dtype == "fp32"
    step = 1e-4 if exact else 2**-7
    furthest = float((found - wanted).detach().abs().max())
    assert furthest < step, f"{furthest:.2g} apart after three steps, {config}"
    close(found, wanted, f"rows after three steps, {config}", 2e-3)


CHECKS: tuple[Callable[[Group], None], ...] = (
    every_margin,
    rows_with_a_length,
    more_ranks_than_classes,
    messages,
    only_padding,
    faults_are_named_on_every_rank,
    training_is_the_same_on_one_rank,
)
