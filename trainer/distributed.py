"""The process group, which class rows a rank owns, the few collectives with their gradients, and a step's batch.

Legend: b samples of this rank, B = world_size x b samples of all ranks, D dimension, W world_size.

One step of a class-sharded loss:
  0. `Gatherer`          checks the batch, does 1, and names a bad sample
  1. `gather_rows`       one all-gather of embeddings and labels, packed as bytes; backward: one reduce-scatter of dX
  2. `sum_over_ranks`    one all-reduce of [B, 2]; backward: nothing
     or `stack_over_ranks`, one all-gather of [B, 2], where partial results cannot simply be added; backward: nothing
Between 1 and 2 a rank works on its own rows of the class centres; after 2 every rank computes the same loss. A gradient
that reaches 1 is therefore this rank's *part* of the gradient, and the reduce-scatter adds the parts up. On one process
nothing is sent and the same code runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from trainer.errors import Diverged, UserError
from trainer.pulse import collective

Map = Callable[[Tensor], Tensor]
# Before torch 2.13 they had other names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


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

    @collective
    def all_gather(self, local: Tensor) -> Tensor:
        """[n, ...] of each rank to [W*n, ...], in rank order. No gradient."""
        if self.size == 1:
            return local
        out = local.new_empty(self.size * local.shape[0], *local.shape[1:])
        _all_gather(out, local.contiguous(), group=self.handle)
        self.traffic.count((self.size - 1) * local.nbytes)
        return out

    @collective
    def all_reduce(self, values: Tensor, *, in_place: bool = False) -> Tensor:
        """The sum over the ranks, in a new tensor or in place. No gradient."""
        if self.size == 1:
            return values
        out = values if in_place else values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, group=self.handle)
        self.traffic.count(2 * (self.size - 1) / self.size * values.nbytes)
        return out

    @collective
    def reduce_scatter(self, values: Tensor) -> Tensor:
        """The sum over the ranks of [W*n, ...], of which each rank keeps its n rows. No gradient."""
        if self.size == 1:
            return values
        out = values.new_empty(values.shape[0] // self.size, *values.shape[1:])
        _reduce_scatter(out, values.contiguous(), group=self.handle)
        self.traffic.count((self.size - 1) / self.size * values.nbytes)
        return out

    @collective
    def barrier(self) -> None:
        """Return when every rank has come here."""
        if self.size > 1:
            dist.barrier(group=self.handle)

    def gather_text(self, text: str) -> list[str]:
        """The texts of all ranks, in rank order; two messages, the second as long as the longest text on every rank."""
        if self.size == 1:
            return [text]
        device = "cuda" if dist.get_backend(self.handle) == "nccl" else "cpu"
        content = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
        lengths = self.all_gather(torch.tensor([len(content)], device=device)).tolist()
        padded = nn.functional.pad(content, (0, max(lengths) - len(content)))
        rows = self.all_gather(padded).view(self.size, -1).tolist()
        return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]

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
    """The classes `start` to `stop - 1` that one rank owns, none where there are fewer classes than ranks: blocks in
    rank order, of which the first `classes % world_size` have one more."""

    start: int
    stop: int

    @classmethod
    def of(cls, classes: int, rank: int = 0, world_size: int = 1) -> "RowRange":
        share, more = divmod(classes, world_size)
        start = rank * share + min(rank, more)
        return cls(start, start + share + (rank < more))

    def __len__(self) -> int:
        return self.stop - self.start


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


def gather_rows(x_bD: Tensor, labels_b: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """All ranks' embeddings and labels, in rank order: `cat(x of every rank)`, `cat(labels of every rank)`.

    One message of W x b x (D x itemsize + 8) bytes. Its backward is one reduce-scatter in fp32 (fp64 for fp64): each
    rank hands in the part of the gradient that its own classes contributed, for all B samples, and receives the sum
    of all parts for its own b samples. Work that every rank repeats on the gathered rows would be counted W times:
    let gradients flow only through `own_slice`.

    Args:
        x_bD: floating point, any precision; 16-bit ones are sent as they are and come out in fp32, so that the parts
            of their gradient are summed before they are rounded.
        labels_b: int64.
    """
    size, dtype = x_bD.nbytes, x_bD.dtype
    message = torch.cat([_as_bytes(x_bD), _as_bytes(labels_b)])
    gathered = group.all_gather(message).view(group.size, -1)
    labels_B = gathered[:, size:].contiguous().view(labels_b.dtype).view(-1)

    def there(x_bD: Tensor) -> Tensor:
        x_BD = gathered[:, :size].contiguous().view(dtype).view(-1, x_bD.shape[1])
        return x_BD.float() if dtype in (torch.bfloat16, torch.float16) else x_BD

    return _linear(x_bD, there, lambda dx_BD: group.reduce_scatter(dx_BD).to(dtype)), labels_B


def sum_over_ranks(values: Tensor, group: Group) -> Tensor:
    """One all-reduce. Its backward sends nothing: with y = sum_r v_r and one loss L(y), the same on every rank,
    dL/dv_r = dL/dy, which each rank holds. (A loss *per rank*, added up over the ranks, would need an all-reduce.)"""
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


def average_buffers(module: nn.Module, group: Group) -> None:
    """Give every rank the mean of all ranks' floating-point buffers: each has taken statistics of other samples."""
    average([buffer for buffer in module.buffers() if buffer.is_floating_point()], group)


