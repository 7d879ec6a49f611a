"""Buffers of the head that live from step to step.

Asking the system for hundreds of megabytes anew in every step costs as much as a tenth of a product.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor


@dataclass(slots=True)
class Workspace:
    """Keeps the buffer given back last, and hands it out again where it fits; and small ones by name."""

    spare: Tensor | None = None
    scratches: dict[str, Tensor] = field(default_factory=dict)

    def take(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor; whoever takes it owns it until `give_back`."""
        spare, self.spare = self.spare, None
        size = shape[0] * shape[1]
        if spare is not None and spare.dtype == dtype and spare.device == device and spare.numel() >= size:
            return spare.view(-1)[:size].view(shape)
        return torch.empty(shape, dtype=dtype, device=device)

    def give_back(self, buffer: Tensor) -> None:
        self.spare = buffer if buffer._base is None else buffer._base

    def scratch(self, name: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised [rows, columns], valid until the next request for this name."""
        found = self.scratches.get(name)
        if found is None or found.numel() < rows * columns or found.dtype != dtype or found.device != device:
            found = self.scratches[name] = torch.empty(rows * columns, dtype=dtype, device=device)
        return found[: rows * columns].view(rows, columns)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
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
