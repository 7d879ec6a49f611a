"""One problem for every margin, and the comparison of a sharded head with the oracle on it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.trainer.head.oracle import World, mean_loss
from trainer.distributed import Group
from trainer.head.head import Head, step_noise
from trainer.head.settings import HeadConfig
from trainer.losses import (
    AdaFace,
    ArcFace,
    ASoftmax,
    Combined,
    CosFace,
    CurricularFace,
    DynamicMargin,
    ElasticFace,
    Focal,
    L2Softmax,
    LSoftmax,
    MagFace,
    Margin,
    ModifiedSoftmax,
    MVSoftmax,
    NormFace,
    Softmax,
    SubCenterArcFace,
    WeightedSoftmax,
)

CLASSES, DIMENSION, STEP = 13, 6, 40
MARGINS: dict[str, Margin] = {
    "softmax": Softmax(),
    "weighted_softmax": WeightedSoftmax(),
    "weighted_softmax half way": WeightedSoftmax(power=0.5),
    "focal": Focal(),
    "focal below 1": Focal(gamma=0.5),
    "modified_softmax": ModifiedSoftmax(),
    "l_softmax 1": LSoftmax(margin=1),
    "l_softmax 2": LSoftmax(margin=2),
    "l_softmax 3": LSoftmax(margin=3, lambda_start=0),
    "l_softmax 4": LSoftmax(margin=4, lambda_start=0),
    "a_softmax 1": ASoftmax(margin=1),
    "a_softmax 2": ASoftmax(margin=2),
    "a_softmax 3": ASoftmax(margin=3, lambda_start=0, lambda_min=0),
    "a_softmax 4": ASoftmax(),
    "l2_softmax": L2Softmax(),
    "l2_softmax learnable": L2Softmax(alpha=12.0, learnable=True),
    "l2_softmax auto": L2Softmax(alpha="auto"),
    "normface": NormFace(),
    "normface learnable": NormFace(scale=9.0, learnable=True),
    "normface auto": NormFace(scale="auto"),
    "cosface": CosFace(),
    "cosface auto": CosFace(scale="auto"),
    "arcface": ArcFace(),
    "arcface beyond pi": ArcFace(scale=5.0, margin=1.5),
    "arcface unbounded": ArcFace(scale=1000.0),
    "combined": Combined(scale=20.0),
    "combined times 1.35": Combined(scale=20.0, m1=1.35, m2=0.3, m3=0.1),
    "combined times 3": Combined(scale=8.0, m1=3.0, m2=0.2, m3=0.1),
    "sub_center_arcface": SubCenterArcFace(scale=20.0),
    "adaface": AdaFace(scale=20.0),
    "adaface of the batch alone": AdaFace(scale=20.0, momentum=0.0),
    "adaface clipped": AdaFace(scale=20.0, concentration=2.0, momentum=0.5),
    "adaface beyond pi": AdaFace(scale=5.0, margin=2.0, momentum=0.0),
    "magface": MagFace(scale=20.0, lower_norm=1.5, upper_norm=3.0),
    "magface clamped": MagFace(scale=20.0, lower_norm=2.5, upper_norm=3.0),
    "magface easy": MagFace(scale=20.0, lower_norm=1.5, upper_norm=3.0, easy_margin=True),
    "elasticface": ElasticFace(scale=20.0, sigma=0.1),
    "elasticface cos": ElasticFace(kind="cos", scale=20.0, margin=0.35, sigma=0.1),
    "elasticface plus": ElasticFace(plus=True, scale=20.0, sigma=0.1),
    "elasticface cos plus": ElasticFace(kind="cos", plus=True, scale=20.0, sigma=0.1),
    "dynamic": DynamicMargin(scale=20.0),
    "curricularface": CurricularFace(scale=10.0),
    "mv_softmax": MVSoftmax(scale=10.0),
    "mv_softmax arc": MVSoftmax(scale=10.0, kind="arc", margin=0.5),
    "mv_softmax easy": MVSoftmax(scale=10.0, easy_margin=True),
    "mv_softmax arc easy": MVSoftmax(scale=10.0, kind="arc", easy_margin=True),
}
RUNNING = {"norm_mean": 2.0, "norm_std": 1.2, "t": 0.3}


@dataclass
class Problem:
    """A global batch, with a repeated label, padding, and (for three ranks) no sample of the last rank's classes."""

    x_BD: Tensor
    labels_B: Tensor
    counts: list[int]


