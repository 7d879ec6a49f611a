"""Multiplicative angular margins on embeddings as they are: L-Softmax and A-Softmax (SphereFace).

psi(theta) = (-1)^k cos(m theta) - 2k for theta in [k pi / m, (k+1) pi / m], a polynomial of cos(theta) by
Chebyshev's recurrence, so that value and derivative are exact on the whole circle:
dpsi/dcos = (-1)^k m sin(m theta) / sin(theta), which is m^2 at theta = 0 and at theta = pi.

Training with m > 1 from the start does not converge on large sets, so the target is eased by lambda, which falls from
a large value: (lambda cos(theta) + psi(theta)) / (1 + lambda),
lambda = max(lambda_min, lambda_start (1 + gamma step)^-power).
"""

from typing import ClassVar, Literal, Self

from pydantic import Field, PrivateAttr
from torch import Tensor

from trainer.losses.margins.base import Margin, Positives, monotone_cosine


class MultipleAngle(Margin):
    """What L-Softmax and A-Softmax share. Without `at` lambda is `lambda_min`, the value at the end."""

    unit_embedding: ClassVar[bool] = False
    eased: ClassVar[tuple[str, ...]] = ()

    margin: int = Field(4, ge=1, le=4, description="m")
    lambda_start: float = Field(1000.0, ge=0, allow_inf_nan=False)
    lambda_gamma: float = Field(0.12, ge=0, allow_inf_nan=False, description="per step")
    lambda_power: float = Field(1.0, ge=0, allow_inf_nan=False)
    lambda_min: float = Field(5.0, ge=0, allow_inf_nan=False)

    _relaxation: float | None = PrivateAttr(None)

    def at(self, step: int, warm: float) -> Self:
        eased = self.model_copy()
        eased._relaxation = self.relaxation(step)
        return eased

    def relaxation(self, step: int) -> float:
        """lambda at a step."""
        falling: float = (1 + self.lambda_gamma * step) ** -self.lambda_power
        return max(self.lambda_min, self.lambda_start * falling)

    def target(self, positives: Positives) -> Tensor:
        relaxation = self.lambda_min if self._relaxation is None else self._relaxation
        psi_B = monotone_cosine(positives.cos_B, float(self.margin))
        return positives.lengths_B * (relaxation * positives.cos_B + psi_B) / (1 + relaxation)


class LSoftmax(MultipleAngle):
    """Large-margin softmax: |x| |w_y| psi(theta) for the target, x . w_j for the other classes.

    The lengths of the centres are parameters too: dt/d|w_y| = |x| psi(theta).
    """

    formula: ClassVar[str] = "|x| |w| psi(theta), psi = (-1)^k cos(m theta) - 2k"
    source: ClassVar[str] = "Liu et al. 2016, Large-margin softmax loss, eq. 4 to 7"
    unit_rows: ClassVar[bool] = False

    name: Literal["l_softmax"] = "l_softmax"
    lambda_gamma: float = Field(0.000025, ge=0, allow_inf_nan=False, description="per step")
    lambda_power: float = Field(35.0, ge=0, allow_inf_nan=False)
    lambda_min: float = Field(0.0, ge=0, allow_inf_nan=False)


class ASoftmax(MultipleAngle):
    """SphereFace: unit centres, |x| psi(theta) for the target, |x| cos(theta_j) for the other classes."""

    formula: ClassVar[str] = "|x| psi(theta), psi = (-1)^k cos(m theta) - 2k"
    source: ClassVar[str] = "Liu et al. 2017, SphereFace, eq. 6 and 7"

    name: Literal["a_softmax"] = "a_softmax"
