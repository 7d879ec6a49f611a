"""A backbone's gradients in one buffer: averaged over the ranks by one message, and used where they lie."""

from collections.abc import Iterable

import torch
from torch import nn

from trainer.distributed import Group


class Gradients:
    """In place of DeepSpeed's average, which makes the buffer anew in every step and copies it back.

    Args:
        parameters: those that learn are taken; all fp32.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], group: Group) -> None:
        self._group = group
        self._parameters = [one for one in parameters if one.requires_grad and one.numel()]
        sizes = [one.numel() for one in self._parameters]
        self._flat = torch.zeros(sum(sizes), device=self._parameters[0].device)
        # Laid out as the parameters are, so that the optimizer walks over both alike.
        self._views = [
            part.as_strided(one.shape, one.stride())
            for part, one in zip(torch.split(self._flat, sizes), self._parameters, strict=True)
        ]

    @torch.no_grad()
    def average(self) -> None:
        """Give each parameter the mean of its gradient over the ranks; none counts as zeros. A collective."""
        own = [torch.zeros_like(one) if one.grad is None else one.grad for one in self._parameters]
        torch._foreach_copy_(self._views, own)
        self._group.all_reduce(self._flat, in_place=True)
        self._flat.mul_(1 / self._group.size)
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view
