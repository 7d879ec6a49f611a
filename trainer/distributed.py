"""The process group, which class rows a rank owns, and the few collectives with their gradients.

Legend: b samples of this rank, B = world_size x b samples of all ranks, D dimension, W world_size.

One step of a class-sharded loss:
  1. `gather_rows`       one all-gather of embeddings and labels, packed as bytes; backward: one reduce-scatter of dX
  2. `sum_over_ranks`    one all-reduce of [B, 2]; backward: nothing
     or `stack_over_ranks`, one all-gather of [B, 2], where partial results cannot simply be added; backward: nothing
Between 1 and 2 a rank works on its own rows of the class centres; after 2 every rank computes the same loss. A gradient
that reaches 1 is therefore this rank's *part* of the gradient, and the reduce-scatter adds the parts up.

On one process nothing is sent and the same code runs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from trainer.errors import UserError

Map = Callable[[Tensor], Tensor]


@dataclass(slots=True)
class Traffic:
    """What a group has sent: messages, and the bytes that leave one rank under a ring algorithm."""

    calls: int = 0
    bytes: float = 0.0

    def count(self, size: float) -> None:
        self.calls += 1
        self.bytes += size

    def reset(self) -> None:
        self.calls, self.bytes = 0, 0.0


@dataclass(frozen=True, slots=True)
class Group:
    """The ranks that share the class rows. Make it with `Group.current()`, after the process group exists."""

    rank: int = 0
    size: int = 1
    handle: dist.ProcessGroup | None = None
    traffic: Traffic = field(default_factory=Traffic, compare=False)

    @classmethod
    def current(cls) -> "Group":
        """The default process group, or a group of one where there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)

    def all_gather(self, local: Tensor) -> Tensor:
        """[n, ...] of each rank to [W*n, ...], in rank order. No gradient."""
        if self.size == 1:
            return local
        out = local.new_empty(self.size * local.shape[0], *local.shape[1:])
        dist.all_gather_single(out, local.contiguous(), group=self.handle)
        self.traffic.count((self.size - 1) * _bytes(local))
        return out

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over the ranks, in a new tensor. No gradient."""
        if self.size == 1:
            return values
        out = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, group=self.handle)
        self.traffic.count(2 * (self.size - 1) / self.size * _bytes(values))
        return out

    def reduce_scatter(self, values: Tensor) -> Tensor:
        """The sum over the ranks of [W*n, ...], of which each rank keeps its n rows. No gradient."""
        if self.size == 1:
            return values
        out = values.new_empty(values.shape[0] // self.size, *values.shape[1:])
        dist.reduce_scatter_single(out, values.contiguous(), group=self.handle)
        self.traffic.count((self.size - 1) / self.size * _bytes(values))
        return out

    def barrier(self) -> None:
        """Return when every rank has come here."""
        if self.size > 1:
            dist.barrier(group=self.handle)

    def check_equal(self, value: int, what: str) -> None:
        """One tiny message; every rank raises where the ranks do not agree.

        Raises:
            UserError: names the values of all ranks.
        """
        if self.size == 1:
            return
        device = "cuda" if dist.get_backend(self.handle) == "nccl" else "cpu"
        values = self.all_gather(torch.tensor([value], dtype=torch.int64, device=device)).tolist()
        if len(set(values)) > 1:
            raise UserError(f"the ranks got {what} {values}; every rank needs the same number, so pad the shorter ones")


@dataclass(frozen=True, slots=True)
class RowRange:
    """The classes that one rank owns: blocks in rank order, of which the first `classes % world_size` have one more.

    Attributes:
        start, stop: first class owned, and one past the last; equal where there are fewer classes than ranks.
    """

    classes: int
    start: int
    stop: int

    @classmethod
    def of(cls, classes: int, rank: int = 0, world_size: int = 1) -> "RowRange":
        share, more = divmod(classes, world_size)
        start = rank * share + min(rank, more)
        return cls(classes, start, start + share + (rank < more))

    def __len__(self) -> int:
        return self.stop - self.start


class _GatherRows(torch.autograd.Function):
    """See `gather_rows`."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_bD: Tensor, labels_b: Tensor, group: Group) -> tuple[Tensor, Tensor]:
        b, dimension = x_bD.shape
        message = torch.cat([_as_bytes(x_bD), _as_bytes(labels_b)])
        gathered = group.all_gather(message).view(group.size, -1)
        size = _bytes(x_bD)
        x_BD = gathered[:, :size].contiguous().view(x_bD.dtype).view(group.size * b, dimension)
        if x_BD.dtype in (torch.bfloat16, torch.float16):
            x_BD = x_BD.float()  # so that the parts of its gradient are summed before they are rounded
        labels_B = gathered[:, size:].contiguous().view(labels_b.dtype).view(group.size * b)
        ctx.group, ctx.dtype = group, x_bD.dtype  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(labels_B)
        return x_BD, labels_B

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None, None]:
        dx_bD: Tensor = ctx.group.reduce_scatter(gradients[0])  # type: ignore[attr-defined]
        return dx_bD.to(ctx.dtype), None, None  # type: ignore[attr-defined]