@torch.no_grad()
def average(tensors: Sequence[Tensor], group: Group) -> None:
    """Put the mean over the ranks into each, with one all-reduce of all together."""
    tensors = [tensor for tensor in tensors if tensor.numel()]
    if group.size == 1 or not tensors:
        return
    flat = group.all_reduce(torch.cat([tensor.reshape(-1).float() for tensor in tensors])) / group.size
    for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


class Gatherer:
    """How each step of a loss for so many classes and dimensions begins.

    Args:
        what: the loss, for messages.
    """

    def __init__(self, classes: int, dimension: int, group: Group, what: str = "loss") -> None:
        self.classes, self.dimension, self.group, self.what = classes, dimension, group, what
        self._first = True

    def __call__(self, x_bD: Tensor, labels_b: Tensor, keys: Sequence[str] | None) -> "Gathered":
        """All ranks' embeddings and labels; a collective.

        Args:
            x_bD: embeddings of this rank's samples.
            labels_b: int64 classes, -1 for a slot that only fills the batch; equally many on every rank.
            keys: the samples' names, for messages.

        Raises:
            UserError: another shape or type, no sample at all, or in the first step batches of several sizes.
        """
        self._check_shapes(x_bD, labels_b)
        if self._first:
            self.group.check_equal(x_bD.shape[0], "batches of sizes")
            self._first = False
        x_BD, labels_B = gather_rows(x_bD, labels_b.to(x_bD.device), self.group)
        return Gathered(self, x_BD, labels_B, keys)

    def _check_shapes(self, x_bD: Tensor, labels_b: Tensor) -> None:
        if x_bD.ndim != 2 or x_bD.shape[1] != self.dimension:
            found = tuple(x_bD.shape)
            raise UserError(f"embeddings of shape {found}; the {self.what} was made for [b, {self.dimension}]")
        if not len(x_bD):
            raise UserError(f"the {self.what} got no embedding; give each rank one slot or more, -1 where it is empty")
        if labels_b.shape != x_bD.shape[:1] or labels_b.dtype != torch.int64:
            raise UserError(
                f"labels of shape {tuple(labels_b.shape)} and type {labels_b.dtype} for {x_bD.shape[0]} embeddings; "
                "give one int64 label each"
            )


class Gathered:
    """All ranks' samples of one step. Whether one of them is bad is asked for at once and read late
    (`raise_if_bad`), so that a GPU need not wait.

    Attributes:
        x_BD: embeddings, fp32 or wider; their gradient goes back to the ranks (`distributed.gather_rows`).
        labels_B: classes, or -1.
        own: which of them are this rank's.
    """

    def __init__(self, gatherer: Gatherer, x_BD: Tensor, labels_B: Tensor, keys: Sequence[str] | None) -> None:
        self.x_BD, self.labels_B, self._for, self._keys = x_BD, labels_B, gatherer, keys
        self._b = x_BD.shape[0] // gatherer.group.size
        self.own = slice(gatherer.group.rank * self._b, (gatherer.group.rank + 1) * self._b)
        self._finite_B = torch.isfinite(x_BD.detach()).all(dim=1)
        self._known_B = (labels_B >= -1) & (labels_B < gatherer.classes)
        self._good = good = (self._finite_B & self._known_B).all()
        self._event: torch.cuda.Event | None = None
        if good.is_cuda and not torch.cuda.is_current_stream_capturing():
            self._good = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._good.copy_(good, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def raise_if_bad(self) -> None:
        """The same error on every rank, in which the rank that holds the sample adds its name.

        A step that is being captured in a CUDA graph has no values yet: it is not looked at.

        Raises:
            UserError: a label is no class, or an embedding is not finite.
        """
        if self._event is not None:
            self._event.synchronize()
        elif self._good.is_cuda:
            return
        if self._good:
            return
        slot = int((~(self._finite_B & self._known_B)).nonzero()[0])
        rank, place = divmod(slot, self._b)
        who = f"slot {place} of rank {rank}"
        if rank == self._for.group.rank and self._keys is not None:
            who = f"sample '{self._keys[place]}'"
        if not bool(self._known_B[slot]):
            raise UserError(
                f"{who} has label {int(self.labels_B[slot])}, but the {self._for.what} has the classes 0 to "
                f"{self._for.classes - 1}; the data and the number of classes do not belong together"
            )
        x_D = self.x_BD.detach()[slot]
        bad = x_D[~torch.isfinite(x_D)]
        raise Diverged(
            f"{who} has an embedding that is not finite ({len(bad)} of {len(x_D)} numbers, the first is "
            f"{float(bad[0])}); lower the learning rate or look at its image and the weights"
        )


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
