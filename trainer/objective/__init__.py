"""What is minimised: the config's loss, and the auxiliary ones times their weights.

Each part maps the same embeddings and labels to a scalar that is equal on every rank, and steps its own parameters: the
class centres never enter the engine.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from trainer.checkpoint import Checkpoint
from trainer.config import Config
from trainer.errors import UserError
from trainer.losses.base import LossSpec
from trainer.losses.projections import Projected, ProjectedTriplet
from trainer.objective.members import BatchPart, CentrePart, ClassCentres, HeadPart, make_part, read_projection


class Objective:
    """The weighted sum of the losses of a config.

    Args:
        config: `loss` and `auxiliary` name the losses.
        classes: C.
        class_counts: training samples of each class, for losses that weigh by them.
        device: where this rank computes.

    Raises:
        UserError: a loss that this problem's size does not allow, or losses that make no sense together.
    """

    def __init__(self, config: Config, classes: int, class_counts: Sequence[int], device: torch.device) -> None:
        specs = (config.loss, *config.auxiliary)
        _check_together(specs)
        self._parts = {spec.name: make_part(spec, config, classes, class_counts, device) for spec in specs}
        self._weights = {spec.name: spec.weight for spec in specs}
        self._told: dict[str, float] = {}

    def set_progress(self, step: int, warm: float) -> None:
        """Where the run is: the step, and how far the margin's warm-up has come, in [0, 1]."""
        for part in self._parts.values():
            part.set_progress(step, warm)

    def __call__(self, x_bD: Tensor, labels_b: Tensor, keys: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and by name its parts without their weights (where there is more than one) and their
        further numbers."""
        losses = {name: part(x_bD, labels_b, keys) for name, part in self._parts.items()}
        total = torch.stack([self._weights[name] * loss for name, loss in losses.items()]).sum()
        named = {"loss": total.detach()}
        if len(losses) > 1:
            named |= {f"loss/{name}": loss.detach() for name, loss in losses.items()}
        for part in self._parts.values():
            named |= part.metrics()
        return total, named

    def notes(self, values: Mapping[str, float]) -> list[str]:
        """What a user should read of reported numbers: losses that found nothing to learn from in some steps.

        Each is told when it first happens, and again whenever it has happened twice as often.
        """
        notes = []
        for key, count in values.items():
            if key.startswith("empty_steps/") and count >= max(1, 2 * self._told.get(key, 0)):
                self._told[key] = count
                notes.append(
                    f"{key.removeprefix('empty_steps/')} lacked a kind of pair or triplet in {count:.0f} step(s) so "
                    "far: see its selection, data.identities_per_batch and data.batch_size"
                )
        return notes

    def embedder(self, backbone: nn.Module) -> nn.Module:
        """What is evaluated: the backbone, followed by the projection of a loss that learns one."""
        for part in self._parts.values():
            if isinstance(part, BatchPart) and part.projection is not None:
                return Projected(backbone, part.projection)
        return backbone

    def compared(self, backbone: nn.Module) -> tuple[nn.Module, bool]:
        """The embeddings whose geometry the losses shape, and whether it is that of their directions alone.

        Where a loss has class centres they are the backbone's, which those are compared with (`ClassCentres.scale`
        gives the length). Else a learned projection's, T x/|x|, whose lengths count; else the backbone's, as unit
        vectors where the config's first loss takes such.
        """
        if any(isinstance(part, HeadPart) for part in self._parts.values()):
            return backbone, False
        embedder = self.embedder(backbone)
        return embedder, embedder is backbone and next(iter(self._parts.values())).unit

    def centres(self, classes_c: Tensor) -> ClassCentres | None:
        """The class centres of these classes, on every rank; None where no loss of the config is a margin.

        A collective; every rank asks for the same classes.
        """
        for part in self._parts.values():
            if isinstance(part, HeadPart):
                return part.centres(classes_c)
        return None

    def learned_centres(self, classes_c: Tensor) -> Tensor | None:
        """The centres that a centre loss of the config lets follow these classes, [c, D]; None where there is none.

        A collective; every rank asks for the same classes.
        """
        for part in self._parts.values():
            if isinstance(part, CentrePart):
                return part.centres(classes_c)
        return None

    def prepare(self, lr: float) -> None:
        """The learning rate of the coming `step`: before each backward, since `head.fused` steps the centres in it."""
        for part in self._parts.values():
            part.prepare(lr)

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


def embedder_of(config: Config, checkpoint: Checkpoint, backbone: nn.Module) -> nn.Module:
    """As `Objective.embedder`, from a checkpoint alone: what is to be exported.

    Args:
        config: the one that the checkpoint was trained with.
        backbone: with the checkpoint's weights.
    """
    projection_nD = read_projection((config.loss, *config.auxiliary), checkpoint)
    return backbone if projection_nD is None else Projected(backbone, projection_nD)


def _check_together(specs: Sequence[LossSpec]) -> None:
    """Refuse losses that cannot stand beside one another, or one that cannot stand alone.

    Raises:
        UserError: a loss named twice, two projections, or nothing that trains the network.
    """
    names = [spec.name for spec in specs]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise UserError(f"the losses {sorted(doubled)} are named twice; name each loss once and set its weight")
    if len(learners := [spec.name for spec in specs if isinstance(spec, ProjectedTriplet)]) > 1:
        raise UserError(f"{' and '.join(learners)} each learn a projection, but an embedder has one; name one of them")
    if all(isinstance(spec, ProjectedTriplet) and spec.frozen for spec in specs):
        name = specs[0].name
        raise UserError(
            f"loss={name} with loss.frozen=true learns a projection alone, so that no loss trains the network; "
            f"name one that does as loss, such as softmax, and put {name} under auxiliary, or set loss.frozen=false"
        )
