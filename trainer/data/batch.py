"""One step's samples on one rank."""

from dataclasses import dataclass

import torch

PADDING = -1  # the label of a slot that only fills the batch up; the head counts it for nothing


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples of one rank for one step.

    Every rank gets the same number of slots in every step, since collectives need equal shapes: where the last global
    batch of an epoch is short, the missing slots repeat an image and carry the label `PADDING`.

    Attributes:
        images_BCHW: uint8 pixels.
        labels_B: int64 class numbers, or `PADDING`.
        keys: the sample's name in its shard, for messages ("" for padding).
        rows_B: int64 position of each slot in the global batch of this step; augmentation draws its random numbers by
            position, so that they do not depend on the number of ranks.
    """

    images_BCHW: torch.Tensor
    labels_B: torch.Tensor
    keys: tuple[str, ...]
    rows_B: torch.Tensor
