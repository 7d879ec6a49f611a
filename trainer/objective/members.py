"""The parts of an objective: a loss with what it learns, steps and stores of its own, outside the engine.

Legend: b samples of this rank, D dimension, C classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from trainer.checkpoint import Checkpoint
from trainer.config import Config, OptimizerConfig
from trainer.distributed import Group, RowRange
from trainer.errors import UserError
from trainer.head import Head
from trainer.head.optimizer import HeadOptimizer
from trainer.losses import LossSpec, Margin
from trainer.losses.batch import BatchLoss, BatchLossModule
from trainer.losses.centres import Center, CentreModule
from trainer.losses.pairs import Contrastive
from trainer.losses.projections import PROJECTION, ProjectedTriplet
from trainer.losses.ranges import Range


@dataclass(frozen=True)
class ClassCentres:
    """The centres of some classes as the loss uses them: a decision is the class with the greatest score.

    Attributes:
        rows_cKD: K centres a class, float32; unit vectors where the loss has unit centres.
        bias_c: 0 where there is none.
        scale: the length given to embeddings, or None where they enter as they are.
    """

    rows_cKD: Tensor
    bias_c: Tensor
    scale: float | None


class Part(Protocol):
    """One loss of the weighted sum.

    Attributes:
        unit: the loss compares embeddings as unit vectors.
    """

    unit: bool

    def set_progress(self, step: int, warm: float) -> None: ...

    def __call__(self, x_bD: Tensor, labels_b: Tensor, keys: Sequence[str]) -> Tensor:
        """The loss of the global batch, equal on every rank, with the exact gradient to this rank's samples."""
        ...

    def prepare(self, lr: float) -> None:
        """Before the backward: the learning rate of the coming `step`, for what is stepped inside the backward."""
        ...

    def step(self, lr: float) -> None:
        """Update what the loss itself learns, after the backward, and forget its gradients."""
        ...

    def metrics(self) -> dict[str, Tensor]:
        """Further numbers to report, still on the device."""
        ...

    def files(self) -> dict[str, dict[str, Tensor]]:
        """This rank's share of a checkpoint: tensors by name, by file."""
        ...

    def load(self, checkpoint: Checkpoint) -> None: ...


def make_part(spec: LossSpec, config: Config, classes: int, class_counts: Sequence[int], device: torch.device) -> Part:
    """The part that a loss of the config needs.

    Raises:
        UserError: a loss that this problem's size does not allow, or that finds no pairs in such batches.
    """
    if isinstance(spec, Margin):
        return HeadPart(spec, config, classes, class_counts, device)
    if isinstance(spec, Center):
        return CentrePart(spec, config, classes, device)
    if isinstance(spec, BatchLoss):
        return BatchPart(spec, config, classes, class_counts, device)
    raise TypeError(f"{type(spec).__name__} is no loss of the config")


