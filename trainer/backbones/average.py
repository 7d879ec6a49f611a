"""The exponential moving average of a network's weights and running statistics."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainer.distributed import Group, average

COUNT = "count"


class Average:
    """average <- d average + (1 - d) value after each step, with d = min(decay, (1 + n) / (10 + n)) after n steps, so
    that the first, random weights are forgotten soon. On the device, in fp32; equal on every rank but for the
    statistics' buffers, which are averaged over the ranks when they are used (the rule is linear).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay, self.count = decay, 0
        tensors = (*module.named_parameters(), *module.named_buffers())
        self._live = {name: tensor for name, tensor in tensors if tensor.is_floating_point()}
        self._buffers = [name for name, _ in module.named_buffers() if name in self._live]
        self._own = {name: tensor.detach().float().clone() for name, tensor in self._live.items()}

    @property
    def nbytes(self) -> int:
        return sum(own.nbytes for own in self._own.values())

    @torch.no_grad()
    def update(self) -> None:
        """Take in the values after a step."""
        decay = min(self._decay, (1 + self.count) / (10 + self.count))
        self.count += 1
        torch._foreach_lerp_(list(self._own.values()), [live.detach() for live in self._live.values()], 1 - decay)

    def state(self, group: Group) -> dict[str, Tensor]:
        """By name, and how many steps were taken in. A collective."""
        average([self._own[name] for name in self._buffers], group)
        return self._own | {COUNT: torch.tensor(self.count)}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`; from nothing: begin with the network's values as they are now."""
        self.count = int(state.get(COUNT, 0))
        for name, own in self._own.items():
            own.copy_(state.get(name, self._live[name]))

    @contextmanager
    def in_place(self, group: Group) -> Iterator[None]:
        """While the block runs, the network has the average in place of its own values. A collective."""
        self.state(group)
        kept = {name: live.detach().clone() for name, live in self._live.items()}
        self._put(self._own)
        try:
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, live in self._live.items():
            live.copy_(values[name])
