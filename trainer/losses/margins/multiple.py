"""Multiplicative angular margins on embeddings as they are: L-Softmax and A-Softmax (SphereFace).

psi(theta) = (-1)^k cos(m theta) - 2k for theta in [k pi / m, (k+1) pi / m], a polynomial of cos(theta) by
Chebyshev's recurrence, so that value and derivative are exact on the whole circle:
dpsi/dcos = (-1)^k m sin(m theta) / sin(theta), which is m^2 at theta = 0 and at theta = pi.

Training with m > 1 from the start does not converge on large sets, so the target is eased by lambda, which falls from
a large value: (lambda cos(theta) + psi(theta)) / (1 + lambda),
lambda = max(lambda_min, lambda_start (1 + gamma step)^-power).
"""

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

from torch import Tensor

from trainer.checked import Within
from trainer.losses.margins.base import Case, Margin, Positives, cosine_boundary, monotone_cosine


class MultipleAngle(Margin):
    """What L-Softmax and A-Softmax share. lambda is `lambda_min`: that of the end, or after `at` that of the step."""

    unit_embedding = False
    eased = ()
    panel = "multiple"

    margin: Annotated[int, Within(ge=1, le=4)] = 4  # m
    lambda_start: Annotated[float, Within(ge=0)] = 1000.0
    lambda_gamma: Annotated[float, Within(ge=0)] = 0.12  # per step
    lambda_power: Annotated[float, Within(ge=0)] = 1.0
    lambda_min: Annotated[float, Within(ge=0)] = 5.0

    @classmethod
    def demo_constants(cls, dimension: int, steps: int) -> dict[str, Any]:
        """lambda = 100 (1 + 8 step / steps)^-4, which ends at 0.015."""
        easing = {"lambda_start": 100.0, "lambda_gamma": 8 / steps, "lambda_power": 4.0}
        return super().demo_constants(dimension, steps) | easing

    def at(self, step: int, warmup: float) -> Self:
        return replace(self, lambda_min=self.relaxation(step))

    def relaxation(self, step: int) -> float:
        """lambda at a step."""
        falling: float = (1 + self.lambda_gamma * step) ** -self.lambda_power
        return max(self.lambda_min, self.lambda_start * falling)

    def target(self, positives: Positives) -> Tensor:
        psi_B = monotone_cosine(positives.cos_B, float(self.margin))
        return positives.lengths_B * (self.lambda_min * positives.cos_B + psi_B) / (1 + self.lambda_min)


class LSoftmax(MultipleAngle):
    """Large-margin softmax: |x| |w_y| psi(theta) for the target, x . w_j for the other classes.

    The lengths of the centres are parameters too: dt/d|w_y| = |x| psi(theta).
    """

    formula = "|x| |w| psi(theta), psi = (-1)^k cos(m theta) - 2k"
    source = "Liu et al. 2016, Large-margin softmax loss, eq. 4 to 7"
    title = "L-Softmax"
    demo: ClassVar = {"margin": 4}
    cases = (
        Case(curve="L-Softmax, $m = 1$", constants={"margin": 1}),
        *(
            Case(
                curve=f"L-Softmax, $m = {m}$", row=rf"$m={m}$, $\Vert w_1\Vert=\Vert w_2\Vert$", constants={"margin": m}
            )
            for m in (2, 3, 4)
        ),
    )
    boundary = (
        r"\Vert x\Vert(\Vert w_1\Vert\cos m\theta_1-\Vert w_2\Vert\cos\theta_2)=0",
        "|x| (|w_1| cos(m theta_1) - |w_2| cos(theta_2)) = 0",
    )
    unit_rows = False

    name: Literal["l_softmax"] = "l_softmax"
    lambda_gamma: Annotated[float, Within(ge=0)] = 0.000025  # per step
    lambda_power: Annotated[float, Within(ge=0)] = 35.0
    lambda_min: Annotated[float, Within(ge=0)] = 0.0


class ASoftmax(MultipleAngle):
    """SphereFace: unit centres, |x| psi(theta) for the target, |x| cos(theta_j) for the other classes."""

    formula = "|x| psi(theta), psi = (-1)^k cos(m theta) - 2k"
    source = "Liu et al. 2017, SphereFace, eq. 6 and 7"
    title = "A-Softmax"
    demo: ClassVar = {"margin": 4, "lambda_min": 0.0}
    cases = (
        Case(curve="A-Softmax, $m = 4$", row="$m=4$", constants={"lambda_min": 0.0}),
        Case(curve=r"A-Softmax, $m = 4$, $\lambda = 5$"),
    )
    boundary = cosine_boundary(r"\Vert x\Vert", r"\cos m\theta_1", "cos(m theta_1)")

    name: Literal["a_softmax"] = "a_softmax"
