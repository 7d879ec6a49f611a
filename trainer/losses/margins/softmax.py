"""The softmax family: plain, weighted, focal, modified, L2-constrained and large-margin softmax, and SphereFace.

Notation: z_j the logits, p = softmax(z), y the label. dL/dz_j = p_j - [j = y] unless a docstring says otherwise.
Centres and biases of these losses are ordinary parameters; all ranks' logits are joined through their maxima, since
nothing bounds them.
"""

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional

from trainer.checked import Within
from trainer.losses.bounds import l2_softmax_scale, positive_scale
from trainer.losses.margins import Case, Margin, Positives, Probability, Scale, Values, cosine_boundary, monotone_cosine

_LENGTHS = r"$\Vert w_1\Vert=\Vert w_2\Vert$"
_EQUAL = rf"{_LENGTHS}, $b_1=b_2$"


class Softmax(Margin):
    """Cross entropy of z_j = x . w_j + b_j."""

    family = "softmax"
    formula = "x.w + b"
    source = "Bridle 1990, Probabilistic interpretation of feedforward classification network outputs"
    title = "softmax"
    unit_rows = False
    unit_embedding = False
    bias = True
    eased = ()
    panel = "softmax"
    cases = (Case(curve="softmax", row=_EQUAL),)
    boundary = (r"(w_1-w_2)\cdot x+b_1-b_2=0", "(w_1 - w_2).x + b_1 - b_2 = 0")

    name: Literal["softmax"] = "softmax"

    def target(self, positives: Positives) -> Tensor:
        return positives.dots_B


class WeightedSoftmax(Softmax):
    """Softmax whose samples count by the rarity of their class: w_y CE, w_c proportional to n_c^(-power).

    The weights are scaled so that their mean over the training samples is 1, which keeps the loss's size and needs
    nothing from the batch. A class without samples weighs as if it had one. dL/dz_j = w_y (p_j - [j = y]).
    """

    formula = "-w_y log p_y, w_c ~ n_c^(-power)"
    source = "King and Zeng 2001, Logistic regression in rare events data, eq. 8"
    title = "weighted softmax"
    cases = (Case(curve="weighted softmax, $w_c = 2$", row=_EQUAL, share=2.0),)

    name: Literal["weighted_softmax"] = "weighted_softmax"  # type: ignore[assignment]
    power: Annotated[float, Within(gt=0, le=1)] = 1.0  # 1: every class counts the same; 0.5: half way

    def per_class(self, counts_C: Tensor) -> Tensor:
        n_C = counts_C.to(torch.float64)
        weights_C = n_C.clamp_min(1) ** -self.power
        return (weights_C * n_C.sum() / (weights_C * n_C).sum()).float()

    def per_sample(self, negatives_B: Tensor, targets_B: Tensor, class_values_B: Tensor | None) -> Tensor:
        assert class_values_B is not None, "from `per_class`"
        return class_values_B.to(targets_B.dtype) * functional.softplus(negatives_B - targets_B)


class Focal(Softmax):
    """Softmax in which easy samples fade: -(1 - p)^gamma log p.

    dL/dp = gamma (1-p)^(gamma-1) log p - (1-p)^gamma / p, and dp/dz_j = p ([j = y] - p_j). With d = N - t,
    1 - p = sigmoid(d), so that the power is taken as exp(gamma logsigmoid(d)): no cancellation near p = 1.
    """

    formula = "-(1 - p_y)^gamma log p_y"
    source = "Lin et al. 2017, Focal loss for dense object detection, eq. 4"
    title = "focal"
    cases = (Case(curve=r"focal, $\gamma = 2$", row=_EQUAL),)

    name: Literal["focal"] = "focal"  # type: ignore[assignment]
    gamma: Annotated[float, Within(ge=0, le=10)] = 2.0

    def per_sample(self, negatives_B: Tensor, targets_B: Tensor, class_values_B: Tensor | None) -> Tensor:
        difference_B = negatives_B - targets_B
        return (self.gamma * functional.logsigmoid(difference_B)).exp() * functional.softplus(difference_B)


class ModifiedSoftmax(Margin):
    """Softmax with unit centres and no bias: z_j = |x| cos(theta_j)."""

    family = "softmax"
    formula = "|x| cos(theta)"
    source = "Liu et al. 2017, SphereFace, eq. 4"
    title = "modified softmax"
    unit_embedding = False
    eased = ()
    panel = "softmax"
    boundary = cosine_boundary(r"\Vert x\Vert", r"\cos\theta_1", "cos(theta_1)")

    name: Literal["modified_softmax"] = "modified_softmax"

    def target(self, positives: Positives) -> Tensor:
        return positives.dots_B


class L2Softmax(Margin):
    """Softmax on embeddings of constant length: z_j = alpha x/|x| . w_j + b_j.

    `alpha` fixed, learnable from its value here, or `auto` (`bounds.l2_softmax_scale`).
    dL/d alpha = sum_j dL/dz_j (x/|x| . w_j).
    """

    family = "softmax"
    formula = "alpha x/|x| . w + b"
    source = "Ranjan et al. 2017, L2-constrained softmax loss, eq. 3 and 6"
    title = "$L_2$-softmax"
    demo: ClassVar = {"alpha": 16.0}
    scale_field = "alpha"
    unit_rows = False
    bias = True
    eased = ()
    panel = "softmax"
    cases = (Case(curve=r"$L_2$-softmax, $\alpha = 40$", row=_EQUAL),)
    boundary = (r"\alpha(w_1-w_2)\cdot\hat{x}+b_1-b_2=0", "alpha (w_1 - w_2).x/|x| + b_1 - b_2 = 0")

    name: Literal["l2_softmax"] = "l2_softmax"
    alpha: Scale | Literal["auto"] = 40.0
    learnable: bool = False  # learn alpha, from its value here
    probability: Probability = 0.9  # for alpha: auto

    def resolve(self, classes: int, dimension: int) -> Self:
        if self.alpha != "auto":
            return self
        alpha, goal = l2_softmax_scale(classes, self.probability), f"probability {self.probability}"
        return replace(self, alpha=positive_scale(f"{self.name}: alpha", alpha, classes, goal))

    def learnables(self) -> dict[str, float]:
        return {"alpha": float(super().scale_of({}))} if self.learnable else {}

    def scale_of(self, values: Values) -> float | Tensor:
        return values["alpha"] if self.learnable else super().scale_of(values)

    def target(self, positives: Positives) -> Tensor:
        return positives.dots_B


class MultipleAngle(Margin):
    """What L-Softmax and A-Softmax share: the target's angle times m, on embeddings as they are.

    psi(theta) = (-1)^k cos(m theta) - 2k for theta in [k pi / m, (k+1) pi / m], a polynomial of cos(theta) by
    Chebyshev's recurrence, so that value and derivative are exact on the whole circle:
    dpsi/dcos = (-1)^k m sin(m theta) / sin(theta), which is m^2 at theta = 0 and at theta = pi.

    Training with m > 1 from the start does not converge on large sets, so the target is eased by lambda, which falls
    from a large value: (lambda cos(theta) + psi(theta)) / (1 + lambda),
    lambda = max(lambda_min, lambda_start (1 + gamma step)^-power). `at` puts the step's lambda in lambda_min.
    """

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
        falling: float = (1 + self.lambda_gamma * step) ** -self.lambda_power
        return replace(self, lambda_min=max(self.lambda_min, self.lambda_start * falling))

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
        *(Case(curve=f"L-Softmax, $m = {m}$", row=f"$m={m}$, {_LENGTHS}", constants={"margin": m}) for m in (2, 3, 4)),
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
