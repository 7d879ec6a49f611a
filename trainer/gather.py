"""What every loss asks of a batch before it is used: equal shapes, labels that are classes, finite embeddings.

Legend: b samples of this rank, B samples of all ranks, D dimension.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.distributed import Group
from trainer.errors import UserError


def check_shapes(x_bD: Tensor, labels_b: Tensor, dimension: int, what: str = "loss") -> None:
    """One int64 label for each embedding of the dimension that the loss was made for.

    Raises:
        UserError: another shape or type, or no sample at all.
    """
    if x_bD.ndim != 2 or x_bD.shape[1] != dimension:
        raise UserError(f"embeddings of shape {tuple(x_bD.shape)}; the {what} was made for [b, {dimension}]")
    if not len(x_bD):
        raise UserError(f"the {what} got no embedding; give each rank one slot or more, labelled -1 where it is empty")
    if labels_b.shape != x_bD.shape[:1] or labels_b.dtype != torch.int64:
        raise UserError(
            f"labels of shape {tuple(labels_b.shape)} and type {labels_b.dtype} for {x_bD.shape[0]} embeddings; "
            "give one int64 label each"
        )


class Fault:
    """Which samples of the global batch cannot be used. Asked for early and read late, so that a GPU need not wait."""

    def __init__(self, x_BD: Tensor, labels_B: Tensor, classes: int, what: str = "loss") -> None:
        self.x_BD, self.labels_B, self.classes, self.what = x_BD.detach(), labels_B, classes, what
        self.finite_B = torch.isfinite(self.x_BD).all(dim=1)
        self.known_B = (labels_B >= -1) & (labels_B < classes)
        good = (self.finite_B & self.known_B).all()
        self.event: torch.cuda.Event | None = None
        if good.is_cuda:
            self.good = torch.empty((), dtype=torch.bool, pin_memory=True)
            self.good.copy_(good, non_blocking=True)
            self.event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.event.record()
        else:
            self.good = good

    def raise_if_any(self, group: Group, b: int, keys: Sequence[str] | None) -> None:
        """The same error on every rank, in which the rank that holds the sample adds its name.

        Raises:
            UserError: a label is no class, or an embedding is not finite.
        """
        if self.event is not None:
            self.event.synchronize()
        if bool(self.good):
            return
        slot = int((~(self.finite_B & self.known_B)).nonzero()[0])
        rank, place = divmod(slot, b)
        who = f"slot {place} of rank {rank}"
        if rank == group.rank and keys is not None:
            who = f"sample '{keys[place]}'"
        if not bool(self.known_B[slot]):
            raise UserError(
                f"{who} has label {int(self.labels_B[slot])}, but the {self.what} has the classes 0 to "
                f"{self.classes - 1}; the data and the number of classes do not belong together"
            )
        bad = self.x_BD[slot][~torch.isfinite(self.x_BD[slot])]
        raise UserError(
            f"{who} has an embedding that is not finite ({len(bad)} of {self.x_BD.shape[1]} numbers, the first is "
            f"{float(bad[0])}); lower the learning rate or look at its image and the weights"
        )
