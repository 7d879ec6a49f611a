"""P of one tile, from its rows of W: in torch, or in one pass of the Triton kernels where there are some.

Legend: as in `tiles`: B samples, C classes, K centres a class, T classes and R = T K rows of a tile, D dimension.
"""

import importlib.util
import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.head.matmul import Products
from trainer.head.rows import Own, Rows

if TYPE_CHECKING:
    pass

Kernels = Literal["auto", "torch", "triton"]


class Tile(NamedTuple):
    """The classes [start, stop) of those that take part, their rows of W, and 1/|w| where the plan divides by |w|."""

    start: int
    stop: int
    w_RD: Tensor
    inverse_R1: Tensor | None


@dataclass(frozen=True, slots=True)
class Hardening:
    """What a margin does to hard negatives, those with cos > `least_B`: cos becomes a + b cos + c cos^2.

    Attributes:
        numbers_4: the scale s (z = s cos), a, b, c; on the device, so that no step waits for them.
    """

    numbers_4: Tensor
    least_B: Tensor

    def __call__(self, z_TB: Tensor) -> tuple[Tensor, Tensor]:
        """The changed logits, and their derivative by z."""
        scale, a, b, c = self.numbers_4.to(z_TB)
        cos_TB = z_TB / scale
        hard_TB = cos_TB > self.least_B
        changed_TB = (a + (b + c * cos_TB) * cos_TB).mul_(scale)
        return torch.where(hard_TB, changed_TB, z_TB), torch.where(hard_TB, b + 2 * c * cos_TB, 1)


class Softening(Protocol):
    """exp(z - shift) of a tile's logits, 0 at the targets."""

    def __call__(self, tile: Tile, shift_B: Tensor | None, out: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Q_RB = P x dz/d(e.w) per row of W goes to `out`, where it is wanted.

        Args:
            shift_B: of each sample, taken off beside the plan's constant; where neither is given, the tile's maxima.

        Returns:
            The sum of P over the tile's classes, [B]; and the maxima, where they were taken.
        """


class TorchSoftening:
    """In a pass of torch for each operation: the oracle of the kernels, and the way of every other device.

    Args:
        shift: the plan's constant, or None.
    """

    def __init__(
        self, products: Products, rows: Rows, own: Own, *, shift: float | None, hardening: Hardening | None
    ) -> None:
        self.products, self.rows, self.own, self.shift, self.hardening = products, rows, own, shift, hardening
        self.columns = torch.arange(len(own.mask_B), device=own.mask_B.device)

    def __call__(self, tile: Tile, shift_B: Tensor | None, out: Tensor | None) -> tuple[Tensor, Tensor | None]:
        K, T = self.rows.centres, tile.stop - tile.start
        z_TB = z_RB = self._logits(tile, out)
        best_TB: Tensor | None = None
        if K > 1:
            z_TB, best_TB = z_RB.view(T, K, -1).max(dim=1)
        slope_TB: Tensor | None = None
        if self.hardening is not None:
            z_TB, slope_TB = self.hardening(z_TB)
        bias_T = self.rows.bias(tile.start, tile.stop)  # only now: what is re-weighted are cosines
        if bias_T is not None:
            z_TB = z_TB.add_(bias_T[:, None])
        inside_B, row_B = self.own.within(tile.start, tile.stop)  # the targets are left out
        z_TB.index_put_((row_B, self.columns), torch.where(inside_B, -math.inf, z_TB[row_B, self.columns]))
        maxima_B: Tensor | None = None
        if shift_B is None and self.shift is None:
            shift_B = maxima_B = _finite(z_TB.amax(dim=0))
        if shift_B is not None:
            z_TB.sub_(shift_B)
        if self.shift:
            z_TB.sub_(self.shift)
        p_TB = z_TB.exp_()
        sum_B = p_TB.sum(dim=0)
        if out is not None:
            q_RB = p_TB if slope_TB is None else p_TB * slope_TB
            if best_TB is not None:
                q_RB = z_RB.zero_().view(T, K, -1).scatter_(1, best_TB[:, None], q_RB[:, None]).view(T * K, -1)
            if tile.inverse_R1 is not None:
                q_RB = q_RB.mul_(tile.inverse_R1)
            if q_RB.data_ptr() != out.data_ptr():
                out.copy_(q_RB)
        return sum_B, maxima_B

    def _logits(self, tile: Tile, out: Tensor | None) -> Tensor:
        z_RB = self.products.logits(tile.w_RD, out if out is not None and out.dtype == self.products.wide else None)
        return z_RB if tile.inverse_R1 is None else z_RB.mul_(tile.inverse_R1)


class TritonSoftening:
    """In one pass over the logits; for bf16 products with one centre a class, at the end of the product itself."""

    def __init__(
        self, products: Products, rows: Rows, own: Own, *, shift: float | None, hardening: Hardening | None
    ) -> None:
        self.products, self.rows, self.shift, self.hardening = products, rows, shift, hardening
        self.own_B = torch.where(own.mask_B, own.place_B, -1).int()
        D, B = products.e_DB.shape
        # The copy engine wants rows of whole 16 bytes. Triton's interpreter takes bf16 operands for integers.
        fast = torch.bfloat16 if products.e_DB.is_cuda else torch.float32
        self.at_once = products.narrow == fast and rows.centres == 1 and B % 8 == 0 and D % 8 == 0

    def __call__(self, tile: Tile, shift_B: Tensor | None, out: Tensor | None) -> tuple[Tensor, Tensor | None]:
        from trainer.head import kernels

        maximum = shift_B is None and self.shift is None
        bias_T = self.rows.bias(tile.start, tile.stop)
        epilogue = kernels.Epilogue(
            self.own_B, tile.start, self.rows.centres, self.shift or 0.0, shift_B, tile.inverse_R1,
            None if bias_T is None else bias_T.float(), self.hardening,
        )  # fmt: skip
        if self.at_once and not maximum:
            w_RD, e_BD = self.products.operand(tile.w_RD, "w"), self.products.narrow_e_BD
            return kernels.product(w_RD, e_BD, out, epilogue), None
        z_RB = self.products.logits(tile.w_RD, None)
        maxima_B: Tensor | None = None
        if maximum:
            maxima_B = _finite(kernels.maxima(z_RB, epilogue))
            epilogue = epilogue._replace(shift_B=maxima_B)
        return kernels.soften(z_RB, out, epilogue), maxima_B


def _finite(maxima_B: Tensor) -> Tensor:
    """A tile without any class but a sample's own has no maximum."""
    return torch.where(maxima_B == -math.inf, 0, maxima_B)


def uses_kernels(choice: Kernels, device: torch.device) -> bool:
    """Whether the Triton kernels compute on this device: by default on a GPU, where Triton is installed.

    Raises:
        UserError: they are asked for and cannot run.
    """
    if choice == "torch" or (choice == "auto" and device.type != "cuda"):
        return False
    if choice == "auto":
        return _installed()
    if not _installed():
        raise UserError("head.kernels=triton, but Triton is not installed; pip install triton, or use auto")
    if device.type != "cuda":
        from trainer.head import kernels

        if not kernels.interprets():
            raise UserError(f"head.kernels=triton cannot run on {device.type}; use auto, which takes torch there")
    return True


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
