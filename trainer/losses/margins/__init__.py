"""What a margin is, and the families of margins.

Legend: B samples of all ranks, T classes of a tile, D dimension, C classes; theta the angle between a sample and the
centre of its own class; s the scale.

Every loss of this kind is a function of two numbers a sample: N = log sum over the other classes of exp(logit), and
t, the target's logit. The cross entropy is softplus(N - t). The head computes N; a margin says what t is:

    class MyMargin(Margin):
        title = "MyMargin"
        formula = "s (cos(theta) - m theta)"
        source = "..."
        demo: ClassVar = {"scale": 16.0}

        name: Literal["my_margin"] = "my_margin"
        scale: Scale = 64.0
        margin: float = 0.1

        def target(self, positives: Positives) -> Tensor:
            return self.scale * (positives.cos_B - self.margin * angle(positives.cos_B))

It then works on any number of ranks and in both algorithms of the head. The derivative that autograd makes of `target`
must be finite also at the edges, theta = 0 and pi, and at values that belong to no sample: `target` is evaluated on all
B samples, and those of other ranks' classes are masked afterwards. With a line in the list of losses
(`trainer/losses/__init__.py`) the config, the tables, the figures and the benchmarks know it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from trainer.checked import Within
from trainer.errors import UserError
from trainer.losses.base import Family, LossSpec

# Beyond it the rounding of a fp32 logit, s x 2^-24, is a thousandth of a nat, and gradients lose their meaning.
MAX_SCALE = 16384.0
Scale = Annotated[float, Within(gt=0, le=MAX_SCALE)]
AdditiveAngle = Annotated[float, Within(ge=0, le=math.pi)]  # radians
Probability = Annotated[float, Within(gt=0, lt=1)]
Values = Mapping[str, Tensor]  # learnable scalars and running statistics by name
PanelName = Literal["softmax", "multiple", "additive", "adaptive", "reweighting"]


@dataclass(frozen=True, slots=True)
class Positives:
    """What a margin may know of each sample and of its own class; [B] each.

    Attributes:
        cos_B: cosine to the own centre, within [-1, 1]; the nearest of several centres.
        dots_B: the plain target logit: embedding as the head uses it times the own centre, plus bias.
        lengths_B: |embedding as the head uses it| x |own centre|; dots = lengths x cos + bias.
        norms_B: |x| of the embedding as the backbone gave it.
        labels_B: the class, or -1 for padding.
        values: the margin's learnable scalars and buffers, by name.
        noise_B: standard normal numbers, drawn from (seed, step); for margins with `noisy`.
        class_values_B: what `Margin.per_class` gave the own class; for margins that have it.
        batch_cos_B: as `cos_B`, but known of all samples, whoever owns their class; for margins that `compare_samples`.
    """

    cos_B: Tensor
    dots_B: Tensor
    lengths_B: Tensor
    norms_B: Tensor
    labels_B: Tensor
    values: Values
    noise_B: Tensor | None = None
    class_values_B: Tensor | None = None
    batch_cos_B: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """A margin under certain circumstances, to be drawn.

    Attributes:
        curve: the label of its curves, mathtext; None: it has none.
        row: what its row of the table of boundaries is for, mathtext; None: it has none.
        constants: those that differ from the defaults.
        norm: |x|, for margins that depend on it.
        noise: the drawn standard normal number, for margins with `noisy`.
        share: what `per_class` gave the sample's class: the way to the greatest margin, or a class weight.
        values: running statistics.
    """

    curve: str | None = None
    row: str | None = None
    constants: Mapping[str, Any] = field(default_factory=dict)
    norm: float = 1.0
    noise: float = 0.0
    share: float = 1.0
    values: Mapping[str, float] = field(default_factory=dict)


def cosine_boundary(factor: str, psi_tex: str, psi: str) -> tuple[str, str]:
    """factor (psi - cos(theta_2)) = 0, as mathtext and as plain text."""
    text = f"{factor} ({psi} - cos(theta_2)) = 0".replace(r"\Vert x\Vert", "|x|")
    return rf"{factor}({psi_tex}-\cos\theta_2)=0", text


def angle_boundary(margin: str) -> tuple[str, str]:
    """s (cos(theta_1 + margin) - cos(theta_2)) = 0, as mathtext and as plain text."""
    return cosine_boundary("s", rf"\cos(\theta_1+{margin})", f"cos(theta_1 + {margin})")


class Margin(LossSpec):
    """A softmax over class centres with a changed target logit. Subclasses give `target` and override what differs.

    Class attributes:
        unit_rows: the centres enter as unit vectors.
        unit_embedding: the embedding enters as a unit vector times a scale; else as it is.
        scale_field: the field that holds the scale of unit embeddings, if there is one.
        bias: a learnable number is added to each logit.
        noisy: `target` wants `Positives.noise_B`.
        reweights: hard negatives' logits are changed too (`reweight`).
        eased: the fields that grow from 0 to their value during the margin's warmup.
        panel: with which other margins its curve is drawn.
        cases: what is drawn of it; none: one curve and one row of the table of boundaries, with its defaults.
        negatives: of a margin that re-weights, the curves of a hard negative's cosine.
        boundary: where two classes are equally good, as mathtext and as plain text; none: made from the formula.
    """

    family: ClassVar[Family] = "margin"
    unit_rows: ClassVar[bool] = True
    unit_embedding: ClassVar[bool] = True
    scale_field: ClassVar[str] = "scale"
    bias: ClassVar[bool] = False
    noisy: ClassVar[bool] = False
    reweights: ClassVar[bool] = False
    eased: ClassVar[tuple[str, ...]] = ("margin",)
    panel: ClassVar[PanelName] = "additive"
    cases: ClassVar[tuple[Case, ...]] = ()
    negatives: ClassVar[tuple[Case, ...]] = ()
    boundary: ClassVar[tuple[str, str] | None] = None

    @property
    def on_directions(self) -> bool:
        return self.unit_embedding

    @property
    def compares_samples(self) -> bool:
        """Whether a rank needs the cosines of all samples to their own centres beforehand: one more message of [B]."""
        return self.reweights

    def centres_per_class(self) -> int:
        """K; the logit of a class is its best centre's."""
        return 1

    def at(self, step: int, warmup: float) -> Self:
        """The loss as it is at a step: `warmup` in [0, 1] is how far the margin's warmup has come."""
        if warmup >= 1 or not self.eased:
            return self
        return replace(self, **{name: getattr(self, name) * warmup for name in self.eased})

    def learnables(self) -> dict[str, float]:
        """Learnable scalars and their first values. Each costs one message of 4 bytes a step on several ranks."""
        return {}

    def buffers(self) -> dict[str, float]:
        """Running statistics and their first values; they belong to the checkpoint."""
        return {}

    def per_class(self, counts_C: Tensor) -> Tensor | None:
        """A number for each class, from how many samples each has; handed to `target` and `per_sample`."""
        return None

    def scale_of(self, values: Values) -> float | Tensor:
        """s: the length given to unit embeddings."""
        scale = getattr(self, self.scale_field, 1.0)
        if scale == "auto":
            raise UserError(
                f"the {self.scale_field} of {self.name} is still 'auto'; call resolve(classes, dimension) first"
            )
        return float(scale)

    def bound(self) -> tuple[float, float] | None:
        """The least and the greatest logit that another class can have, or None where there is no bound."""
        if self.unit_rows and self.unit_embedding and not self.bias and not self.learnables():
            scale = float(self.scale_of({}))
            return -scale, scale
        return None

    def observe(self, norms_B: Tensor, cos_B: Tensor | None, valid_B: Tensor, values: Values) -> dict[str, Tensor]:
        """The new values of the buffers, before `target` is asked; the same on every rank. Without gradient.

        Args:
            cos_B: of all samples to their own centre; only for margins that `compare_samples`.
            valid_B: False for padding.
        """
        return {}

    def target(self, positives: Positives) -> Tensor:
        """The target's logit, [B], differentiable."""
        raise NotImplementedError

    def hard_from(self, positives: Positives) -> Tensor:
        """The cosine above which another class is hard for a sample, [B]: that of the target with its margin."""
        return self.target(positives) / self.scale_of(positives.values)

    def reweight(self, cos_TB: Tensor, hard_TB: Tensor, values: Values) -> tuple[Tensor, Tensor]:
        """The changed cosines of other classes, and their derivative; `hard_TB`: where cos > `hard_from`."""
        a, b, c = self.hard_cosine(values)
        changed_TB = a + (b + c * cos_TB) * cos_TB
        return torch.where(hard_TB, changed_TB, cos_TB), torch.where(hard_TB, b + 2 * c * cos_TB, 1)

    def hard_cosine(self, values: Values) -> tuple[float | Tensor, float | Tensor, float | Tensor]:
        """(a, b, c): the cosine of a hard negative becomes a + b cos + c cos^2; only for margins with `reweights`."""
        raise NotImplementedError

    def per_sample(self, negatives_B: Tensor, targets_B: Tensor, class_values_B: Tensor | None) -> Tensor:
        """The loss of each sample from N and t."""
        return functional.softplus(negatives_B - targets_B)

    def regularizer(self, norms_B: Tensor) -> Tensor | None:
        """A further loss of each sample, of its embedding's norm."""
        return None


