"""What is minimised: the config's loss, and the auxiliary ones times their weights.

Each member maps the same embeddings and labels to a scalar that is equal on every rank, and steps its own parameters:
the class centres never enter the engine.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from trainer.checkpoint import Checkpoint
from trainer.config import Config
from trainer.errors import UserError
from trainer.losses.base import LossSpec
from trainer.objective.geometry import LossGeometry
from trainer.objective.members import make_member, read_projection


class Objective:
    """The weighted sum of the losses of a config.

    Args:
        config: `loss` and `auxiliary` name the losses.
        classes: C.
        class_counts: training samples of each class, for losses that weigh by them.

    Raises:
        UserError: a loss that this problem's size does not allow, or losses that make no sense together.
    """

    def __init__(
        self, config: Config, classes: int, class_counts: Sequence[int] | Tensor, device: torch.device
    ) -> None:
        specs = (config.loss, *config.auxiliary)
        _check_together(specs)
        self._members = {spec.name: make_member(spec, config, classes, class_counts, device) for spec in specs}
        self._told: dict[str, float] = {}

    def set_progress(self, step: int, warmup: float) -> None:
        """Where the run is: the step, and how far the margin's warmup has come, in [0, 1]."""
        for member in self._members.values():
            member.set_progress(step, warmup)

    def __call__(self, x_bD: Tensor, labels_b: Tensor, keys: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and by name its parts without their weights (where there is more than one) and their
        further numbers."""
        losses = {name: member.module(x_bD, labels_b, keys) for name, member in self._members.items()}
        total = torch.stack([self._members[name].spec.weight * loss for name, loss in losses.items()]).sum()
        named = {"loss": total.detach()}
        if len(losses) > 1:
            named |= {f"loss/{name}": loss.detach() for name, loss in losses.items()}
        for member in self._members.values():
            named |= member.metrics()
        return total, named

    def notes(self, values: Mapping[str, float]) -> list[str]:
        """What a user should read of reported numbers: losses that found nothing to learn from in some steps, told when
        it first happens, and again whenever it has happened twice as often."""
        notes = []
        for key, count in values.items():
            if key.startswith("empty_steps/") and count >= max(1, 2 * self._told.get(key, 0)):
                self._told[key] = count
                notes.append(
                    f"{key.removeprefix('empty_steps/')} lacked a kind of pair or triplet in {count:.0f} step(s) so "
                    "far: see its mining, data.identities_per_batch and data.batch_size"
                )
        return notes

    def geometry(self) -> LossGeometry:
        """What all the losses together compare."""
        return reduce(operator.or_, (member.geometry() for member in self._members.values()))

    def begin_at(self, means: Callable[[bool], Tensor]) -> None:
        """Let class centres begin at the means of their classes. A collective, if `means` is one.

        Args:
            means: of the classes of this rank, [R, D]; of unit vectors where it is given True.
        """
        for member in self._members.values():
            member.begin_at(means)

    def prepare(self, lr: float) -> None:
        """The learning rate of the coming `step`: before each backward, since `head.fused` steps the centres in it."""
        for member in self._members.values():
            member.prepare(lr)

    def step(self, lr: float) -> None:
        """Update every part's own parameters and forget their gradients."""
        for member in self._members.values():
            member.step(lr)

    def memory(self) -> dict[str, int]:
        """Bytes that this rank holds after a step, by what they are for."""
        parts = [member.memory() for member in self._members.values()]
        return {name: sum(one.get(name, 0) for one in parts) for part in parts for name in part}

    def buffers(self) -> list[Tensor]:
        """What the losses keep beside what they learn, such as running means, and change in the forward."""
        return [buffer for member in self._members.values() for buffer in member.module.buffers()]

    def files(self) -> dict[str, dict[str, Tensor]]:
        """This rank's share of a checkpoint: tensors by name, by file."""
        return {name: tensors for member in self._members.values() for name, tensors in member.files().items()}

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint of any number of ranks."""
        for member in self._members.values():
            member.load(checkpoint)


def embedder_of(config: Config, checkpoint: Checkpoint, backbone: nn.Module) -> nn.Module:
    """As `LossGeometry.embedder`, of the config and weights of a checkpoint alone: what is to be exported."""
    projection_nD = read_projection((config.loss, *config.auxiliary), checkpoint)
    return LossGeometry(projection_nD=projection_nD).embedder(backbone)


def _check_together(specs: Sequence[LossSpec]) -> None:
    """Refuse, with a UserError, a loss named twice, two projections, or nothing that trains the network."""
    names = [spec.name for spec in specs]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise UserError(f"the losses {sorted(doubled)} are named twice; name each loss once and set its weight")
    if len(learners := [spec.name for spec in specs if spec.learns_projection]) > 1:
        raise UserError(f"{' and '.join(learners)} each learn a projection, but an embedder has one; name one of them")
    if not any(spec.trains_backbone for spec in specs):
        name = specs[0].name
        raise UserError(
            f"loss={name} with loss.frozen=true learns a projection alone, so that no loss trains the network; "
            f"name one that does as loss, such as softmax, and put {name} under auxiliary, or set loss.frozen=false"
        )
