"""How every loss begins: it checks its batch, gathers all ranks', and names a bad sample.

Legend: b samples of this rank, B samples of all ranks, D dimension.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.distributed import Group, gather_rows
from trainer.errors import UserError


class Gatherer:
    """The beginning of each step of a loss for so many classes and dimensions.

    Args:
        what: the loss, for messages.
    """

    def __init__(self, classes: int, dimension: int, group: Group, what: str = "loss") -> None:
        self.classes, self.dimension, self.group, self.what = classes, dimension, group, what
        self._first = True

    def __call__(self, x_bD: Tensor, labels_b: Tensor, keys: Sequence[str] | None) -> "Gathered":
        """All ranks' embeddings and labels; a collective.

        Args:
            x_bD: embeddings of this rank's samples.
            labels_b: int64 classes, -1 for a slot that only fills the batch; equally many on every rank.
            keys: the samples' names, for messages.

        Raises:
            UserError: another shape or type, no sample at all, or in the first step batches of several sizes.
        """
        self._check_shapes(x_bD, labels_b)
        if self._first:
            self.group.check_equal(x_bD.shape[0], "batches of sizes")
            self._first = False
        x_BD, labels_B = gather_rows(x_bD, labels_b.to(x_bD.device), self.group)
        return Gathered(self, x_BD, labels_B, keys)

    def _check_shapes(self, x_bD: Tensor, labels_b: Tensor) -> None:
        if x_bD.ndim != 2 or x_bD.shape[1] != self.dimension:
            raise UserError(
                f"embeddings of shape {tuple(x_bD.shape)}; the {self.what} was made for [b, {self.dimension}]"
            )
        if not len(x_bD):
            raise UserError(
                f"the {self.what} got no embedding; give each rank one slot or more, labelled -1 where it is empty"
            )
        if labels_b.shape != x_bD.shape[:1] or labels_b.dtype != torch.int64:
            raise UserError(
                f"labels of shape {tuple(labels_b.shape)} and type {labels_b.dtype} for {x_bD.shape[0]} embeddings; "
                "give one int64 label each"
            )


class Gathered:
    """All ranks' samples of one step. Whether one of them is bad is asked for at once and read late
    (`raise_if_bad`), so that a GPU need not wait.

    Attributes:
        x_BD: embeddings, fp32 or wider; their gradient goes back to the ranks (`distributed.gather_rows`).
        labels_B: classes, or -1.
        own: which of them are this rank's.
    """

    def __init__(self, gatherer: Gatherer, x_BD: Tensor, labels_B: Tensor, keys: Sequence[str] | None) -> None:
        self.x_BD, self.labels_B = x_BD, labels_B
        self._for, self._keys = gatherer, keys
        self._b = x_BD.shape[0] // gatherer.group.size
        self.own = slice(gatherer.group.rank * self._b, (gatherer.group.rank + 1) * self._b)
        self._finite_B = torch.isfinite(x_BD.detach()).all(dim=1)
        self._known_B = (labels_B >= -1) & (labels_B < gatherer.classes)
        good = (self._finite_B & self._known_B).all()
        self._event: torch.cuda.Event | None = None
        if good.is_cuda:
            self._good = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._good.copy_(good, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._good = good

    def raise_if_bad(self) -> None:
        """The same error on every rank, in which the rank that holds the sample adds its name.

        Raises:
            UserError: a label is no class, or an embedding is not finite.
        """
        if self._event is not None:
            self._event.synchronize()
        if bool(self._good):
            return
        slot = int((~(self._finite_B & self._known_B)).nonzero()[0])
        rank, place = divmod(slot, self._b)
        who = f"slot {place} of rank {rank}"
        if rank == self._for.group.rank and self._keys is not None:
            who = f"sample '{self._keys[place]}'"
        if not bool(self._known_B[slot]):
            raise UserError(
                f"{who} has label {int(self.labels_B[slot])}, but the {self._for.what} has the classes 0 to "
                f"{self._for.classes - 1}; the data and the number of classes do not belong together"
            )
        x_D = self.x_BD.detach()[slot]
        bad = x_D[~torch.isfinite(x_D)]
        raise UserError(
            f"{who} has an embedding that is not finite ({len(bad)} of {len(x_D)} numbers, the first is "
            f"{float(bad[0])}); lower the learning rate or look at its image and the weights"
        )