def problem(batch: int, classes: int = CLASSES, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    x_BD = torch.randn(batch, DIMENSION, generator=generator, dtype=torch.float64)
    labels_B = torch.randint(0, max(1, classes * 2 // 3), (batch,), generator=generator)
    labels_B[1] = -1
    labels_B[2] = labels_B[0]
    return Problem(x_BD, labels_B, [1 + 3 * (c % 7) for c in range(classes)])


def make_head(margin: Margin, config: HeadConfig, counts: list[int], group: Group | None = None) -> Head:
    """A head in float64, with running statistics, biases and lengths away from their first values."""
    head = Head(margin, len(counts), DIMENSION, config, seed=3, class_counts=counts, group=group).double()
    start, stop = head.rows.start, head.rows.stop
    with torch.no_grad():
        if head.bias is not None:
            head.bias.copy_(torch.linspace(-1, 1, len(counts), dtype=torch.float64)[start:stop])
        head.weight.div_(head.weight.norm(dim=1, keepdim=True))
        if not head.unit_rows:
            lengths = torch.linspace(0.5, 2, len(counts), dtype=torch.float64)[start:stop]
            head.weight.mul_(lengths.repeat_interleave(head.centres)[:, None])
        for name, buffer in head.named_buffers():
            buffer.fill_(RUNNING[name])
    head.set_progress(STEP)
    return head


def compare(
    name: str, configs: list[HeadConfig], batch: int, group: Group | None = None, classes: int = CLASSES
) -> None:
    """Loss and all gradients of one step against the oracle; raises AssertionError with what differs.

    The configs may differ in anything but `rows`: the oracle is asked once.
    """
    group = group or Group()
    given, margin = problem(batch, classes), MARGINS[name]
    world, expected = solve(margin, configs[0], given, classes)
    for config in configs:
        head = make_head(margin, config, given.counts, group)
        b = batch // group.size
        mine = slice(group.rank * b, (group.rank + 1) * b)
        x_bD = given.x_BD[mine].clone().requires_grad_()
        loss = head(x_bD, given.labels_B[mine])
        loss.backward()
        label = f"{name} {config.algorithm} {config.rows} rank {group.rank} of {group.size}"
        # What a margin knows of each class is kept in fp32.
        tolerance = 1e-8 if type(margin).per_class is Margin.per_class else 1e-6
        close(loss, expected, f"{label}: loss", tolerance)
        close(x_bD.grad, world.x.grad[mine], f"{label}: gradient of x", tolerance)
        check_rows(head, world, label, tolerance)
        for key, scalar in head.scalars.items():
            close(scalar.grad, world.scalars[key].grad, f"{label}: gradient of {key}")


def solve(margin: Margin, config: HeadConfig, given: Problem, classes: int) -> tuple[World, Tensor]:
    """The oracle's loss, and its gradients in the World's tensors."""
    whole = make_head(margin, config, given.counts, Group())
    world = World(
        given.x_BD.clone().requires_grad_(),
        whole.weight.detach().view(classes, whole.centres, DIMENSION).clone().requires_grad_(),
        (torch.zeros(classes) if whole.bias is None else whole.bias.detach().clone()).double().requires_grad_(),
        given.labels_B.tolist(),
        given.counts,
        step_noise(whole.seed, STEP, len(given.labels_B)).double(),
        {key: value.detach().clone().requires_grad_() for key, value in whole.scalars.items()},
        RUNNING,
        getattr(margin.at(STEP, 1.0), "lambda_min", 0.0),
    )
    expected = mean_loss(whole.margin, world)
    expected.backward()
    return world, expected


def check_rows(head: Head, world: World, label: str, tolerance: float) -> None:
    start, stop = head.rows.start, head.rows.stop
    wanted = world.w.grad[start:stop].flatten(0, 1)
    found = head.weight.grad
    if head.unit_rows:  # the gradient along the row is the optimizer's to remove
        found = found - head.weight * (found * head.weight).sum(1, keepdim=True)
    close(found, wanted, f"{label}: gradient of W", tolerance)
    if head.bias is not None:
        close(head.bias.grad, world.bias.grad[start:stop], f"{label}: gradient of the bias", tolerance)


def close(found: Tensor, wanted: Tensor, what: str, tolerance: float = 1e-8) -> None:
    error = float((found.detach() - wanted.detach()).norm() / wanted.detach().norm().clamp_min(1e-3))
    assert error < tolerance, f"{what} differs by {error:.2g} (relative)"
