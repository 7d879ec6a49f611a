"""The optimizer of the head: it steps this rank's rows of the class centres, and the few numbers beside them.

Legend: R rows of this rank, D dimension. It never sends anything: each rank holds whole rows, and the gradient of
replicated scalars is already summed.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from trainer.config import OptimizerConfig
from trainer.head import Head

BLOCK = 1024  # rows stepped at once; whole multiples of it in the numbering of all rows of all ranks


class HeadOptimizer:
    """SGD with momentum for a `Head`; `step(lr)` after the backward, then `zero_grad()`.

    Rows that are unit vectors stay so. With G the gradient, w a row and v its momentum:
        v <- mu v + G;  v <- v - (v.w) w  (tangent to the sphere: old momentum and new gradient in one projection)
        w <- (w - lr v) / |w - lr v|
    Weight decay only shortens a row, which the projection undoes, so it is left out there; other rows and the bias
    get the usual G + decay w.
    """

    def __init__(self, head: Head, config: OptimizerConfig) -> None:
        self.head, self.config = head, config
        self.momentum_RD = torch.zeros_like(head.weight, memory_format=torch.contiguous_format, requires_grad=False)
        self.small = [parameter for parameter in head.parameters() if parameter is not head.weight]
        self.small_momentum = [torch.zeros_like(parameter) for parameter in self.small]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One step with the learning rate `lr`; does nothing to parameters without a gradient."""
        weight, gradient = self.head.weight, self.head.weight.grad
        if gradient is not None:
            for rows in self._blocks():
                self._step_rows(weight[rows], self.momentum_RD[rows], gradient[rows], lr)
        for parameter, momentum in zip(self.small, self.small_momentum, strict=True):
            if parameter.grad is not None:
                momentum.mul_(self.config.head_momentum).add_(parameter.grad)
                parameter.sub_(momentum, alpha=lr)

    def zero_grad(self) -> None:
        """Forget the gradients; their memory is used again in the next backward."""
        for parameter in self.head.parameters():
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors: `momentum` by rows as `head.weight`, `small.N` of the parameters beside it."""
        return {"momentum": self.momentum_RD} | {f"small.{i}": m for i, m in enumerate(self.small_momentum)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.momentum_RD.copy_(state["momentum"])
        for number, momentum in enumerate(self.small_momentum):
            momentum.copy_(state[f"small.{number}"])

    def _blocks(self) -> Iterator[slice]:
        count = self.head.weight.shape[0]
        for start in range(0, count, BLOCK):
            yield slice(start, min(start + BLOCK, count))

    def _step_rows(self, w_RD: Tensor, v_RD: Tensor, gradient_RD: Tensor, lr: float) -> None:
        if not self.head.unit_rows:
            gradient_RD = gradient_RD.add(w_RD, alpha=self.config.head_weight_decay)
        v_RD.mul_(self.config.head_momentum).add_(gradient_RD)
        if self.head.unit_rows:
            v_RD.sub_(w_RD * (v_RD * w_RD).sum(dim=1, keepdim=True))
        w_RD.sub_(v_RD, alpha=lr)
        if self.head.unit_rows:
            w_RD.div_(w_RD.norm(dim=1, keepdim=True))