# The derivatives by cos of theta, -1 / sin theta, and of sin theta, -cos theta / sin theta, have poles at 0 and pi,
# where the direction in which x should turn is not defined either (d cos / dx has length sin theta / |x|). Below this
# sine they keep the value that they have there.
SINE_GUARD = 1e-4


def _sine(cos: Tensor) -> Tensor:
    return ((1 - cos) * (1 + cos)).clamp_min(0).sqrt()


class _Angle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, cos: Tensor) -> Tensor:
        ctx.save_for_backward(cos)
        return torch.atan2(_sine(cos), cos)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Tensor:
        (cos,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return -gradients[0] / _sine(cos).clamp_min(SINE_GUARD)


class _Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, cos: Tensor) -> Tensor:
        ctx.save_for_backward(cos)
        return _sine(cos)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Tensor:
        (cos,) = ctx.saved_tensors  # type: ignore[attr-defined]
        slope: Tensor = -gradients[0] * cos / _sine(cos).clamp_min(SINE_GUARD)
        return slope


def angle(cos: Tensor) -> Tensor:
    """theta = arccos(cos), exact also near 0 and pi, with the derivative -1 / max(sin theta, SINE_GUARD)."""
    result: Tensor = _Angle.apply(cos)  # type: ignore[no-untyped-call]
    return result


