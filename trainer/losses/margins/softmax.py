"""The softmax family without an angular margin: plain, weighted, focal, modified and L2-constrained softmax.

Notation: z_j the logits, p = softmax(z), y the label. dL/dz_j = p_j - [j = y] unless a docstring says otherwise.
Centres and biases of these losses are ordinary parameters; all ranks' logits are joined through their maxima, since
nothing bounds them.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional

from trainer.checked import Within
from trainer.errors import UserError
from trainer.losses.bounds import l2_softmax_scale, positive_scale
from trainer.losses.margins.base import Case, Margin, Positives, Probability, Scale, cosine_boundary

_EQUAL = r"$\Vert w_1\Vert=\Vert w_2\Vert$, $b_1=b_2$"


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
        if class_values_B is None:
            raise UserError(
                "weighted_softmax: the weights depend on how many samples each class has; give class_counts"
            )
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

    `alpha` fixed, learnable from its value here, or `auto`: the lower bound log(p (C - 2) / (1 - p)) above which a
    perfect embedding reaches the posterior `probability`. dL/d alpha = sum_j dL/dz_j (x/|x| . w_j).
    """

    family = "softmax"
    formula = "alpha x/|x| . w + b"
    source = "Ranjan et al. 2017, L2-constrained softmax loss, eq. 3 and 6"
    title = "$L_2$-softmax"
    demo: ClassVar = {"alpha": 16.0}
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
        alpha = l2_softmax_scale(classes, self.probability)
        alpha = positive_scale(f"{self.name}: alpha", alpha, classes, f"probability {self.probability}")
        return replace(self, alpha=alpha)

    def learnables(self) -> dict[str, float]:
        return {"alpha": self._number()} if self.learnable else {}

    def scale_of(self, values: Mapping[str, Tensor]) -> float | Tensor:
        return values["alpha"] if self.learnable else self._number()

    def _number(self) -> float:
        if self.alpha == "auto":
            raise UserError("the alpha of l2_softmax is still 'auto'; call resolve(classes, dimension) first")
        return self.alpha

    def target(self, positives: Positives) -> Tensor:
        return positives.dots_B
