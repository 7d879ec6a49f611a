"""What is minimised: the config's loss, and the auxiliary ones times their weights.

Each part maps the same embeddings and labels to a scalar that is equal on every rank, and steps its own parameters: the
class centres never enter the engine.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.checkpoint import Checkpoint
from trainer.config import Config
from trainer.distributed import Group
from trainer.errors import UserError
from trainer.head import Head
from trainer.head_optimizer import HeadOptimizer
from trainer.losses import LossSpec, Margin


class Objective:
    """The weighted sum of the losses of a config.

    Args:
        config: `loss` and `auxiliary` name the losses.
        classes: C.
        class_counts: training samples of each class, for losses that weigh by them.
        device: where this rank computes.

    Raises:
        UserError: a loss that this problem's size does not allow.
    """

    def __init__(self, config: Config, classes: int, class_counts: Sequence[int], device: torch.device) -> None:
        specs = (config.loss, *config.auxiliary)
        names = [spec.name for spec in specs]
        if doubled := {name for name in names if names.count(name) > 1}:
            raise UserError(f"the losses {sorted(doubled)} are named twice; name each loss once and set its weight")
        self._parts = {spec.name: _HeadPart(spec, config, classes, class_counts, device) for spec in specs}
        self._weights = {spec.name: spec.weight for spec in specs}

    def set_progress(self, step: int, warm: float) -> None:
        """Where the run is: the step, and how far the margin's warm-up has come, in [0, 1]."""
        for part in self._parts.values():
            part.set_progress(step, warm)

    def __call__(self, x_bD: Tensor, labels_b: Tensor, keys: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and by name its parts without their weights (where there is more than one)."""
        losses = {name: part(x_bD, labels_b, keys) for name, part in self._parts.items()}
        total = torch.stack([self._weights[name] * loss for name, loss in losses.items()]).sum()
        named = {"loss": total.detach()}
        if len(losses) > 1:
            named |= {f"loss/{name}": loss.detach() for name, loss in losses.items()}
        return total, named

    def step(self, lr: float) -> None:
        """Update every part's own parameters and forget their gradients."""
        for part in self._parts.values():
            part.step(lr)

    def files(self) -> dict[str, dict[str, Tensor]]:
        """This rank's share of a checkpoint: tensors by name, by file."""
        return {name: tensors for part in self._parts.values() for name, tensors in part.files().items()}

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint of the same number of ranks."""
        for part in self._parts.values():
            part.load(checkpoint)


class _HeadPart:
    """A margin with its sharded head and the optimizer of its rows."""

    def __init__(
        self, spec: LossSpec, config: Config, classes: int, class_counts: Sequence[int], device: torch.device
    ) -> None:
        assert isinstance(spec, Margin)
        group = Group.current()
        dimension = config.backbone.dimension
        if classes < group.size:
            raise UserError(
                f"{classes} classes cannot be shared by {group.size} workers; set scaling.workers to {classes} or less"
            )
        self._name = spec.name
        self._head = Head(spec, classes, dimension, config.head, config.run.seed, class_counts, device, group)
        self._optimizer = HeadOptimizer(self._head, config.optimizer)

    def set_progress(self, step: int, warm: float) -> None:
        self._head.set_progress(step, warm)

    def __call__(self, x_bD: Tensor, labels_b: Tensor, keys: Sequence[str]) -> Tensor:
        loss: Tensor = self._head(x_bD, labels_b, keys)
        return loss

    def step(self, lr: float) -> None:
        self._optimizer.step(lr)
        self._optimizer.zero_grad()

    def files(self) -> dict[str, dict[str, Tensor]]:
        """One file, named by the classes whose rows it holds; the few numbers that all ranks share lie in each."""
        state = {f"head.{name}": tensor for name, tensor in self._head.state_dict().items()}
        state |= {f"optimizer.{name}": tensor for name, tensor in self._optimizer.state_dict().items()}
        return {self._file(): state}

    def load(self, checkpoint: Checkpoint) -> None:
        parts: dict[str, dict[str, Tensor]] = {"head": {}, "optimizer": {}}
        for name, tensor in checkpoint.read(self._file()).items():
            owner, _, key = name.partition(".")
            parts[owner][key] = tensor
        self._head.load_state_dict(parts["head"])
        self._optimizer.load_state_dict(parts["optimizer"])

    def _file(self) -> str:
        rows = self._head.rows
        return f"{self._name}-rows-{rows.start:010d}-{rows.stop:010d}.safetensors"
