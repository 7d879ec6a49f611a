"""One problem for every loss on embeddings, and its comparison with the oracle on any number of ranks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.trainer.objective import oracle
from trainer.distributed import Group
from trainer.losses import TPE, TSE, Center, CenterInvariant, CoCo, Contrastive, LossSpec, Marginal, Range, Triplet
from trainer.losses.batch import BatchLoss
from trainer.losses.triplets import PROJECTION
from trainer.objective.sharded import BatchLossModule, CentreModule

CLASSES, DIMENSION, SLOTS = 9, 5, 24  # slots divide by 1, 2 and 3 ranks
# Four samples, three, two and one of an identity; padding within and at the end; none of class 8.
LABELS = [3, 0, 3, -1, 1, 7, 1, 0, 3, 2, 6, 6, 0, 3, 4, 4, 5, 7, 1, 2, 5, 6, -1, -1]
ONE_IDENTITY = [4] * 20 + [-1] * 4
ALL_DIFFERENT = [0, 1, 2, 3, 4, 5, 6, 7] + [-1] * 16
ONLY_PADDING = [-1] * SLOTS
SCALE = 1.7  # the projection and the centres of the problem are not of length 1

Formula = Callable[[Tensor, list[int], Tensor], Tensor]


def _triplet(rule: str, average: str, alpha: float = 0.2) -> tuple[LossSpec, Formula]:
    spec = Triplet(mining=rule, average=average, alpha=alpha)
    return spec, lambda x, labels, _: oracle.triplet(x, labels, alpha, rule, average)


CASES: dict[str, tuple[LossSpec, Formula]] = {
    "contrastive": (Contrastive(), lambda x, labels, _: oracle.contrastive(x, labels, 1.0, True, True)),
    "contrastive plain": (
        Contrastive(margin=2.5, unit=False, balanced=False),
        lambda x, labels, _: oracle.contrastive(x, labels, 2.5, False, False),
    ),
    "marginal": (Marginal(), lambda x, labels, _: oracle.marginal(x, labels, 1.2, 0.3)),
    "marginal wide": (Marginal(theta=2.0, xi=0.9), lambda x, labels, _: oracle.marginal(x, labels, 2.0, 0.9)),
    **{
        f"triplet {rule} {average}": _triplet(rule, average)
        for rule in ("all", "easy", "semi_hard", "hard", "batch_hard")
        for average in ("selected", "active")
    },
    "triplet wide": _triplet("semi_hard", "selected", 1.5),
    "tse": (TSE(dimension=3), lambda x, labels, t: oracle.projected(x, labels, t[:3], 0.1)),
    "tse wide": (TSE(alpha=2.0), lambda x, labels, t: oracle.projected(x, labels, t[:DIMENSION], 2.0)),
    "tse all": (
        TSE(dimension=3, negatives="all", alpha=0.7),
        lambda x, labels, t: oracle.projected(x, labels, t[:3], 0.7, every=True),
    ),
    "tpe all": (
        TPE(dimension=3, negatives="all"),
        lambda x, labels, t: oracle.projected(x, labels, t[:3], None, every=True),
    ),
    "tpe": (TPE(dimension=2), lambda x, labels, t: oracle.projected(x, labels, t[:2], None)),
    "coco": (CoCo(alpha=6.25), lambda x, labels, _: oracle.coco(x, labels, 6.25)),
    "coco unit": (
        CoCo(alpha=6.25, unit_centroids=True),
        lambda x, labels, _: oracle.coco(x, labels, 6.25, unit_centroids=True),
    ),
    "coco auto": (
        CoCo(epsilon=0.01),
        lambda x, labels, _: oracle.coco(x, labels, oracle.least_coco_scale(CLASSES, 0.01)),
    ),
    "range": (Range(), lambda x, labels, _: oracle.range_loss(x, labels, 2, 1.0, 1.0, 1.0, True)),
    "range wide": (
        Range(k=4, margin=30.0, intra=0.7, inter=0.2, unit=False),
        lambda x, labels, _: oracle.range_loss(x, labels, 4, 30.0, 0.7, 0.2, False),
    ),
    "range k beyond": (
        Range(k=1000, margin=0.3),
        lambda x, labels, _: oracle.range_loss(x, labels, 1000, 0.3, 1.0, 1.0, True),
    ),
    "center": (Center(), lambda x, labels, t: oracle.center(x, labels, t, 0.0, False)),
    "center unit": (Center(alpha=0.9, unit=True), lambda x, labels, t: oracle.center(x, labels, t, 0.0, True)),
    "center_invariant": (
        CenterInvariant(gamma=0.03),
        lambda x, labels, t: oracle.center(x, labels, t, 0.03, False),
    ),
}
# With unit vectors in few dimensions many triplets are of every kind: each rule has work to do on LABELS.


@dataclass
class Result:
    """What a loss gave on one rank."""

    loss: Tensor
    dx_bD: Tensor
    dt: Tensor | None = None
    centres: Tensor | None = None
    start: int = 0
    empty_steps: int = 0


def problem(seed: int = 0, slots: int = SLOTS) -> tuple[Tensor, Tensor]:
    """x [B, D] and t [C, D]: the centres, and in its first rows the projection."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(slots, DIMENSION, generator=generator, dtype=torch.float64) * 1.3
    return x, torch.randn(CLASSES, DIMENSION, generator=generator, dtype=torch.float64) * SCALE


