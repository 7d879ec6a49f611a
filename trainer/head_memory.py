"""Buffers of the head that live from step to step: asking the system for hundreds of megabytes anew in every step
costs as much as a tenth of a product."""

import os
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(slots=True)
class Workspace:
    """Keeps the buffer given back last, and hands it out again where it fits."""

    spare: Tensor | None = field(default=None)

    def take(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor; whoever takes it owns it until `give_back`."""
        spare, self.spare = self.spare, None
        size = shape[0] * shape[1]
        if spare is not None and spare.dtype == dtype and spare.device == device and spare.numel() >= size:
            return spare.view(-1)[:size].view(shape)
        return torch.empty(shape, dtype=dtype, device=device)

    def give_back(self, buffer: Tensor) -> None:
        self.spare = buffer if buffer._base is None else buffer._base


class BufferSink:
    """Writes the rows' gradient to `weight.grad`, and keeps its memory for the next step."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        self.buffer: Tensor | None = None

    def begin(self, device: torch.device, dtype: torch.dtype) -> bool:
        if self.weight.grad is not None:
            return True
        if self.buffer is None or self.buffer.dtype != self.weight.dtype or self.buffer.device != device:
            self.buffer = torch.empty_like(self.weight)
        self.weight.grad = self.buffer
        return False

    def tile(self, start: int, stop: int) -> Tensor:
        assert self.weight.grad is not None
        return self.weight.grad[start:stop]

    def finished(self, start: int, stop: int, gradient: Tensor) -> None:
        """Nothing is left to do: the tile is a part of `weight.grad`."""

    def end(self) -> None:
        """Every row was written."""


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
