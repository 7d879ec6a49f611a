"""Which rows a rank owns, and the collectives' gradients; ranks are started once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ranks import run_on_ranks
from trainer.distributed import (
    Group,
    RowRange,
    gather_rows,
    own_slice,
    replicated,
    stack_over_ranks,
    sum_not_mean,
    sum_over_ranks,
)
from trainer.errors import UserError


@given(classes=st.integers(0, 1000), size=st.integers(1, 17))
def test_ranges_cover_all_classes_once(classes: int, size: int) -> None:
    ranges = [RowRange.of(classes, rank, size) for rank in range(size)]
    assert [number for one in ranges for number in range(one.start, one.stop)] == list(range(classes))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


def test_one_process_sends_nothing() -> None:
    group = Group()
    x_bD, labels_b = torch.randn(3, 2, requires_grad=True), torch.arange(3)
    x_BD, labels_B = gather_rows(x_bD, labels_b, group)
    assert torch.equal(x_BD, x_bD)
    assert torch.equal(labels_B, labels_b)
    (sum_over_ranks(x_BD, group) * stack_over_ranks(x_BD, group)[0] * replicated(x_BD, group)).sum().backward()
    torch.testing.assert_close(x_bD.grad, 3 * x_bD.detach() ** 2)
    assert group.traffic.calls == 0


def test_collectives() -> None:
    run_on_ranks(2, collectives)


def collectives(rank: int) -> None:
    group = Group.current()
    gathering(group)
    joining(group)
    texts(group)
    averaging_engine(group)
    with pytest.raises(UserError, match=r"the ranks got batches of sizes \[4, 5\]"):
        group.check_equal(4 + rank, "batches of sizes")


def gathering(group: Group) -> None:
    """Values, and the sum of both ranks' parts of the gradient, in each precision."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x_bD = (torch.arange(6).view(2, 3) + 10 * group.rank).to(dtype).requires_grad_()
        labels_b = torch.tensor([2**40 + group.rank, -1])
        x_BD, labels_B = gather_rows(x_bD, labels_b, group)
        assert x_BD.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)  # its parts are summed in fp32
        assert x_BD.tolist() == [[0, 1, 2], [3, 4, 5], [10, 11, 12], [13, 14, 15]]
        assert labels_B.tolist() == [2**40, -1, 2**40 + 1, -1]
        factor_B1 = torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None] * (1 + group.rank)  # each rank's part differs
        (x_BD * factor_B1).sum().backward()
        assert x_bD.grad is not None
        assert x_bD.grad.tolist() == [[3.0 * (2 * group.rank + 1)] * 3, [3.0 * (2 * group.rank + 2)] * 3]
    x_bD = torch.ones(2, 3, requires_grad=True)
    x_BD, _ = gather_rows(x_bD, torch.zeros(2, dtype=torch.int64), group)
    (own_slice(x_BD.sum(1), group) ** 2).sum().backward()
    assert x_bD.grad is not None
    assert x_bD.grad.tolist() == [[6.0] * 3] * 2  # once, though both ranks computed it


def texts(group: Group) -> None:
    """Of any length, none included, and in any script."""
    assert group.gather_text("äö" * (1 + 1000 * group.rank)) == ["äö", "äö" * 1001]
    assert group.gather_text("one" if group.rank else "") == ["", "one"]
    assert group.gather_text("") == ["", ""]


def joining(group: Group) -> None:
    part = torch.tensor([1.0 + group.rank, 2.0], requires_grad=True)
    total = sum_over_ranks(part, group)
    assert total.tolist() == [3, 4]
    (total**2).sum().backward()
    assert part.grad is not None
    assert part.grad.tolist() == [6, 8]  # dL/dpart = 2 total
    part = torch.tensor([1.0 + group.rank, 2.0], requires_grad=True)
    stacked = stack_over_ranks(part, group)
    assert stacked.tolist() == [[1, 2], [2, 2]]
    (stacked**3).sum().backward()
    assert part.grad is not None
    assert part.grad.tolist() == [3 * (1 + group.rank) ** 2, 12]
    scale = torch.tensor(2.0, requires_grad=True)
    (replicated(scale, group) * (1 + group.rank)).backward()
    assert scale.grad is not None
    assert float(scale.grad) == 3


def averaging_engine(group: Group) -> None:
    """A weight whose gradient an engine averages gets the gradient of the global mean, as on one rank."""
    x_BD = torch.arange(8, dtype=torch.float64).view(4, 2)
    weight = torch.tensor([[1.0, 2.0], [0.5, -1.0]], dtype=torch.float64, requires_grad=True)
    alone = (x_BD @ weight).square().sum(1).mean()
    (expected,) = torch.autograd.grad(alone, weight)
    mine = slice(2 * group.rank, 2 * group.rank + 2)
    e_BD, _ = gather_rows(sum_not_mean(x_BD[mine] @ weight, group), torch.zeros(2, dtype=torch.int64), group)
    (own_slice(e_BD.square().sum(1), group)).mean().backward()
    assert weight.grad is not None
    averaged = group.all_reduce(weight.grad) / group.size
    torch.testing.assert_close(averaged, expected)
