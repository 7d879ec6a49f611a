"""Batch norm of each part of a batch by itself, or together with what other ranks hold of its group.

Legend: m samples, C channels, P parts of consecutive samples, N groups of the global batch.

Both return y, of x's shape and type, and the statistics that they took, fp32 [P, C] or [N, C]: means and variances
(divided by count - 1). They are written with torch's own kernels, part by part into one tensor: one part costs what
`F.batch_norm` costs, and several small ones less on a CPU, since they stay in its cache.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, split_with_sizes

from trainer.distributed import Group

_norm = torch.ops.aten.native_batch_norm
_norm_backward = torch.ops.aten.native_batch_norm_backward
Normed = tuple[Tensor, Tensor, Tensor]
Parts = tuple[tuple[int, int], ...]


def within(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, sizes: list[int]) -> Normed:
    """Each part, of so many samples, by its own mean and variance: `cat(F.batch_norm(part) for part in parts)`."""
    if weight is None:
        x = x.to(_wide(x))  # of mixed types torch's kernels know only 16-bit values with 32-bit weights
    if torch.compiler.is_compiling():
        return _compiled(x, weight, bias, eps, sizes)
    normed: Normed = _Within.apply(x, weight, bias, eps, sizes)  # type: ignore[no-untyped-call]
    return normed


def across(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, parts: Parts,
    sizes: tuple[int, ...], group: Group,
) -> Normed:  # fmt: skip
    """Each part by the mean and variance of its group, of which other ranks hold the rest. A collective: one all-reduce
    of [N, 2 C] in fp64; the backward is another.

    Args:
        parts: group and number of samples of each part.
        sizes: samples of each of the N groups, on all ranks.
    """
    if weight is None:
        x = x.to(_wide(x))
        weight, bias = x.new_ones(x.shape[1]), x.new_zeros(x.shape[1])
    normed: Normed = _Across.apply(x, weight, bias, eps, parts, sizes, group)  # type: ignore[no-untyped-call]
    return normed


def leave_across_uncompiled() -> None:
    """To be called before torch.compile. Not a decorator: it imports the compiler, which takes a second."""
    global across
    across = torch.compiler.disable(across)  # type: ignore[no-untyped-call]


def _compiled(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, sizes: list[int]) -> Normed:
    """The same in a form that torch.compile fuses."""
    y, means, variances = [], [], []
    for part in split_with_sizes(x, sizes):
        mean_C, var_C = (torch.zeros(x.shape[1], dtype=_wide(x), device=x.device) for _ in range(2))
        y.append(F.batch_norm(part, mean_C, var_C, weight, bias, True, 1.0, eps))
        means.append(mean_C)
        variances.append(var_C)
    return torch.cat(y), torch.stack(means), torch.stack(variances)


def _normalise_parts(x: Tensor, y: Tensor, weight: Any, bias: Any, eps: float, sizes: list[int]) -> tuple[Tensor, ...]:
    """Write each part into y, normalised by itself; means [P, C], 1 / deviation [P, C], and the variances (divided by
    the count) that follow."""
    mean_PC, inverse_PC = torch.empty(2, len(sizes), x.shape[1], dtype=_wide(x), device=x.device).unbind()
    for index, (part, out) in enumerate(zip(split_with_sizes(x, sizes), split_with_sizes(y, sizes), strict=True)):
        saved = {"out": out, "save_mean": mean_PC[index], "save_invstd": inverse_PC[index]}
        _norm.out(part, weight, bias, None, None, True, 0.0, eps, **saved)
    return mean_PC, inverse_PC, (inverse_PC.double() ** -2 - eps).clamp_min_(0)


class _Within(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, eps: float, sizes: list[int]) -> Normed:
        y = torch.empty_like(x)
        mean_PC, inverse_PC, var_PC = _normalise_parts(x, y, weight, bias, eps, sizes)
        ctx.save_for_backward(x, weight, mean_PC, inverse_PC)
        ctx.eps, ctx.sizes = eps, sizes
        var_PC = (var_PC * _unbiased(_column(sizes, x))).to(mean_PC.dtype)
        ctx.mark_non_differentiable(mean_PC, var_PC)
        return y, mean_PC, var_PC

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> Any:
        x, weight, mean_PC, inverse_PC = ctx.saved_tensors
        dx, wanted = torch.empty_like(x), [True, weight is not None, weight is not None]
        d_weight = d_bias = None
        parts = zip(
            split_with_sizes(x, ctx.sizes),
            split_with_sizes(dy, ctx.sizes),
            split_with_sizes(dx, ctx.sizes),
            strict=True,
        )
        for index, (part, d_part, out) in enumerate(parts):
            stored = (mean_PC[index], inverse_PC[index])
            d_x, d_w, d_b = _norm_backward(d_part, part, weight, None, None, *stored, True, ctx.eps, wanted)
            if len(ctx.sizes) == 1:
                dx = d_x
            else:
                out.copy_(d_x)
            if weight is not None:
                d_weight, d_bias = (d_w, d_b) if d_weight is None else (d_weight + d_w, d_bias + d_b)
        return dx, d_weight, d_bias, None, None


class _Across(torch.autograd.Function):
    """With k = weight / deviation, n values a channel of a group and x^ the normalised x, all sums over the group:
    dx = k (dy - sum(dy) / n - x^ sum(dy x^) / n). Torch's backward for fixed statistics gives k dy and this rank's two
    sums; the rest, once the ranks have added these up, is affine in x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        parts: Parts,
        sizes: tuple[int, ...],
        group: Group,
    ) -> Normed:
        y, own, wide = torch.empty_like(x), [size for _, size in parts], _wide(x)
        mean_PC, _, var_PC = _normalise_parts(x, y, weight, bias, eps, own)
        mean_PC, count_P1 = mean_PC.double(), _column(own, x)
        sums_N2C = _at_groups(torch.cat([mean_PC, var_PC + mean_PC.square()], dim=1) * count_P1, parts, len(sizes))
        count_N1 = _column(sizes, x)
        mean_NC, square_NC = (group.all_reduce(sums_N2C) / count_N1).chunk(2, dim=1)
        var_NC = (square_NC - mean_NC.square()).clamp_min_(0)
        unbiased_NC = (var_NC * _unbiased(count_N1)).to(wide)
        mean_NC, var_NC = mean_NC.to(wide), var_NC.to(wide)
        for (index, _), part, out in zip(parts, split_with_sizes(x, own), split_with_sizes(y, own), strict=True):
            nothing = {"out": out, "save_mean": mean_NC.new_empty(0), "save_invstd": mean_NC.new_empty(0)}
            _norm.out(part, weight, bias, mean_NC[index], var_NC[index], False, 0.0, eps, **nothing)
        ctx.save_for_backward(x, weight, mean_NC, var_NC, count_N1)
        ctx.eps, ctx.parts, ctx.group = eps, parts, group
        ctx.mark_non_differentiable(mean_NC, unbiased_NC)
        return y, mean_NC, unbiased_NC

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> Any:
        x, weight, mean_NC, var_NC, count_N1 = ctx.saved_tensors
        own, dx, sums = [size for _, size in ctx.parts], [], []
        for (index, _), part, d_part in zip(
            ctx.parts, split_with_sizes(x, own), split_with_sizes(dy, own), strict=True
        ):
            fixed = (mean_NC[index], var_NC[index], None, None)
            d_x, d_w, d_b = _norm_backward(d_part, part, weight, *fixed, False, ctx.eps, [True, True, True])
            dx.append(d_x)
            sums.append(torch.cat([d_w, d_b]))
        sums_P2C = torch.stack(sums).double()
        all_N2C = ctx.group.all_reduce(_at_groups(sums_P2C, ctx.parts, len(count_N1)))
        slope_NC, shift_NC = (all_N2C / count_N1).to(mean_NC.dtype).chunk(2, dim=1)
        inverse_NC = (var_NC + ctx.eps).rsqrt()
        shape, k_NC = (1, -1, *(1 for _ in x.shape[2:])), weight * inverse_NC
        slope_NC = -k_NC * inverse_NC * slope_NC
        shift_NC = -k_NC * shift_NC - slope_NC * mean_NC
        for (index, _), part, d_x in zip(ctx.parts, split_with_sizes(x, own), dx, strict=True):
            d_x.add_(shift_NC[index].view(shape)).addcmul_(part, slope_NC[index].view(shape))
        d_weight, d_bias = sums_P2C.sum(dim=0).to(weight.dtype).chunk(2)
        return torch.cat(dx), d_weight, d_bias, None, None, None, None


def _wide(x: Tensor) -> torch.dtype:
    """Of the statistics: fp32, for fp64 fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def _column(sizes: Sequence[int], x: Tensor) -> Tensor:
    """Values a channel of so many samples each, [len(sizes), 1]; where they are alike, without a copy to the device."""
    values = [float(size * x.shape[2:].numel()) for size in sizes]
    if len(set(values)) == 1:
        return torch.full((len(values), 1), values[0], dtype=torch.float64, device=x.device)
    return torch.tensor(values, dtype=torch.float64).to(x.device, non_blocking=True)[:, None]


def _unbiased(count_N1: Tensor) -> Tensor:
    return count_N1 / (count_N1 - 1).clamp_min(1)


def _at_groups(values_PX: Tensor, parts: Parts, groups: int) -> Tensor:
    """[N, X]: the values of each part at its group."""
    out = values_PX.new_zeros(groups, values_PX.shape[1])
    first = parts[0][0]  # the groups of a rank's parts follow each other
    out[first : first + len(parts)] = values_PX
    return out
