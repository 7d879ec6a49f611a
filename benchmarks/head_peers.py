"""How others compute the loss of `head_contenders`: what one writes with autograd, and the heads in common use.

Legend: as there; Dense and those made of it hold all of W on every rank and add up dW over the ranks.
"""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from benchmarks.head_contenders import MARGIN, SCALE, Base, Contender, Floor, Ours, Problem


class Dense(Base):
    """What one writes with autograd: normalise, multiply, put the margin on the target, cross entropy."""

    name = "dense"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.w_CD = problem.whole().detach().requires_grad_()
        self.x_bD = problem.x_bD.clone().requires_grad_()

    def _loss(self) -> Tensor:
        dtype, labels = self.problem.dtype, self.problem.labels_b
        x, w = functional.normalize(self.x_bD), functional.normalize(self.w_CD)
        cos = functional.linear(x.to(dtype), w.to(dtype)).float()
        target = cos.gather(1, labels[:, None]).clamp(-1 + 1e-7, 1 - 1e-7)
        logits = SCALE * cos.scatter(1, labels[:, None], torch.cos(torch.acos(target) + MARGIN))
        return functional.cross_entropy(logits, labels)

    def step(self) -> None:
        self.messages, self.bytes = 0, 0.0
        self._loss().backward()
        self._share(self.w_CD)
        self.dx_bD = self._scaled()

    def _share(self, weight: Tensor) -> None:
        size = self.problem.group.size
        if size > 1:
            assert weight.grad is not None
            dist.all_reduce(weight.grad)
            weight.grad.div_(size)
            self._sent(weight.grad, 2 * (size - 1) / size)

    def _scaled(self) -> Tensor | None:
        """The gradient of the global mean: each rank took the mean of its own b samples."""
        return None if self.x_bD.grad is None else self.x_bD.grad / self.problem.group.size

    def optimize(self) -> None:
        assert self.w_CD.grad is not None
        self._sgd(self.w_CD, self.w_CD.grad)

    def rows_gradient(self) -> Tensor | None:
        gradient = self.w_CD.grad
        start, count = self.problem.start, self.problem.rows_RD.shape[0]
        return None if gradient is None else gradient[start : start + count]

    def clear(self) -> None:
        super().clear()
        self.w_CD.grad = self.x_bD.grad = None


class Compiled(Dense):
    """The same through torch.compile."""

    name = "dense_compiled"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._eager, self._loss = self._loss, torch.compile(self._loss)  # type: ignore[method-assign]


