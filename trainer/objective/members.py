"""The members of an objective: each kind of loss with what it learns, steps and stores itself, outside the engine.

Legend: b samples of this rank, D dimension, C classes.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.checkpoint import Checkpoint, in_rows
from trainer.config import Config
from trainer.distributed import Group
from trainer.errors import UserError
from trainer.head import Head, HeadOptimizer
from trainer.head.rows import Own
from trainer.losses.base import LossSpec
from trainer.losses.batch import BatchLoss
from trainer.losses.centres import Center
from trainer.losses.margins import Margin
from trainer.losses.triplets import PROJECTION
from trainer.objective.geometry import ClassCentres, LossGeometry
from trainer.objective.sharded import BatchLossModule, CentreModule, check_share

_APART = 0.3  # of a further centre of a class at the start, as a share of its length


class Member:
    """One loss of the weighted sum: `spec` as the config writes it, and the `module` that computes it on this rank."""

    module: nn.Module

    def __init__(self, spec: LossSpec, module: nn.Module) -> None:
        self.spec, self.module = spec, module

    def set_progress(self, step: int, warmup: float) -> None:
        """Where the run is, for losses that change with the steps."""

    def geometry(self) -> LossGeometry:
        """What the loss compares."""
        raise NotImplementedError

    def begin_at(self, means: Callable[[bool], Tensor]) -> None:
        """Before the first step: what stands for a class begins at the mean of its samples."""

    def prepare(self, lr: float) -> None:
        """Before the backward: the learning rate of the coming `step`, for what is stepped inside the backward."""

    def step(self, lr: float) -> None:
        """Update what the loss itself learns, after the backward, and forget its gradients."""
        raise NotImplementedError

    def metrics(self) -> dict[str, Tensor]:
        """Further numbers to report, still on the device."""
        return {}

    def memory(self) -> dict[str, int]:
        """Bytes that this rank holds after a step, by what they are for."""
        return {"class centres": sum(tensor.nbytes for tensor in self.module.state_dict().values())}

    def files(self) -> dict[str, dict[str, Tensor]]:
        """This rank's share of a checkpoint: tensors by name, by file."""
        raise NotImplementedError

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from `files` of any number of ranks."""
        raise NotImplementedError


def make_member(
    spec: LossSpec, config: Config, classes: int, counts: Sequence[int] | Tensor, device: torch.device
) -> Member:
    """The member that a loss of the config needs; a UserError where the problem's size or the batches forbid it."""
    if isinstance(spec, Margin):
        return HeadMember(spec, config, classes, counts, device)
    if isinstance(spec, Center):
        return CentreMember(spec, CentreModule(spec, classes, config.backbone.dimension, device=device))
    if isinstance(spec, BatchLoss):
        return BatchMember(spec, config, classes, counts, device)
    raise TypeError(f"{type(spec).__name__} is no loss of the config")


