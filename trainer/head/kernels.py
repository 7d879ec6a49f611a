"""The head's Triton kernels, for GPUs: P and its row sums in one pass over [C, B], and a row's whole step in another.

Legend: B samples of all ranks, C classes, T classes of a tile, K centres a class, R = T K rows, D dimension.

`probabilities` is what `tiles` computes with torch in six passes over a wide z: scale or shift the logits, change those
of hard negatives, leave the targets out, exp, sum over the classes, round to the narrow type. Where K = 1 and the
operands are narrow it is the epilogue of the product itself, so that z never reaches the memory: 2 bytes a number are
written instead of 18 moved.

`step_rows` is `optimizer`'s SGD step of a row, read once and written once: 20 bytes a number in fp32, where the
sequence of torch operations moves about 100.

The same code runs on a CPU under TRITON_INTERPRET=1; the torch path is its oracle. Only this file knows Triton.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

if TYPE_CHECKING:
    from trainer.head.softening import Hardening

LOG2E = tl.constexpr(1.4426950408889634)
# Of a block: classes, samples, and numbers of the dimension multiplied at once. Of fourteen shapes and depths of
# pipeline the fastest on an H100: two blocks share a multiprocessor, and one's exp hides behind the other's products.
_HEIGHT, _WIDTH, _DEPTH = 128, 128, 64
_PASS_HEIGHT = 32


def interprets() -> bool:
    """Whether Triton's interpreter runs, which needs no GPU."""
    return bool(triton.knobs.runtime.interpret)


class Epilogue(NamedTuple):
    """What becomes of the logits of a tile.

    Attributes:
        own_B: int32, where the sample's own class is among all classes that take part; -1: it is not here.
        start: the tile's first class among them.
        centres: K.
        shift: taken from all logits; `shift_B`, if given, from each sample's, too.
        inverse_R1: 1 / |w| of each row, or None; Q is divided by |w|, too.
        bias_T: added to the logits of each class, after the hardening; or None.
        hardening: of margins that re-weight, or None.
    """

    own_B: Tensor
    start: int = 0
    centres: int = 1
    shift: float = 0.0
    shift_B: Tensor | None = None
    inverse_R1: Tensor | None = None
    bias_T: Tensor | None = None
    hardening: "Hardening | None" = None