class WithoutMargin(Dense):
    """A fused linear layer and cross entropy of others, on unit vectors: no margin, so their gradients differ."""

    def __init__(self, problem: Problem, name: str, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__(problem)
        self.name, self._of = name, loss

    def _loss(self) -> Tensor:
        x, w = functional.normalize(self.x_bD) * SCALE, functional.normalize(self.w_CD)
        return self._of(x.to(self.problem.dtype), w.to(self.problem.dtype), self.problem.labels_b)

    def rows_gradient(self) -> Tensor | None:
        return None


def cut_cross_entropy(problem: Problem) -> Contender:
    from cut_cross_entropy import linear_cross_entropy

    return WithoutMargin(problem, "cut_cross_entropy", lambda x, w, labels: linear_cross_entropy(x, w, labels))


def cut_cross_entropy_exact(problem: Problem) -> Contender:
    """Without its filter, which leaves out every gradient below 2^-12: at the start of training all negatives'."""
    from cut_cross_entropy import linear_cross_entropy

    def loss(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        found: Tensor = linear_cross_entropy(x, w, labels, filter_eps=None)
        return found

    return WithoutMargin(problem, "cut_cross_entropy_exact", loss)


def liger(problem: Problem) -> Contender:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    kernel = LigerFusedLinearCrossEntropyLoss()
    return WithoutMargin(problem, "liger", lambda x, w, labels: kernel(w, x, labels))


class MetricLearning(Dense):
    """pytorch-metric-learning's ArcFaceLoss."""

    name = "pml"

    def __init__(self, problem: Problem) -> None:
        from pytorch_metric_learning.losses import ArcFaceLoss

        Base.__init__(self, problem)
        D = problem.x_bD.shape[1]
        self.loss = ArcFaceLoss(2, D, margin=math.degrees(MARGIN), scale=SCALE).to(problem.x_bD.device)
        self.loss.num_classes = problem.classes
        self.loss.W = torch.nn.Parameter(problem.whole().t().contiguous())
        self.x_bD = problem.x_bD.clone().requires_grad_()

    def step(self) -> None:
        self.messages, self.bytes = 0, 0.0
        narrow = self.problem.dtype != torch.float32
        with torch.autocast(self.x_bD.device.type, self.problem.dtype, enabled=narrow):
            loss = self.loss(self.x_bD, self.problem.labels_b)
        loss.backward()
        self._share(self.loss.W)
        self.dx_bD = self._scaled()

    def optimize(self) -> None:
        assert self.loss.W.grad is not None
        self._sgd(self.loss.W, self.loss.W.grad)

    def rows_gradient(self) -> Tensor | None:
        gradient = self.loss.W.grad
        start, count = self.problem.start, self.problem.rows_RD.shape[0]
        return None if gradient is None else gradient[:, start : start + count].t()

    def clear(self) -> None:
        Base.clear(self)
        self.loss.W.grad = self.x_bD.grad = None


class InsightfaceOps(Base):
    """The dense sequence of the sharded head in common use: angles of all logits, the margin without gradient, three
    all-reduces in the forward, a reduce for each rank in the backward."""

    name = "insightface_ops"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.w_RD = problem.rows_RD.detach().requires_grad_()
        self.x_bD = problem.x_bD

    def _all_gather(self, local: Tensor) -> Tensor:
        size = self.problem.group.size
        if size == 1:
            return local.clone()
        parts = [torch.empty_like(local) for _ in range(size)]
        dist.all_gather(parts, local)
        self._sent(local, size - 1)
        return torch.cat(parts)

    def _all_reduce(self, values: Tensor, operation: "dist.ReduceOp.RedOpType") -> None:
        size = self.problem.group.size
        if size > 1:
            dist.all_reduce(values, operation)
            self._sent(values, 2 * (size - 1) / size)

    def step(self) -> None:
        self.messages, self.bytes = 0, 0.0
        problem, size = self.problem, self.problem.group.size
        x_BD = self._all_gather(self.x_bD).requires_grad_()
        labels_B = self._all_gather(problem.labels_b) - problem.start
        own_B = (labels_B >= 0) & (labels_B < self.w_RD.shape[0])
        row, label = own_B.nonzero()[:, 0], labels_B[own_B]
        x_unit, w_unit = functional.normalize(x_BD), functional.normalize(self.w_RD)
        cos_BR = functional.linear(x_unit.to(problem.dtype), w_unit.to(problem.dtype)).float().clamp(-1, 1)
        logits_BR = self._with_margin(cos_BR, row, label)
        gradient_BR = self._softmax_gradient(logits_BR.detach(), row, label)
        logits_BR.backward(gradient_BR)
        assert x_BD.grad is not None
        b = self.x_bD.shape[0]
        parts = x_BD.grad.split(b)
        if size > 1:
            for rank, part in enumerate(parts):
                dist.reduce(part, rank)
                self._sent(part, 1)
        self.dx_bD = parts[problem.group.rank]

    def _with_margin(self, cos_BR: Tensor, row: Tensor, label: Tensor) -> Tensor:
        with torch.no_grad():
            target = cos_BR[row, label].arccos()
            cos_BR.arccos_()
            cos_BR[row, label] = target + MARGIN
            cos_BR.cos_()
        return cos_BR * SCALE

    def _softmax_gradient(self, logits_BR: Tensor, row: Tensor, label: Tensor) -> Tensor:
        largest = logits_BR.amax(1, keepdim=True)
        self._all_reduce(largest, dist.ReduceOp.MAX)
        logits_BR.sub_(largest).exp_()
        total = logits_BR.sum(1, keepdim=True)
        self._all_reduce(total, dist.ReduceOp.SUM)
        logits_BR.div_(total)
        loss = logits_BR.new_zeros(logits_BR.shape[0], 1)
        loss[row] = logits_BR[row].gather(1, label[:, None])
        self._all_reduce(loss, dist.ReduceOp.SUM)
        loss.clamp_min_(1e-30).log_().mean().mul_(-1)
        one_hot = logits_BR.new_zeros(row.shape[0], logits_BR.shape[1]).scatter_(1, label[:, None], 1)
        logits_BR[row] -= one_hot
        return logits_BR.div_(logits_BR.shape[0])

    def optimize(self) -> None:
        assert self.w_RD.grad is not None
        self._sgd(self.w_RD, self.w_RD.grad)

    def rows_gradient(self) -> Tensor | None:
        return self.w_RD.grad

    def clear(self) -> None:
        super().clear()
        self.w_RD.grad = None


class Insightface(Base):
    """Its own file, unchanged, where a user has it; it asks for CUDA and a process group."""

    name = "insightface"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        assert problem.insightface is not None
        if not dist.is_initialized():
            dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
        head = _module(problem.insightface / "partial_fc_v2.py")
        margin = _module(problem.insightface / "losses.py").ArcFace(SCALE, MARGIN)
        narrow = problem.dtype != torch.float32
        self.loss = head.PartialFC_V2(margin, problem.x_bD.shape[1], problem.group.size, 1.0, narrow)
        self.loss.num_local, self.loss.class_start = problem.rows_RD.shape[0], problem.start
        self.loss.weight = torch.nn.Parameter(problem.rows_RD.detach())
        self.x_bD = problem.x_bD.clone().requires_grad_()

    def step(self) -> None:
        self.loss(self.x_bD, self.problem.labels_b.clone()).backward()
        self.dx_bD = None if self.x_bD.grad is None else self.x_bD.grad / self.problem.group.size

    def optimize(self) -> None:
        self._sgd(self.loss.weight, self.loss.weight.grad)

    def rows_gradient(self) -> Tensor | None:
        gradient: Tensor | None = self.loss.weight.grad
        return gradient

    def clear(self) -> None:
        super().clear()
        self.loss.weight.grad = self.x_bD.grad = None


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# name -> how to make it, and what must be installed for it
MAKERS: dict[str, tuple[Callable[[Problem], Contender], str | None]] = {
    "floor": (Floor, None),
    "store": (lambda problem: Ours(problem, "store"), None),
    "recompute": (lambda problem: Ours(problem, "recompute"), None),
    "store_torch": (lambda problem: Ours(problem, "store", kernels="torch"), None),
    "dense": (Dense, None),
    "dense_compiled": (Compiled, None),
    "pml": (MetricLearning, "pytorch_metric_learning"),
    "insightface_ops": (InsightfaceOps, None),
    "insightface": (Insightface, None),
    "cut_cross_entropy": (cut_cross_entropy, "cut_cross_entropy"),
    "cut_cross_entropy_exact": (cut_cross_entropy_exact, "cut_cross_entropy"),
    "liger": (liger, "liger_kernel"),
}


def contenders(problem: Problem, only: list[str]) -> tuple[list[Contender], list[str]]:
    """The contenders asked for, and the names of those that are not installed."""
    missing = [name for name in only if (needs := MAKERS[name][1]) and not importlib.util.find_spec(needs)]
    return [MAKERS[name][0](problem) for name in only if name not in missing], missing