class HeadPart:
    """A margin with its sharded head and the optimizer of its rows."""

    def __init__(
        self, spec: Margin, config: Config, classes: int, class_counts: Sequence[int], device: torch.device
    ) -> None:
        group = Group.current()
        dimension = config.backbone.dimension
        if classes < group.size:
            raise UserError(
                f"{classes} classes cannot be shared by {group.size} workers; set scaling.workers to {classes} or less"
            )
        self._name, self.unit = spec.name, spec.unit_embedding
        self._head = Head(spec, classes, dimension, config.head, config.run.seed, class_counts, device, group)
        self._optimizer = HeadOptimizer(self._head, config.optimizer)

    def set_progress(self, step: int, warm: float) -> None:
        self._head.set_progress(step, warm)

    def __call__(self, x_bD: Tensor, labels_b: Tensor, keys: Sequence[str]) -> Tensor:
        loss: Tensor = self._head(x_bD, labels_b, keys)
        return loss

    def prepare(self, lr: float) -> None:
        self._optimizer.prepare(lr)

    def step(self, lr: float) -> None:
        self._optimizer.step(lr)
        self._optimizer.zero_grad()

    def metrics(self) -> dict[str, Tensor]:
        return {}

    @torch.no_grad()
    def centres(self, classes_c: Tensor) -> ClassCentres:
        """The centres of these classes, on every rank. A collective: one all-reduce of [c, K D + 1]."""
        head, margin = self._head, self._head.margin
        classes_c = classes_c.to(head.weight.device)
        own_c = (classes_c >= head.rows.start) & (classes_c < head.rows.stop)
        place_c = (classes_c - head.rows.start).clamp(0, len(head.rows) - 1)
        bias_c = torch.zeros_like(place_c, dtype=torch.float32) if head.bias is None else head.bias[place_c].float()
        rows_cX = head.weight.view(len(head.rows), -1)[place_c].float()
        message_cX = torch.where(own_c[:, None], torch.cat([rows_cX, bias_c[:, None]], dim=1), 0)
        message_cX = head.group.all_reduce(message_cX)
        rows_cKD = message_cX[:, :-1].reshape(len(classes_c), head.centres, head.dimension)
        if margin.unit_rows:
            rows_cKD = functional.normalize(rows_cKD, dim=2)
        scale = float(margin.scale_of(dict(head.scalars))) if margin.unit_embedding else None
        return ClassCentres(rows_cKD, message_cX[:, -1], scale)

    def files(self) -> dict[str, dict[str, Tensor]]:
        """One file, named by the classes whose rows it holds; the few numbers that all ranks share lie in each."""
        state = {f"head.{name}": tensor for name, tensor in self._head.state_dict().items()}
        state |= {f"optimizer.{name}": tensor for name, tensor in self._optimizer.state_dict().items()}
        return {rows_file(self._name, self._head.rows): state}

    def load(self, checkpoint: Checkpoint) -> None:
        parts: dict[str, dict[str, Tensor]] = {"head": {}, "optimizer": {}}
        for name, tensor in checkpoint.read(rows_file(self._name, self._head.rows)).items():
            owner, _, key = name.partition(".")
            parts[owner][key] = tensor
        self._head.load_state_dict(parts["head"])
        self._optimizer.load_state_dict(parts["optimizer"])


class CentrePart:
    """Centres that follow their samples by the paper's rule; the learning rate has no say in it."""

    def __init__(self, spec: Center, config: Config, classes: int, device: torch.device) -> None:
        self._name, self.unit = spec.name, spec.unit
        self._module = CentreModule(spec, classes, config.backbone.dimension, device, Group.current())

    def centres(self, classes_c: Tensor) -> Tensor:
        """The centres of these classes, [c, D], on every rank. A collective."""
        return self._module.of(classes_c)

    def set_progress(self, step: int, warm: float) -> None:
        """The same at every step."""

    def __call__(self, x_bD: Tensor, labels_b: Tensor, keys: Sequence[str]) -> Tensor:
        loss: Tensor = self._module(x_bD, labels_b, keys)
        return loss

    def prepare(self, lr: float) -> None:
        """Nothing is stepped inside the backward."""

    def step(self, lr: float) -> None:
        self._module.update()

    def metrics(self) -> dict[str, Tensor]:
        return {}

    def files(self) -> dict[str, dict[str, Tensor]]:
        return {rows_file(self._name, self._module.rows): dict(self._module.state_dict())}

    def load(self, checkpoint: Checkpoint) -> None:
        self._module.load_state_dict(checkpoint.read(rows_file(self._name, self._module.rows)))