def run_case(spec: LossSpec, x_BD: Tensor, labels: list[int], t_CD: Tensor, group: Group) -> Result:
    """One step of the loss on this rank's part of the batch."""
    b = len(labels) // group.size
    own = slice(group.rank * b, (group.rank + 1) * b)
    x_bD = x_BD[own].clone().requires_grad_()
    labels_b = torch.tensor(labels[own])
    if isinstance(spec, Center):
        centres = CentreModule(spec, CLASSES, DIMENSION, group=group).to(x_BD.dtype)
        rows = centres.rows
        centres.load_state_dict({"centres": t_CD[rows.start : rows.stop]})
        loss = centres(x_bD, labels_b)
        loss.backward()
        centres.update()
        assert x_bD.grad is not None
        return Result(loss.detach(), x_bD.grad, None, centres.centres, rows.start)
    assert isinstance(spec, BatchLoss)
    module = BatchLossModule(spec, CLASSES, DIMENSION, group=group).to(x_BD.dtype)
    if len(module.values):
        value = module.values[PROJECTION]
        module.started.fill_(True)
        value.data.copy_(t_CD[: value.shape[0]])
    loss = module(x_bD, labels_b)
    loss.backward()
    assert x_bD.grad is not None
    dt = module.values[PROJECTION].grad if len(module.values) else None
    return Result(loss.detach(), x_bD.grad, dt, None, 0, int(module.empty_steps))


@dataclass
class Expected:
    """What the oracle gives for the whole batch."""

    loss: Tensor
    dx_BD: Tensor
    dt_CD: Tensor
    centres_CD: Tensor | None


def expect(name: str, x_BD: Tensor, labels: list[int], t_CD: Tensor) -> Expected:
    spec, formula = CASES[name]
    x, t = x_BD.clone().requires_grad_(), t_CD.clone().requires_grad_()
    loss = formula(x, labels, t)
    dx_BD, dt_CD = torch.autograd.grad(loss, (x, t), allow_unused=True)
    centres_CD = None
    if isinstance(spec, Center):
        gamma = spec.gamma if isinstance(spec, CenterInvariant) else 0.0
        centres_CD = oracle.moved_centres(x_BD, labels, t_CD, spec.alpha, gamma, spec.unit)
    return Expected(loss.detach(), dx_BD, torch.zeros_like(t_CD) if dt_CD is None else dt_CD, centres_CD)


def check_case(name: str, x_BD: Tensor, labels: list[int], t_CD: Tensor, group: Group, expected: Expected) -> None:
    """Loss, gradients and moved centres of one case against the oracle's, on this rank."""
    found = run_case(CASES[name][0], x_BD, labels, t_CD, group)
    b = len(labels) // group.size
    close(found.loss, expected.loss, f"{name}: loss on rank {group.rank} of {group.size}")
    close(found.dx_bD, expected.dx_BD[group.rank * b : (group.rank + 1) * b], f"{name}: dx on rank {group.rank}")
    if found.dt is not None:
        close(found.dt, expected.dt_CD[: found.dt.shape[0]], f"{name}: dT on rank {group.rank}")
    if found.centres is not None:
        assert expected.centres_CD is not None
        rows = slice(found.start, found.start + found.centres.shape[0])
        close(found.centres, expected.centres_CD[rows], f"{name}: centres of rank {group.rank}")


def close(found: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11, msg=lambda text: f"{what}\n{text}")
