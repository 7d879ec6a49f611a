"""Losses on embeddings on two and three gloo ranks: loss, gradients and centres are the oracle's for the whole batch.

Three processes are started once; two of them then work as a group of their own.
"""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.ranks import run_on_ranks
from tests.trainer.objective.cases import (
    CASES,
    CLASSES,
    DIMENSION,
    LABELS,
    ONE_IDENTITY,
    Expected,
    check_case,
    expect,
    problem,
    run_case,
)
from trainer.distributed import Group
from trainer.errors import UserError
from trainer.losses import TPE, Center, CenterInvariant, LossSpec, Triplet
from trainer.losses.triplets import PROJECTION
from trainer.objective.sharded import BatchLossModule, CentreModule

# Every rank lacks some identity in the first list, rank 2 of 3 has padding alone in the second.
BATCHES = [LABELS, [*LABELS[:16], *[-1] * 8], ONE_IDENTITY]
FEW = ("contrastive", "triplet semi_hard selected", "tse", "range", "center")
# What only changes a constant or a divisor is the same to the ranks.
NAMES = [name for name in CASES if not name.endswith((" active", " wide", " beyond"))]


Expectations = dict[tuple[int, str], Expected]


def test_two_and_three_ranks_equal_the_whole_batch() -> None:
    x, t = problem()
    expected = {(0, name): expect(name, x, LABELS, t) for name in NAMES}
    expected |= {(i, name): expect(name, x, BATCHES[i], t) for i in (1, 2) for name in FEW}
    run_on_ranks(3, work, expected)


def work(rank: int, expected: Expectations) -> None:
    pair = dist.new_group([0, 1])
    for group in (Group.current(), Group(rank, 2, pair)):
        if rank < group.size:
            check(group, expected)


def check(group: Group, expected: Expectations) -> None:
    x, t = problem()
    for (i, name), one in expected.items():
        check_case(name, x, BATCHES[i], t, group, one)
    check_messages(group, x, t)
    check_principal_start(group, x)
    check_errors(group, x)
    check_steps(group, x)


def check_messages(group: Group, x: Tensor, t: Tensor) -> None:
    """Three messages a step; four where a projection is learned, or the mean length of all centres is needed."""
    for spec, extra in ((Triplet(), 0), (Center(), 0), (TPE(), 1), (CenterInvariant(), 1)):
        run_case(spec, x, LABELS, t, group)  # the first step also compares the batches' sizes
        group.traffic.reset()
        run_case(spec, x, LABELS, t, group)
        assert group.traffic.calls == 3 + extra + 1, (spec, group.traffic)


def check_principal_start(group: Group, x: Tensor) -> None:
    """Every rank starts from the same projection, that of the whole batch."""
    b = len(LABELS) // group.size
    own = slice(group.rank * b, (group.rank + 1) * b)
    module = BatchLossModule(TPE(dimension=2), CLASSES, DIMENSION, group=group)
    module(x[own], torch.tensor(LABELS[own]))
    alone = BatchLossModule(TPE(dimension=2), CLASSES, DIMENSION, group=Group())
    alone(x, torch.tensor(LABELS))
    mine, whole = module.values[PROJECTION].detach(), alone.values[PROJECTION].detach()
    torch.testing.assert_close((mine @ whole.T).abs(), torch.eye(2), rtol=0, atol=1e-5)
    everyone = group.all_gather(mine[None])
    assert all(torch.equal(one, everyone[0]) for one in everyone)


def check_errors(group: Group, x: Tensor) -> None:
    """All ranks raise; the one that holds the sample names it."""
    b = len(LABELS) // group.size
    own = slice(group.rank * b, (group.rank + 1) * b)
    labels = torch.tensor(LABELS)
    labels[2] = CLASSES
    keys = [f"key{i}" for i in range(len(LABELS))][own]
    who = "sample 'key2'" if group.rank == 0 else "slot 2 of rank 0"
    for module in (
        BatchLossModule(Triplet(), CLASSES, DIMENSION, group=group),
        CentreModule(Center(), CLASSES, DIMENSION, group=group),
    ):
        with pytest.raises(UserError, match=f"{who} has label {CLASSES}"):
            module(x[own], labels[own], keys)
    uneven = x[: 4 + group.rank]
    with pytest.raises(UserError, match="the ranks got batches of sizes"):
        BatchLossModule(Triplet(), CLASSES, DIMENSION, group=group)(uneven, torch.zeros(len(uneven), dtype=torch.int64))


def check_steps(group: Group, x: Tensor) -> None:
    """Three steps of a linear backbone, averaged over the ranks as an engine does it, end where one rank's end."""
    specs: list[LossSpec] = [Triplet(mining="all"), TPE(init="orthogonal"), CenterInvariant(gamma=0.01)]
    for spec in specs:
        torch.testing.assert_close(trained(spec, x, group), trained(spec, x, Group()), rtol=1e-9, atol=1e-11)


def trained(spec: LossSpec, x: Tensor, group: Group) -> Tensor:
    b = len(LABELS) // group.size
    own = slice(group.rank * b, (group.rank + 1) * b)
    weight = torch.eye(DIMENSION, dtype=torch.float64, requires_grad=True)
    if isinstance(spec, Center):
        module: CentreModule | BatchLossModule = CentreModule(spec, CLASSES, DIMENSION, group=group).double()
    else:
        module = BatchLossModule(spec, CLASSES, DIMENSION, group=group).double()  # type: ignore[arg-type]
    parameters = list(module.parameters())
    for _ in range(3):
        loss = module(x[own] @ weight, torch.tensor(LABELS[own]))
        dweight, *rest = torch.autograd.grad(loss, [weight, *parameters])
        with torch.no_grad():
            weight -= 0.5 * group.all_reduce(dweight)
            for parameter, gradient in zip(parameters, rest, strict=True):
                parameter -= 0.5 * gradient
        if isinstance(module, CentreModule):
            module.update()
    return weight.detach()
