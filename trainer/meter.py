"""How fast a training goes, and how much memory it takes."""

import resource
import time

import torch


class Meter:
    """Samples a second since it was last read, and memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.restart()

    def restart(self) -> None:
        """Leave out what is not training, such as an evaluation."""
        self.samples, self._since = 0, time.perf_counter()

    def read(self) -> dict[str, float]:
        values = {"samples_per_s": self.samples / max(1e-9, time.perf_counter() - self._since)}
        values["memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self.restart()
        if self._device.type == "cuda":
            values["gpu_memory_mb"] = torch.cuda.max_memory_allocated(self._device) / 2**20
        return values
