"""Numbers by row in few bits: what the head's optimizer remembers, and centres in bf16. Rounding is stochastic.

Legend: R rows of this rank, D dimension, n rows of a block.

A value that lies between two representable ones goes up or down with probabilities that make its mean exact. Rounding
to nearest would lose every change smaller than half a step: at a learning rate of 1e-3 a bf16 centre would never move.

The random numbers of a step are one block of [n, D], indexed by the row's number among all ranks' rows, so that the
result does not depend on the number of ranks; further blocks use the same numbers, shifted where all rows take part.
Rows that share numbers are rounded alike, which leaves each one's mean exact.
"""

from typing import Literal

import torch
from torch import Tensor


def block_size(device: torch.device) -> int:
    """Rows worked on at once: what a core's cache holds; on a GPU enough to fill it."""
    return 65536 if device.type == "cuda" else 1024


class Noise:
    """Uniform random bits for one step, [n, D] int32 in [0, 2^16), the same for a row on any number of ranks."""

    def __init__(self, seed: int, dimension: int, device: torch.device) -> None:
        size = block_size(device) * dimension
        generator = torch.Generator(device)
        generator.manual_seed(seed)
        # Three draws of 16 bits from each random int64.
        words = torch.empty(-(-size // 3), dtype=torch.int64, device=device).random_(0, 2**48, generator=generator)
        draws = torch.stack([words & 0xFFFF, (words >> 16) & 0xFFFF, (words >> 32) & 0xFFFF], dim=1)
        self.bits_ND = draws.flatten()[:size].view(-1, dimension).to(torch.int32)

    def __call__(self, rows: Tensor | slice, use: int) -> Tensor:
        """Bits for rows, given by their numbers among all ranks' rows; `use` tells values of one row apart."""
        size = self.bits_ND.shape[0]
        if isinstance(rows, slice):
            block = rows.start // size
            bits = self.bits_ND[rows.start % size : rows.start % size + rows.stop - rows.start]
            return bits.roll(use * 131 + block * 17, dims=1)
        return self.bits_ND[rows % size].roll(use * 131, dims=1)


def to_bf16(values: Tensor, bits: Tensor) -> Tensor:
    """fp32 to bf16 with stochastic rounding: add 16 random bits below the last one that is kept, then cut."""
    return values.contiguous().view(torch.int32).add(bits).bitwise_and_(-65536).view(torch.float32).to(torch.bfloat16)


class RowState:
    """Numbers in the shape of `weight_RD`, in fp32, bf16 or int8, read and written in fp32 by blocks of rows.

    Args:
        kind: fp32 4 bytes, bf16 2 bytes, int8 1 byte a number + 4 bytes a row (the greatest magnitude of the row).
    """

    def __init__(self, weight_RD: Tensor, kind: Literal["fp32", "bf16", "int8"]) -> None:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[kind]
        self.values_RD = torch.zeros_like(weight_RD, dtype=dtype)
        self.scale_R1 = torch.zeros(len(weight_RD), 1, device=weight_RD.device) if kind == "int8" else None

    def read(self, rows: Tensor | slice) -> Tensor:
        """fp32; a copy unless the state is fp32 and `rows` a slice."""
        values = self.values_RD[rows]
        if self.scale_R1 is None:
            return values.float()
        return values.float().mul_(self.scale_R1[rows] / 127)

    def write(self, rows: Tensor | slice, values: Tensor, bits: Tensor | None) -> None:
        """Store fp32 values; `bits` is needed unless the state is fp32."""
        if self.scale_R1 is not None:
            assert bits is not None
            scale = values.abs().amax(dim=1, keepdim=True)
            self.scale_R1[rows] = scale
            steps = values * (127 / scale.clamp_min(torch.finfo(torch.float32).tiny * 128))
            self.values_RD[rows] = steps.add_(bits, alpha=2**-16).floor_().clamp_(-127, 127).to(torch.int8)
        elif self.values_RD.dtype == torch.bfloat16:
            assert bits is not None
            self.values_RD[rows] = to_bf16(values, bits)
        elif not isinstance(rows, slice) or values.data_ptr() != self.values_RD[rows].data_ptr():
            self.values_RD[rows] = values

    def quantum(self, rows: Tensor | slice) -> Tensor | None:
        """The smallest step that a row can hold, [n, 1]; None where it is of no account."""
        return None if self.scale_R1 is None else self.scale_R1[rows] / 127

    def tensors(self, name: str) -> dict[str, Tensor]:
        """For a checkpoint."""
        scale = {} if self.scale_R1 is None else {f"{name}_scale": self.scale_R1}
        return {name: self.values_RD} | scale
