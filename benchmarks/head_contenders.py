"""What the contenders of `benchmarks/head.py` share, the bare matrix products, and the head of this project.

All compute the same ArcFace loss, s = 64, m = 0.5, and its gradients; those of others are in `head_peers`.

Legend: b samples of this rank, B of all ranks, C classes, R rows of this rank, D dimension. The sharded ways (floor,
store, recompute, insightface_ops) hold R = C / ranks rows; the others hold all of W and add up dW over the ranks.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from trainer.distributed import Gatherer, Group, RowRange
from trainer.head import Head
from trainer.head.optimizer import HeadOptimizer
from trainer.head.settings import HeadConfig, HeadOptimizerConfig
from trainer.losses import ArcFace

SCALE, MARGIN, MOMENTUM, LEARNING_RATE = 64.0, 0.5, 0.9, 1e-4


@dataclass
class Problem:
    """Attributes: x_bD, labels_b of this rank; rows_RD: this rank's unit rows, shared by all contenders; insightface:
    folder of its `partial_fc_v2.py`, where somebody has it."""

    x_bD: Tensor
    labels_b: Tensor
    rows_RD: Tensor
    classes: int
    dtype: torch.dtype
    group: Group
    insightface: Path | None = None

    @property
    def start(self) -> int:
        return self.group.rank * (self.classes // self.group.size)

    def whole(self) -> Tensor:
        """All rows, for the ways that do not shard."""
        if self.group.size == 1:
            return self.rows_RD
        return self.group.all_gather(self.rows_RD)


class Contender(Protocol):
    """One way to compute a step. `traffic` counts what it sends."""

    name: str
    dx_bD: Tensor | None
    messages: int
    bytes: float

    def step(self) -> None:
        """Forward and backward."""

    def optimize(self) -> None:
        """Update the rows: SGD with momentum."""

    def rows_gradient(self) -> Tensor | None:
        """dW of this rank's rows, [R, D]; without its part along the rows."""

    def clear(self) -> None:
        """Forget the gradients."""


class Base:
    name = ""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.dx_bD: Tensor | None = None
        self.messages, self.bytes = 0, 0.0
        self.momentum: Tensor | None = None

    def _sgd(self, weight: Tensor, gradient: Tensor) -> None:
        if self.momentum is None:
            self.momentum = torch.zeros_like(weight)
        self.momentum.mul_(MOMENTUM).add_(gradient)
        weight.detach().sub_(self.momentum, alpha=LEARNING_RATE)

    def _sent(self, tensor: Tensor, share: float) -> None:
        if self.problem.group.size > 1:
            self.messages += 1
            self.bytes += share * tensor.numel() * tensor.element_size()

    def clear(self) -> None:
        self.dx_bD = None


class Floor(Base):
    """The three matrix products alone, into memory that is already there."""

    def __init__(self, problem: Problem, name: str = "floor") -> None:
        super().__init__(problem)
        self.name = name
        size, dtype = problem.group.size, problem.dtype
        self.x_BD = functional.normalize(problem.x_bD).repeat(size, 1).to(dtype)
        self.w_RD = problem.rows_RD.to(dtype)
        self.z_BR: Tensor | None = None
        self.dw_RD: Tensor | None = None

    def step(self) -> None:
        if self.z_BR is None or self.dw_RD is None:
            self.z_BR = self.x_BD.new_empty(self.x_BD.shape[0], self.w_RD.shape[0])
            self.dw_RD = torch.empty_like(self.w_RD)
        torch.mm(self.x_BD, self.w_RD.t(), out=self.z_BR)
        torch.mm(self.z_BR, self.w_RD)
        torch.mm(self.z_BR.t(), self.x_BD, out=self.dw_RD)

    def optimize(self) -> None:
        assert self.dw_RD is not None
        self._sgd(self.problem.rows_RD, self.dw_RD)

    def rows_gradient(self) -> Tensor | None:
        return None


class Ours(Base):
    """The head of this project."""

    def __init__(self, problem: Problem, algorithm: str, fused: bool = False, kernels: str = "auto") -> None:
        super().__init__(problem)
        self.name = algorithm if kernels == "auto" else f"{algorithm}_{kernels}"
        kind = "bf16" if problem.dtype == torch.bfloat16 else "fp32"
        settings = HeadOptimizerConfig(momentum=MOMENTUM)
        config = HeadConfig(algorithm=algorithm, compute_dtype=kind, fused=fused, kernels=kernels, optimizer=settings)  # type: ignore[arg-type]
        D, device = problem.x_bD.shape[1], problem.x_bD.device
        self.head = Head(ArcFace(scale=SCALE, margin=MARGIN), problem.group.size * 2, D, config, device=device)
        self._adopt(problem)
        self.optimizer: HeadOptimizer | None = None
        self.x_bD = problem.x_bD.clone().requires_grad_()

    def _adopt(self, problem: Problem) -> None:
        """Use the rows that all contenders share instead of rows of its own."""
        head, group = self.head, problem.group
        head.classes, head.rows = problem.classes, RowRange.of(problem.classes, group.rank, group.size)
        head._gather = Gatherer(problem.classes, head.dimension, head.group, "head")
        head.weight.data = problem.rows_RD

    def step(self) -> None:
        if self.head.config.fused:
            self._made().prepare(LEARNING_RATE)
        traffic = self.head.group.traffic
        traffic.reset()
        self.head(self.x_bD, self.problem.labels_b).backward()
        self.messages, self.bytes = traffic.calls, traffic.bytes
        self.dx_bD = self.x_bD.grad

    def optimize(self) -> None:
        self._made().step(LEARNING_RATE)

    def _made(self) -> HeadOptimizer:
        if self.optimizer is None:
            self.optimizer = HeadOptimizer(self.head)
        return self.optimizer

    def rows_gradient(self) -> Tensor | None:
        gradient, w = self.head.weight.grad, self.head.weight.detach()
        return None if gradient is None else gradient - w * (gradient * w).sum(1, keepdim=True)

    def clear(self) -> None:
        super().clear()
        self.head.weight.grad = self.x_bD.grad = None