@triton.jit
def _logits(
    z, t, b, own_ptr, shift_ptr, bias_ptr, hard_ptr, least_ptr, start, T, B,
    SHIFTS: tl.constexpr, BIAS: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """z = e . w of a block -> the logits, -inf at the targets and outside; and their derivative by z."""
    slope = tl.full(z.shape, 1.0, tl.float32)
    if HARD:
        scale, a = tl.load(hard_ptr), tl.load(hard_ptr + 1)
        by, square = tl.load(hard_ptr + 2), tl.load(hard_ptr + 3)
        cos = z / scale
        hard = cos > tl.load(least_ptr + b, mask=b < B, other=float("inf"))[None, :]
        slope = tl.where(hard, by + 2 * square * cos, 1.0)
        z = tl.where(hard, (a + (by + square * cos) * cos) * scale, z)
    if BIAS:  # only now: what is re-weighted are cosines
        z += tl.load(bias_ptr + t, mask=t < T, other=0.0)[:, None]
    if SHIFTS:
        z -= tl.load(shift_ptr + b, mask=b < B, other=0.0)[None, :]
    own = tl.load(own_ptr + b, mask=b < B, other=-1) - start
    return tl.where((t < T)[:, None] & (t[:, None] != own[None, :]), z, float("-inf")), slope


# Else Triton compiles anew for numbers that are 1 or multiples of 16.
_CHANGING = ("start", "seed", "first_row", "count", "T")


@triton.jit(do_not_specialize=_CHANGING)
def _product_kernel(
    w_desc, e_desc, q_desc, sums_ptr, own_ptr, shift_ptr, inverse_ptr, bias_ptr, hard_ptr, least_ptr, shift, start, T,
    B, D: tl.constexpr, SHIFTS: tl.constexpr, INVERSE: tl.constexpr, BIAS: tl.constexpr, HARD: tl.constexpr,
    STORE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A block of P = exp(W E^T - shift): product 1 and all that follows."""
    across = tl.cdiv(B, WIDTH)
    down, along = tl.program_id(0) // across, tl.program_id(0) % across  # neighbours share the rows of W
    z = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for d in range(0, D, DEPTH):
        z = tl.dot(w_desc.load([down * HEIGHT, d]), e_desc.load([along * WIDTH, d]).T, z)
    t = down * HEIGHT + tl.arange(0, HEIGHT)
    b = along * WIDTH + tl.arange(0, WIDTH)
    if INVERSE:
        inverse = tl.load(inverse_ptr + t, mask=t < T, other=0.0)[:, None]
        z *= inverse
    z, slope = _logits(z, t, b, own_ptr, shift_ptr, bias_ptr, hard_ptr, least_ptr, start, T, B, SHIFTS, BIAS, HARD)
    p = tl.exp2((z - shift) * LOG2E)
    tl.store(sums_ptr + down * B + b, tl.sum(p, 0), mask=b < B)
    if STORE:
        if HARD:
            p *= slope
        if INVERSE:
            p *= inverse
        q_desc.store([down * HEIGHT, along * WIDTH], p.to(q_desc.dtype))


@triton.jit(do_not_specialize=_CHANGING)
def _pass_kernel(
    z_ptr, q_ptr, sums_ptr, own_ptr, shift_ptr, inverse_ptr, bias_ptr, hard_ptr, least_ptr, shift, start, T,
    B, K: tl.constexpr, SHIFTS: tl.constexpr, INVERSE: tl.constexpr, BIAS: tl.constexpr, HARD: tl.constexpr,
    STORE: tl.constexpr, MAXIMA: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A block of P from products that are there, or its greatest logits; of K centres the best one counts."""
    across = tl.cdiv(B, WIDTH)
    down, along = tl.program_id(0) // across, tl.program_id(0) % across
    t = down * HEIGHT + tl.arange(0, HEIGHT)
    b = along * WIDTH + tl.arange(0, WIDTH)
    inside = (t < T)[:, None] & (b < B)[None, :]
    place = (t.to(tl.int64) * K)[:, None] * B + b[None, :]
    best = tl.full((HEIGHT, WIDTH), float("-inf"), tl.float32)
    which = tl.zeros((HEIGHT, WIDTH), tl.int32)
    for k in tl.static_range(K):
        z = tl.load(z_ptr + place + k * B, mask=inside, other=0.0).to(tl.float32)
        if INVERSE:
            z *= tl.load(inverse_ptr + t * K + k, mask=t < T, other=0.0)[:, None]
        which = tl.where(z > best, k, which)
        best = tl.maximum(z, best)
    z, slope = _logits(best, t, b, own_ptr, shift_ptr, bias_ptr, hard_ptr, least_ptr, start, T, B, SHIFTS, BIAS, HARD)
    if MAXIMA:
        tl.store(sums_ptr + down * B + b, tl.max(z, 0), mask=b < B)
    else:
        p = tl.exp2((z - shift) * LOG2E)
        tl.store(sums_ptr + down * B + b, tl.sum(p, 0), mask=b < B)
        if STORE:
            if HARD:
                p *= slope
            for k in tl.static_range(K):
                value = p if K == 1 else tl.where(which == k, p, 0.0)
                if INVERSE:
                    value *= tl.load(inverse_ptr + t * K + k, mask=t < T, other=0.0)[:, None]
                tl.store(q_ptr + place + k * B, value.to(q_ptr.dtype.element_ty), mask=inside)


def product(w_RD: Tensor, e_BD: Tensor, out_RB: Tensor | None, epilogue: Epilogue) -> Tensor:
    """Q into `out_RB`, where it is wanted, and the sums of P over the tile's classes, [B] in fp64; K = 1.

    Replaces `p = exp(w_RD @ e_BD.T - shift)`, 0 at the targets; `p.sum(0)`.

    Args:
        w_RD, e_BD, out_RB: of one narrow type; D and B multiples of 8.
    """
    (R, D), B = w_RD.shape, len(e_BD)
    grid, sums_NB = _blocks(R, B, _HEIGHT, w_RD.device)
    w_blocks = TensorDescriptor.from_tensor(w_RD.detach(), [_HEIGHT, _DEPTH])
    e_blocks = TensorDescriptor.from_tensor(e_BD, [_WIDTH, _DEPTH])
    q_blocks = w_blocks if out_RB is None else TensorDescriptor.from_tensor(out_RB, [_HEIGHT, _WIDTH])
    _product_kernel[grid](
        w_blocks, e_blocks, q_blocks, sums_NB, *_arguments(epilogue), R, B, D=D, **_flags(epilogue),
        STORE=out_RB is not None, HEIGHT=_HEIGHT, WIDTH=_WIDTH, DEPTH=_DEPTH, num_warps=4, num_stages=3,
    )  # fmt: skip
    return sums_NB.sum(dim=0, dtype=torch.float64)


def soften(z_RB: Tensor, out_RB: Tensor | None, epilogue: Epilogue) -> Tensor:
    """As `product`, from fp32 products that are there, for K centres; `out_RB` may be `z_RB`."""
    return _pass(z_RB, out_RB, epilogue, maxima=False).sum(dim=0, dtype=torch.float64)


def maxima(z_RB: Tensor, epilogue: Epilogue) -> Tensor:
    """The greatest logit of each sample among the tile's classes, [B]; -inf where there is none but the target's."""
    return _pass(z_RB, None, epilogue, maxima=True).amax(dim=0)


def _pass(z_RB: Tensor, out_RB: Tensor | None, epilogue: Epilogue, maxima: bool) -> Tensor:
    T, B = len(z_RB) // epilogue.centres, z_RB.shape[1]
    grid, sums_NB = _blocks(T, B, _PASS_HEIGHT, z_RB.device)
    _pass_kernel[grid](
        z_RB, z_RB if out_RB is None else out_RB, sums_NB, *_arguments(epilogue), T, B, K=epilogue.centres,
        **_flags(epilogue), STORE=out_RB is not None, MAXIMA=maxima, HEIGHT=_PASS_HEIGHT, WIDTH=_WIDTH, num_warps=4,
    )  # fmt: skip
    return sums_NB


def _blocks(T: int, B: int, height: int, device: torch.device) -> tuple[tuple[int], Tensor]:
    """The grid, and room for the sums of each row of blocks: no atomics, so that they are the same every time."""
    down, across = triton.cdiv(T, height), triton.cdiv(B, _WIDTH)
    return (down * across,), torch.empty(down, B, dtype=torch.float32, device=device)


def _arguments(epilogue: Epilogue) -> tuple[Tensor | float, ...]:
    own_B, hardening = epilogue.own_B, epilogue.hardening  # own_B stands in for what is not read
    hard = (own_B, own_B) if hardening is None else (hardening.numbers_4, hardening.least_B)
    optional = (epilogue.shift_B, epilogue.inverse_R1, epilogue.bias_T)
    found = (own_B if tensor is None else tensor.detach() for tensor in optional)
    return (own_B, *found, *hard, epilogue.shift, epilogue.start)


def _flags(epilogue: Epilogue) -> dict[str, bool]:
    return {
        "SHIFTS": epilogue.shift_B is not None,
        "INVERSE": epilogue.inverse_R1 is not None,
        "BIAS": epilogue.bias_T is not None,
        "HARD": epilogue.hardening is not None,
    }


@triton.jit
def _noise(seed, row, d):
    """Uniform in [0, 1) with 16 bits, for each number of each row: Murmur3's finaliser of (seed, row, place)."""
    state = seed.to(tl.uint32) + row.to(tl.uint32)[:, None] * 0x9E3779B1 + d.to(tl.uint32)[None, :] * 0x85EBCA77
    state = (state ^ (state >> 16)) * 0x85EBCA6B
    state = (state ^ (state >> 13)) * 0xC2B2AE35
    return (state ^ (state >> 16)) & 0xFFFF


@triton.jit
def _rounded(values, bits):
    """fp32 to bf16 with stochastic rounding: see `rounding.to_bf16`."""
    cut = (values.to(tl.uint32, bitcast=True) + bits) & 0xFFFF0000
    return cut.to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit(do_not_specialize=_CHANGING)
def _sgd_kernel(
    w_ptr, g_ptr, m_ptr, scale_ptr, rows_ptr, count, first_row, seed, lr, momentum, decay,
    D: tl.constexpr, WIDE: tl.constexpr, CHOSEN: tl.constexpr, UNIT: tl.constexpr, STATE: tl.constexpr,
    HEIGHT: tl.constexpr,
):  # fmt: skip
    """The step of HEIGHT rows; WIDE is the least power of two that holds D."""
    n = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    d = tl.arange(0, WIDE)
    row = tl.load(rows_ptr + n, mask=n < count, other=-1) if CHOSEN else n.to(tl.int64)
    some = (n < count) & (row >= 0)
    inside = some[:, None] & (d < D)[None, :]
    place = row[:, None] * D + d[None, :]
    w = tl.load(w_ptr + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + n.to(tl.int64)[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    m = tl.load(m_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if STATE == 1:
        m *= tl.load(scale_ptr + row, mask=some, other=0.0)[:, None] * (1 / 127)
    if not UNIT:
        g += decay * w
    m = momentum * m + g
    if UNIT:
        m -= w * tl.sum(m * w, 1)[:, None]
    if STATE == 4:
        tl.store(m_ptr + place, m, mask=inside)
    elif STATE == 2:
        tl.store(m_ptr + place, _rounded(m, _noise(seed, row + first_row, d)), mask=inside)
    else:
        scale = tl.max(tl.abs(m), 1)
        tl.store(scale_ptr + row, scale, mask=some)
        share = _noise(seed, row + first_row, d).to(tl.float32) * (1 / 65536)
        steps = tl.floor(m * (127 / tl.maximum(scale, 1.5046328e-36))[:, None] + share)
        tl.store(m_ptr + place, tl.minimum(tl.maximum(steps, -127.0), 127.0).to(tl.int8), mask=inside)
    w -= lr * m
    if UNIT:
        w *= (1 / tl.sqrt(tl.maximum(tl.sum(w * w, 1), 1e-30)))[:, None]
    if w_ptr.dtype.element_ty == tl.bfloat16:
        tl.store(w_ptr + place, _rounded(w, _noise(seed + 0x68E31DA4, row + first_row, d)), mask=inside)
    else:
        tl.store(w_ptr + place, w, mask=inside)


@dataclass(frozen=True, slots=True)
class SgdStep:
    """SGD of some rows. `first_row`, the number of this rank's first row among all ranks', keeps the rounding the same
    on any number of ranks."""

    lr: float
    momentum: float
    decay: float
    unit: bool
    seed: int
    first_row: int


def step_rows(
    weight_RD: Tensor,
    gradient_nD: Tensor,
    state_RD: Tensor,
    scale_R1: Tensor | None,
    rows: slice | Tensor,
    step: SgdStep,
) -> None:
    """One step of the rows, in place: `optimizer` has the formulas.

    Args:
        state_RD: the momentum in fp32, bf16 or int8; int8 with the greatest magnitude of each row, `scale_R1`.
        rows: which of `weight_RD`, as many as the gradient has; those below 0 are left out.
    """
    count, D = gradient_nD.shape
    chosen = isinstance(rows, Tensor)
    w_RD, m_RD, first, scale_R1 = weight_RD.detach(), state_RD, step.first_row, scale_R1
    if isinstance(rows, slice):
        w_RD, m_RD, first = w_RD[rows], m_RD[rows], first + rows.start
        scale_R1 = None if scale_R1 is None else scale_R1[rows]
    wide = triton.next_power_of_2(D)
    height = max(1, 2048 // wide)
    _sgd_kernel[(triton.cdiv(count, height),)](
        w_RD, gradient_nD, m_RD, m_RD if scale_R1 is None else scale_R1, rows if chosen else m_RD,
        count, first, step.seed % 2**31, step.lr, step.momentum, step.decay,
        D=D, WIDE=wide, CHOSEN=chosen, UNIT=step.unit, STATE=m_RD.element_size(), HEIGHT=height, num_warps=4,
    )  # fmt: skip