class BatchPart:
    """A loss on the pairs, triplets or identities of the global batch, and the optimizer of its few parameters.

    What it learns is the same on every rank, so one rank stores it.
    """

    def __init__(
        self, spec: BatchLoss, config: Config, classes: int, class_counts: Sequence[int], device: torch.device
    ) -> None:
        if spec.needs_positives:
            _check_positives(spec.name, config, class_counts)
        self._group, self._name = Group.current(), spec.name
        self.unit = spec.unit if isinstance(spec, Contrastive | Range) else True
        self._module = BatchLossModule(spec, classes, config.backbone.dimension, config.run.seed, device, self._group)
        self._optimizer = _optimizer(self._module, config.optimizer) if len(self._module.values) else None

    @property
    def projection(self) -> Tensor | None:
        """T, [n, D], of a loss that learns one."""
        return dict(self._module.values).get(PROJECTION)

    def set_progress(self, step: int, warm: float) -> None:
        """The same at every step."""

    def __call__(self, x_bD: Tensor, labels_b: Tensor, keys: Sequence[str]) -> Tensor:
        loss: Tensor = self._module(x_bD, labels_b, keys)
        return loss

    def prepare(self, lr: float) -> None:
        """Nothing is stepped inside the backward."""

    def step(self, lr: float) -> None:
        if self._optimizer is None:
            return
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad()

    def metrics(self) -> dict[str, Tensor]:
        """How many steps of the run found nothing to learn from."""
        return {f"empty_steps/{self._name}": self._module.empty_steps.clone()}

    def files(self) -> dict[str, dict[str, Tensor]]:
        if self._group.rank:
            return {}
        state = {f"loss.{name}": tensor for name, tensor in self._module.state_dict().items()}
        for name, parameter in self._module.named_parameters():
            assert self._optimizer is not None
            for key, value in self._optimizer.state[parameter].items():
                state[f"optimizer.{name}.{key}"] = value
        return {batch_file(self._name): state}

    def load(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.read(batch_file(self._name))
        self._module.load_state_dict(
            {name.removeprefix("loss."): value for name, value in state.items() if name.startswith("loss.")}
        )
        for name, parameter in self._module.named_parameters():
            prefix = f"optimizer.{name}."
            assert self._optimizer is not None
            self._optimizer.state[parameter] = {
                key.removeprefix(prefix): value if key.endswith(".step") else value.to(parameter.device)
                for key, value in state.items()
                if key.startswith(prefix)
            }


def rows_file(name: str, rows: RowRange) -> str:
    """A file named by the classes whose rows it holds, whoever wrote it."""
    return f"{name}-rows-{rows.start:010d}-{rows.stop:010d}.safetensors"


def batch_file(name: str) -> str:
    """A file of what every rank holds alike."""
    return f"{name}.safetensors"


def read_projection(specs: Sequence[LossSpec], checkpoint: Checkpoint) -> Tensor | None:
    """The projection T that a checkpoint's losses learned, [n, D]; None where none of them learns one."""
    for spec in specs:
        if isinstance(spec, ProjectedTriplet):
            return checkpoint.read(batch_file(spec.name))[f"loss.values.{PROJECTION}"]
    return None


def _check_positives(name: str, config: Config, class_counts: Sequence[int]) -> None:
    """Refuse a run whose batches hold no two samples of one identity.

    Raises:
        UserError: fewer than two samples an identity, in the data set or in a batch, or too rarely by chance.
    """
    data, total = config.data, sum(class_counts)
    if max(class_counts, default=0) < 2:
        raise UserError(f"{name} needs two samples of an identity, but every identity of the data set has only one")
    if data.identities_per_batch is not None:
        if data.batch_size // data.identities_per_batch < 2:
            raise UserError(
                f"{name} needs two samples of an identity in a batch, but data.identities_per_batch="
                f"{data.identities_per_batch} with data.batch_size={data.batch_size} gives one; lower the first"
            )
        return
    alike = sum(count * (count - 1) for count in class_counts) / max(1, total * (total - 1))
    pairs = alike * math.comb(min(data.batch_size, total), 2)
    if pairs < 1:
        raise UserError(
            f"{name} needs two samples of an identity in a batch, but a shuffled batch of {data.batch_size} has "
            f"{pairs:.2g} such pairs on average; set data.identities_per_batch"
        )


def _optimizer(module: BatchLossModule, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Of the parameters that every rank holds: what `optimizer.head_*` says, in fp32."""
    parameters, decay = list(module.parameters()), config.head_weight_decay
    if config.head_name == "adamw":
        betas = (config.head_momentum, config.head_beta2)
        return torch.optim.AdamW(parameters, lr=config.lr, betas=betas, weight_decay=decay)
    return torch.optim.SGD(parameters, lr=config.lr, momentum=config.head_momentum, weight_decay=decay)
