"""The head's matrix products: operands in one precision, results in another, in memory that is used again.

Legend: R rows of a tile, B samples, D dimension. *Wide* is fp32 (fp64 in tests), *narrow* the type of the operands.

Product 1 makes logits, so its result must be wide: a logit of 60 in bf16 is off by 0.1. A GPU multiplies bf16 operands
into fp32 results. A CPU has no such product by its types, but oneDNN rounds fp32 operands to bf16 on the way where it
is asked to and the processor can (else product 1 stays fp32). Products 2 and 3 make gradients; on a CPU their tiles'
results are rounded to bf16 before they are added up in fp32.

Buffers live from step to step: to ask the system for hundreds of megabytes anew costs up to a tenth of a product.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor


@dataclass(slots=True)
class Workspace:
    """Buffers by name: one that was given back is handed out again where it fits; scratches are lent for a moment."""

    spares: dict[str, Tensor] = field(default_factory=dict)
    scratches: dict[str, Tensor] = field(default_factory=dict)

    def take(self, name: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor; whoever takes it owns it until `give_back`.

        Where the spare one does not fit it is freed first, and one with some slack takes its place: with class sampling
        the sizes of two steps differ a little.
        """
        spare, size = self.spares.pop(name, None), shape[0] * shape[1]
        if spare is None or spare.dtype != dtype or spare.device != device or spare.numel() < size:
            slack = 0 if spare is None else size // 16
            del spare
            spare = torch.empty(size + slack, dtype=dtype, device=device)
        return spare[:size].view(shape)

    def give_back(self, name: str, buffer: Tensor) -> None:
        self.spares[name] = buffer if buffer._base is None else buffer._base

    def scratch(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor, valid until the next request for this name."""
        found, size = self.scratches.get(name), math.prod(shape)
        if found is None or found.numel() < size or found.dtype != dtype or found.device != device:
            found = self.scratches[name] = torch.empty(size, dtype=dtype, device=device)
        return found[:size].view(shape)


class Products:
    """Products of one step.

    Args:
        wide: type of results and sums.
        narrow: type of the operands; may be equal to `wide`.
    """

    def __init__(self, e_BD: Tensor, narrow: torch.dtype, memory: Workspace) -> None:
        self.wide, self.narrow, self.memory = e_BD.dtype, narrow, memory
        self.mixed = e_BD.is_cuda and narrow != self.wide
        self.e_DB = (e_BD.to(narrow) if self.mixed else e_BD).t()

    @property
    def narrow_e_BD(self) -> Tensor:
        """The embeddings as an operand."""
        return self.e_DB.t().to(self.narrow)

    def operand(self, values: Tensor, name: str) -> Tensor:
        """The values in the narrow type; the copy, if one is needed, lives until the next with this name."""
        if values.dtype == self.narrow:
            return values
        return self.memory.scratch(name, values.shape, self.narrow, values.device).copy_(values)

    def logits(self, w_RD: Tensor, out: Tensor | None) -> Tensor:
        """Product 1: W E^T, wide; in `out` if given, else in memory that lives until the next call."""
        if self.mixed:
            return torch.mm(self.operand(w_RD, "w"), self.e_DB, out_dtype=self.wide)
        if out is None:
            out = self.memory.scratch("z", (len(w_RD), self.e_DB.shape[1]), self.wide, w_RD.device)
        if w_RD.dtype != self.wide:
            w_RD = self.memory.scratch("wide", w_RD.shape, self.wide, w_RD.device).copy_(w_RD)
        if self.wide == self.narrow:
            return torch.mm(w_RD, self.e_DB, out=out)
        with _operands_rounded_to_bf16():
            return torch.mm(w_RD, self.e_DB, out=out)

    def add_embeddings(self, total_BD: Tensor, q_RB: Tensor, w_RD: Tensor, r_B: Tensor | None) -> None:
        """Product 2: total += Q^T W, each row times r if given; narrow operands, a wide total."""
        if q_RB.dtype == self.wide and r_B is None:
            total_BD.addmm_(q_RB.t(), w_RD)
            return
        product_BD = torch.mm(q_RB.t(), w_RD, out_dtype=self.wide) if self.mixed else torch.mm(q_RB.t(), w_RD)
        if r_B is None:
            total_BD.add_(product_BD)
        else:
            total_BD.addcmul_(product_BD.to(self.wide), r_B[:, None])

    def rows(self, q_RB: Tensor, re_BD: Tensor, out: Tensor, add: bool) -> None:
        """Product 3: out = Q (r E), or out += of it; narrow operands."""
        if q_RB.dtype == out.dtype:
            out.addmm_(q_RB, re_BD, beta=1 if add else 0)
        elif self.mixed and not add and out.dtype == self.wide:
            torch.mm(q_RB, re_BD, out_dtype=self.wide, out=out)
        else:
            product_RD = self.memory.scratch("product", out.shape, self.narrow, out.device)
            torch.mm(q_RB, re_BD, out=product_RD)
            if add:
                out.add_(product_RD)
            else:
                out.copy_(product_RD)


@contextmanager
def _operands_rounded_to_bf16() -> Iterator[None]:
    """For fp32 products on a CPU: bf16 operands, fp32 result."""
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


@contextmanager
def tensor_cores(tf32: bool) -> Iterator[None]:
    """Whether a GPU may round the operands of fp32 products to TF32 (10 bits): eight times as fast on an H100."""
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "tf32" if tf32 else before
    try:
        yield
    finally:
        setting.fp32_precision = before


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated, with what torch's allocator holds and nobody uses."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):  # with what the page cache would give back
            free = int(line.split()[1]) * 1024
    limit, used = (_lines(Path("/sys/fs/cgroup", name)) for name in ("memory.max", "memory.current"))
    if limit and used and limit[0].isdigit():  # of a container
        free = min(free, max(0, int(limit[0]) - int(used[0])))
    return free


def _lines(path: Path) -> list[str]:
    """Of a file of the system's that may not be there."""
    return path.read_text().splitlines() if path.is_file() else []