def gather_rows(x_bD: Tensor, labels_b: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """All ranks' embeddings and labels, in rank order: `cat(x of every rank)`, `cat(labels of every rank)`.

    One message of W x b x (D x itemsize + 8) bytes. Its backward is one reduce-scatter in fp32 (fp64 for fp64): each
    rank hands in the part of the gradient that its own classes contributed, for all B samples, and receives the sum
    of all parts for its own b samples. Work that every rank repeats on the gathered rows would be counted W times:
    let gradients flow only through `own_slice`.

    Args:
        x_bD: floating point, any precision; 16-bit ones are sent as they are and come out in fp32.
        labels_b: int64.
    """
    x_BD, labels_B = _GatherRows.apply(x_bD, labels_b, group)  # type: ignore[no-untyped-call]
    return x_BD, labels_B


class _Linear(torch.autograd.Function):
    """A linear map, and what its backward makes of the gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor, there: Map, back: Map) -> Tensor:
        ctx.back = back  # type: ignore[attr-defined]
        return there(values)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(gradients[0]), None, None  # type: ignore[attr-defined]


def _linear(values: Tensor, there: Map, back: Map) -> Tensor:
    result: Tensor = _Linear.apply(values, there, back)  # type: ignore[no-untyped-call]
    return result


def _same(values: Tensor) -> Tensor:
    return values.view_as(values)


def sum_over_ranks(values: Tensor, group: Group) -> Tensor:
    """One all-reduce. Its backward sends nothing.

    What follows is the same on every rank: with y = sum_r v_r and one loss L(y), dL/dv_r = dL/dy, which each rank
    already holds. (A loss *per rank*, added up over the ranks, would need an all-reduce here.)
    """
    return _linear(values, lambda v: _same(group.all_reduce(v)), lambda gradient: gradient)


def stack_over_ranks(values: Tensor, group: Group) -> Tensor:
    """One all-gather: `stack(values of every rank)`, [W, ...]. Its backward takes the own slice and sends nothing,
    since what follows is the same on every rank."""

    def stacked(values: Tensor) -> Tensor:
        return group.all_gather(values.unsqueeze(0)).view(group.size, *values.shape)

    return _linear(values, stacked, lambda gradient: gradient[group.rank])


def replicated(value: Tensor, group: Group) -> Tensor:
    """A parameter that every rank holds, used in work that is divided among the ranks: the identity, whose backward is
    one all-reduce of its size, since each rank sees only its part of the gradient."""
    return _linear(value, _same, group.all_reduce)


def own_slice(values_B: Tensor, group: Group) -> Tensor:
    """The same values, with gradient only to this rank's own samples.

    For terms that every rank computes alike from the gathered rows: each sample's gradient then comes from one rank,
    and the reduce-scatter of `gather_rows` counts it once.
    """
    if group.size == 1:
        return values_B
    b = values_B.shape[0] // group.size
    own_B = torch.arange(values_B.shape[0], device=values_B.device) // b == group.rank
    return torch.where(own_B, values_B, values_B.detach())


def sum_not_mean(x: Tensor, group: Group) -> Tensor:
    """The identity, whose backward multiplies by W: for the border of an engine that *averages* gradients over ranks.

    A sharded loss L is one number for the global batch, and hands rank r the exact dL/dx_r. With y parameters of the
    backbone, dL/dy = sum_r (dx_r/dy)^T dL/dx_r. A data-parallel engine computes (1/W) sum_r (dx_r/dy)^T g_r instead,
    from what it receives as g_r. The two agree for g_r = W dL/dx_r.
    """
    return _linear(x, _same, lambda gradient: gradient * group.size)


@torch.no_grad()
def average_buffers(module: nn.Module, group: Group) -> None:
    """Give every rank the mean of all ranks' floating-point buffers, such as the batch norms' running statistics.

    Each rank sees other samples, so the statistics differ; a checkpoint and an evaluation want one set. One all-reduce
    of all buffers together.
    """
    buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point() and buffer.numel()]
    if group.size == 1 or not buffers:
        return
    flat = group.all_reduce(torch.cat([buffer.reshape(-1).float() for buffer in buffers])) / group.size
    for buffer, part in zip(buffers, torch.split(flat, [buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
