"""Centre loss and centre-invariant loss: a centre for every class, which follows its samples.

Legend: B samples, D dimension. The centres are no parameters: no gradient reaches them and no optimizer steps them.
They move by the papers' rule; `objective.centres` keeps them, sharded over the ranks.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from torch import Tensor

from trainer.checked import Within
from trainer.losses.base import Family, LossSpec


class Center(LossSpec):
    """Each embedding is drawn to the centre of its class, and the centre follows its samples.

    L = mean over the samples of |x - c_y|^2 / 2 (the paper sums over the batch, as its softmax does, so that its lambda
    stays the same here). dL/dx = (x - c_y) / B. After each step c_j <- c_j - alpha delta_j,
    delta_j = sum over the batch's samples of class j of (c_j - x) / (1 + n_j), n_j their number, with the x and c of
    the loss. Centres start at 0.

    An auxiliary: alone it is least where all embeddings are equal. The paper adds it to softmax with the weight 0.003.
    It draws embeddings as they are, so that beside a head on the cosine, which leaves |x| free, it also shortens them;
    `unit` draws unit vectors instead.

    A batch of padding alone has loss 0 and moves nothing.
    """

    family: ClassVar[Family] = "centre"
    formula: ClassVar[str] = "|x - c_y|^2 / 2"
    source: ClassVar[str] = "Wen et al. 2016, A discriminative feature learning approach, eq. 2 to 4"
    title: ClassVar[str] = "softmax + centre"
    beside_softmax: ClassVar[float | None] = 0.1

    name: Literal["center"] = "center"
    alpha: Annotated[float, Within(ge=0, le=1)] = 0.5  # how far a centre follows; 0: not at all
    unit: bool = False  # on unit vectors; the paper: as they are

    @property
    def on_directions(self) -> bool:
        return self.unit

    def extra(self, squares_B: Tensor, mean: Tensor) -> Tensor | None:
        """A further loss of each sample, from |c_y|^2 and the mean of |c|^2 over all classes."""
        return None

    def extra_slope(self, squares_B: Tensor, mean: Tensor) -> Tensor | None:
        """The derivative of `extra` by c_y is this times c_y; the mean counts as a constant."""
        return None


class CenterInvariant(Center):
    """Centre loss, whose centres are also held at one common length, whether a class is rich or poor in samples.

    L = mean over the samples of |x - c_y|^2 / 2 + gamma/4 (|c_y|^2 - M)^2, M the mean of |c_k|^2 over all C classes.
    dL/dx = (x - c_y) / B: the second term acts on the centres alone, which move by
    delta_j = sum over samples of class j of (c_j - x + gamma (|c_j|^2 - M) c_j) / (1 + n_j), M held constant,
    and through them on the embeddings. Stable where alpha gamma |c|^2 < 1; gamma is ours, for embeddings of length
    around 10 to 30. It contains centre loss: do not name `center` beside it.
    """

    formula: ClassVar[str] = "|x - c_y|^2 / 2 + gamma/4 (|c_y|^2 - mean_k |c_k|^2)^2"
    source: ClassVar[str] = "Wu et al. 2017, Deep face recognition with center invariant loss"
    title: ClassVar[str] = "softmax + centre-invariant"
    # The default leaves ten centres nearly where centre loss has them: in the plane the deviation of their lengths is
    # 0.27 of the mean after 600 steps, with centre loss 0.3. With this gamma it is less than 0.04, and
    # alpha gamma |c|^2 is at most 0.4, well below the 1 at which it becomes unstable.
    demo: ClassVar[Mapping[str, Any]] = {"gamma": 5e-3}

    name: Literal["center_invariant"] = "center_invariant"  # type: ignore[assignment]
    gamma: Annotated[float, Within(ge=0)] = 1e-4

    def extra(self, squares_B: Tensor, mean: Tensor) -> Tensor:
        return self.gamma / 4 * (squares_B - mean) ** 2

    def extra_slope(self, squares_B: Tensor, mean: Tensor) -> Tensor:
        return self.gamma * (squares_B - mean)