def sine_of(cos: Tensor) -> Tensor:
    """sin theta = sqrt(1 - cos^2), with the derivative -cos / max(sin theta, SINE_GUARD)."""
    result: Tensor = _Sine.apply(cos)  # type: ignore[no-untyped-call]
    return result


def chebyshev(cos: Tensor, degree: int) -> tuple[Tensor, Tensor]:
    """cos(n theta) and sin(n theta)/sin(theta) as polynomials of cos theta: T_n and U_(n-1); no pole anywhere."""
    first, second = torch.ones_like(cos), torch.zeros_like(cos)
    for _ in range(degree):
        first, second = cos * first - (1 - cos * cos) * second, first + cos * second
    return first, second


def monotone_cosine(cos: Tensor, factor: float = 1.0, offset: float | Tensor = 0.0) -> Tensor:
    """psi(theta) = (-1)^k cos(phi) - 2k with phi = factor theta + offset and k = floor(phi / pi).

    This is cos(phi) for phi in [0, pi], and 1 for phi < 0. Beyond pi, where the cosine would rise again and reward a
    worse sample, psi goes on falling, with a continuous derivative: the extension of L-Softmax (Liu et al. 2016,
    eq. 6), here for any factor and offset. So ArcFace's target is -2 - cos(theta + m) where theta + m > pi.

    d psi / d cos = (-1)^k factor sin(phi) / sin(theta). For a whole factor the part without offset is a polynomial
    and exact at theta = 0 and pi (where it is factor^2); an offset brings the pole that `sine_of` guards.
    """
    with torch.no_grad():
        turns = offset / math.pi
        branch = torch.floor(factor * torch.atan2(_sine(cos), cos) / math.pi + turns)
        # theta = pi belongs to the branch before it
        last = factor + turns
        branch = branch.clamp(max=last.ceil() - 1 if isinstance(last, Tensor) else math.ceil(last) - 1)
        sign = 1 - 2 * torch.remainder(branch, 2)
    if factor != round(factor):
        value = torch.cos(factor * angle(cos) + offset)
    else:
        value, sine_ratio = chebyshev(cos, round(factor))
        if isinstance(offset, Tensor):
            value = value * offset.cos() - sine_of(cos) * sine_ratio * offset.sin()
        elif offset:  # a number stays one: a tensor made of it would have to travel to the device in every step
            value = value * math.cos(offset) - sine_of(cos) * sine_ratio * math.sin(offset)
    return torch.where(branch < 0, 1, sign * value - 2 * branch)
