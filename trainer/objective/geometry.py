"""The geometry that an objective acts on: which embeddings its losses compare, how long they are, and with what.

Legend: N samples, c classes, K centres a class, D dimension of the embedding, n of a projection.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from trainer.losses.triplets import PROJECTION

Matrix = NDArray[np.float64]


class Projected(nn.Module):
    """A backbone followed by a learned T: pixels to T x/|x|, [N, n]."""

    projection: Tensor

    def __init__(self, backbone: nn.Module, projection_nD: Tensor) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer(PROJECTION, projection_nD.detach())
        self.training = backbone.training

    def forward(self, images: Tensor) -> Tensor:
        x_ND: Tensor = self.backbone(images)
        return functional.normalize(x_ND, dim=1) @ self.projection.to(x_ND.dtype).T


@dataclass(frozen=True)
class ClassCentres:
    """The centres of some classes as the loss uses them: a decision is the class with the greatest score.

    Attributes:
        rows_cKD: K centres a class; unit vectors where the loss has unit centres.
        bias_c: 0 where there is none.
        scale: the length given to embeddings, or None where they enter as they are.
    """

    rows_cKD: Matrix
    bias_c: Matrix
    scale: float | None

    def scores(self, x_ND: Matrix) -> Matrix:
        """The logits without margin, [N, c]."""
        dots_NcK = np.einsum("nd,ckd->nck", of_length(x_ND, self.scale), self.rows_cKD)
        return np.asarray(dots_NcK.max(axis=2) + self.bias_c)

    def nearest(self, points_cD: Matrix) -> Matrix:
        """Of several centres of a class the one nearest to the class's point, [c, D]."""
        best_c = np.einsum("ckd,cd->ck", self.rows_cKD, points_cD).argmax(axis=1)
        return np.asarray(self.rows_cKD[np.arange(len(self.rows_cKD)), best_c])


@dataclass(frozen=True)
class LossGeometry:
    """What an objective's losses compare: a question to this object in place of one to each kind of loss.

    Attributes:
        on_directions: the first loss compares unit vectors.
        projection_nD: what a loss has learned to put behind the backbone.
        centres: of a margin, for the classes asked for. A collective: every rank asks for the same classes.
        followed: the centres that a centre loss lets follow its samples, [c, D], among the embeddings; likewise.
    """

    on_directions: bool = True
    projection_nD: Tensor | None = None
    centres: Callable[[Tensor], ClassCentres] | None = None
    followed: Callable[[Tensor], Matrix] | None = None

    def __or__(self, other: "LossGeometry") -> "LossGeometry":
        """Of both losses together; what both have is the first one's."""
        return LossGeometry(
            self.on_directions,
            other.projection_nD if self.projection_nD is None else self.projection_nD,
            self.centres or other.centres,
            self.followed or other.followed,
        )

    def embedder(self, backbone: nn.Module) -> nn.Module:
        """What is evaluated and exported: the backbone, followed by the projection of a loss that learns one."""
        return backbone if self.projection_nD is None else Projected(backbone, self.projection_nD)

    def compared(self, backbone: nn.Module) -> nn.Module:
        """What gives the embeddings that the losses shape: a margin compares its centres with the backbone's."""
        return self.embedder(backbone) if self.centres is None else backbone

    def placed(self, x_ND: Matrix, centres: ClassCentres | None) -> Matrix:
        """Embeddings of `compared` with the length at which they are compared; a projection's own lengths count."""
        if centres is not None:
            return of_length(x_ND, centres.scale)
        return of_length(x_ND, 1.0 if self.on_directions and self.projection_nD is None else None)


def of_length(x_ND: Matrix, length: float | None) -> Matrix:
    """Embeddings of one length; as they are where it is None."""
    if length is None:
        return x_ND
    return np.asarray(length * x_ND / np.maximum(np.linalg.norm(x_ND, axis=1, keepdims=True), 1e-12))