class HeadMember(Member):
    """A margin with its sharded head and the optimizer of its rows."""

    module: Head

    def __init__(
        self, spec: Margin, config: Config, classes: int, counts: Sequence[int] | Tensor, device: torch.device
    ) -> None:
        group = Group.current()
        check_share(classes, group)
        seed, dimension = config.run.torch_seed, config.backbone.dimension
        head = Head(spec, classes, dimension, config.head, seed=seed, class_counts=counts, device=device, group=group)
        super().__init__(spec, head)
        self._optimizer = HeadOptimizer(head)

    def set_progress(self, step: int, warmup: float) -> None:
        self.module.set_progress(step, warmup)

    @torch.no_grad()
    def begin_at(self, means: Callable[[bool], Tensor]) -> None:
        """Each row takes the direction of its class's mean and keeps its length. Of several centres the further ones
        stay a little apart: equal ones would never part. A class without a mean keeps its random row."""
        rows_RKD = self.module.weight.view(len(self.module.rows), self.module.centres, -1)
        length_RK1 = rows_RKD.float().norm(dim=2, keepdim=True)
        mean_R1D = functional.normalize(means(True)).to(rows_RKD.device)[:, None]
        apart_K1 = (torch.arange(self.module.centres, device=rows_RKD.device) > 0).float()[:, None] * _APART
        found_RKD = functional.normalize(mean_R1D + apart_K1 * rows_RKD, dim=2) * length_RK1
        rows_RKD.copy_(torch.where((mean_R1D != 0).any(dim=2, keepdim=True), found_RKD, rows_RKD))

    def prepare(self, lr: float) -> None:
        self._optimizer.prepare(lr)

    def step(self, lr: float) -> None:
        self._optimizer.step(lr)
        self._optimizer.zero_grad()

    def memory(self) -> dict[str, int]:
        head = self.module
        return super().memory() | {
            "their gradient": head.sink.gradient_RD.nbytes,
            "their state": sum(tensor.nbytes for tensor in self._optimizer.state_dict().values()),
            "P and products": head.workspace_bytes,
        }

    def geometry(self) -> LossGeometry:
        return LossGeometry(self.module.margin.on_directions, centres=self._centres)

    @torch.no_grad()
    def _centres(self, classes_c: Tensor) -> ClassCentres:
        """On every rank. A collective: one all-reduce of [c, K D + 1]."""
        head, margin = self.module, self.module.margin
        own = Own.of(classes_c.to(head.weight.device), head.rows)
        rows_cX = head.weight.view(len(head.rows), -1)[own.place_B].float()
        bias_c = rows_cX.new_zeros(len(rows_cX)) if head.bias is None else head.bias[own.place_B].float()
        mine_cX = torch.where(own.mask_B[:, None], torch.cat([rows_cX, bias_c[:, None]], dim=1), 0)
        message_cX = head.group.all_reduce(mine_cX)
        rows_cKD = message_cX[:, :-1].reshape(len(classes_c), head.centres, head.dimension)
        if margin.unit_rows:
            rows_cKD = functional.normalize(rows_cKD, dim=2)
        scale = float(margin.scale_of(dict(head.scalars))) if margin.unit_embedding else None
        rows, bias = (values.double().cpu().numpy() for values in (rows_cKD, message_cX[:, -1]))
        return ClassCentres(rows, bias, scale)

    def files(self) -> dict[str, dict[str, Tensor]]:
        """Files named by the classes whose rows they hold; the few numbers that all ranks share lie in each."""
        state = {f"head.{name}": tensor for name, tensor in self.module.state_dict().items()}
        state |= {f"optimizer.{name}": tensor for name, tensor in self._optimizer.state_dict().items()}
        return in_rows(self.spec.name, self.module.rows, state, _of_rows)

    def load(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.rows(self.spec.name, self.module.rows, _of_rows)
        self.module.load_state_dict(_under("head.", state))
        self._optimizer.load_state_dict(_under("optimizer.", state))


class CentreMember(Member):
    """Centres that follow their samples by the paper's rule; the learning rate has no say in it."""

    module: CentreModule

    def geometry(self) -> LossGeometry:
        return LossGeometry(self.spec.on_directions, followed=lambda c: self.module.of(c).double().cpu().numpy())

    def begin_at(self, means: Callable[[bool], Tensor]) -> None:
        state = self.module.state_dict() | {"centres": means(self.module.spec.unit)}
        self.module.load_state_dict(state)

    def step(self, lr: float) -> None:
        self.module.update()

    def files(self) -> dict[str, dict[str, Tensor]]:
        return in_rows(self.spec.name, self.module.rows, self.module.state_dict(), lambda key: True)

    def load(self, checkpoint: Checkpoint) -> None:
        self.module.load_state_dict(checkpoint.rows(self.spec.name, self.module.rows, lambda key: True))


class BatchMember(Member):
    """A loss on the pairs, triplets or identities of the global batch, and the optimizer of its few parameters.

    What it learns is the same on every rank, so one rank stores it.
    """

    module: BatchLossModule

    def __init__(
        self, spec: BatchLoss, config: Config, classes: int, counts: Sequence[int] | Tensor, device: torch.device
    ) -> None:
        if spec.needs_positives:
            _check_positives(spec.name, config, counts)
        module = BatchLossModule(spec, classes, config.backbone.dimension, seed=config.run.torch_seed, device=device)
        super().__init__(spec, module)
        self._optimizer = _optimizer(module, config) if len(module.values) else None
        self._state = {} if self._optimizer is None else self._optimizer.state

    def geometry(self) -> LossGeometry:
        return LossGeometry(self.spec.on_directions, dict(self.module.values).get(PROJECTION))

    def step(self, lr: float) -> None:
        if self._optimizer is None:
            return
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad()

    def metrics(self) -> dict[str, Tensor]:
        """How many steps of the run found nothing to learn from."""
        return {f"empty_steps/{self.spec.name}": self.module.empty_steps.clone()}

    def files(self) -> dict[str, dict[str, Tensor]]:
        if self.module.group.rank:
            return {}
        state = {f"loss.{name}": tensor for name, tensor in self.module.state_dict().items()}
        for name, parameter in self.module.named_parameters():
            state |= {f"optimizer.{name}.{key}": value for key, value in self._state[parameter].items()}
        return {f"{self.spec.name}.safetensors": state}

    def load(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.read(f"{self.spec.name}.safetensors")
        self.module.load_state_dict(_under("loss.", state))
        for name, parameter in self.module.named_parameters():
            self._state[parameter] = {
                key: value if key == "step" else value.to(parameter.device)
                for key, value in _under(f"optimizer.{name}.", state).items()
            }


def _of_rows(key: str) -> bool:
    """Whether a tensor of a head has rows for each class; the others are the same on every rank."""
    return key in ("head.weight", "head.bias") or key.startswith(("optimizer.rows.", "optimizer.classes."))


def _under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, without that beginning."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def read_projection(specs: Sequence[LossSpec], checkpoint: Checkpoint) -> Tensor | None:
    """The projection T that a checkpoint's losses learned, [n, D]; None where none of them learns one."""
    for spec in specs:
        if spec.learns_projection:
            return checkpoint.read(f"{spec.name}.safetensors")[f"loss.values.{PROJECTION}"]
    return None


def _check_positives(name: str, config: Config, class_counts: Sequence[int] | Tensor) -> None:
    """Refuse, with a UserError, a run whose batches never or too rarely hold two samples of one identity."""
    counts = torch.as_tensor(class_counts, dtype=torch.float64)
    data, total = config.data, int(counts.sum())
    if not (counts >= 2).any():
        raise UserError(f"{name} needs two samples of an identity, but every identity of the data set has only one")
    if data.identities_per_batch is not None:
        if data.batch_size // data.identities_per_batch < 2:
            raise UserError(
                f"{name} needs two samples of an identity in a batch, but data.identities_per_batch="
                f"{data.identities_per_batch} with data.batch_size={data.batch_size} gives one; lower the first"
            )
        return
    alike = float((counts * (counts - 1)).sum()) / max(1, total * (total - 1))
    pairs = alike * math.comb(min(data.batch_size, total), 2)
    if pairs < 1:
        raise UserError(
            f"{name} needs two samples of an identity in a batch, but a shuffled batch of {data.batch_size} has "
            f"{pairs:.2g} such pairs on average; set data.identities_per_batch"
        )


def _optimizer(module: BatchLossModule, config: Config) -> torch.optim.Optimizer:
    """Of the parameters that every rank holds: what `head.optimizer` says, in fp32."""
    parameters, settings = list(module.parameters()), config.head.optimizer
    lr, decay = config.optimizer.lr, settings.weight_decay  # each step brings its own rate
    if settings.name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, betas=(settings.momentum, settings.beta2), weight_decay=decay)
    return torch.optim.SGD(parameters, lr=lr, momentum=settings.momentum, weight_decay=decay)
