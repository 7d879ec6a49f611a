"""Margins that follow the sample or the training: AdaFace, MagFace, CurricularFace and MV-softmax."""

from typing import Annotated, ClassVar, Literal, Self

import torch
from torch import Tensor

from trainer.checked import Within
from trainer.errors import UserError
from trainer.losses.bounds import check_cosine_margin
from trainer.losses.margins import (
    AdditiveAngle,
    Case,
    Margin,
    Positives,
    Scale,
    Values,
    angle_boundary,
    cosine_boundary,
    monotone_cosine,
)
from trainer.losses.margins.cosine import KINDS_OWN, set_constant, spare_far_targets

# Running statistics of AdaFace, and norms 3.1 deviations from their mean, where z = -1 and 1 (h = 0.333).
_NORMS = {"norm_mean": 20.0, "norm_std": 4.0}
_LOW, _HIGH = 20.0 - 3.1 * 4.0, 20.0 + 3.1 * 4.0


class AdaFace(Margin):
    """Margin by image quality, for which |x| stands: s (cos(theta - m z) - m (1 + z)).

    z = clip(h (|x| - mu) / sigma, -1, 1), with running mean and deviation of the norms of the valid samples of the
    global batch. z is a constant to the gradient, as in the paper: dt/dc = s sin(theta - m z) / sin(theta).

    mu <- momentum mu + (1 - momentum) mu_batch: a new batch weighs 0.01, as in the authors' code (mk-minchul/AdaFace,
    config.py, t_alpha). By the letter of the paper's equation it would weigh 0.99, and nothing would be averaged. As in
    their code the norms are clipped to [0.001, 100], and the statistics start at 20 and 100.

    Beyond the edges: where theta < m z the angle counts as 0, so that the target does not change; the authors' code
    clips it at 0.001, which is the same. Where theta - m z > pi (z < 0) their code clips at pi - 0.001: the worst
    samples have no gradient. Here the target goes on falling as ArcFace's does (`monotone_cosine`).
    """

    formula = "s (cos(theta - m z) - m (1 + z)), z = clip(h (|x| - mu)/sigma, +-1)"
    source = "Kim et al. 2022, AdaFace, eq. 14 to 18"
    title = "AdaFace"
    demo: ClassVar = {"scale": 16.0, "margin": 0.4}
    demo_in_plane: ClassVar = {"margin": 0.1}
    panel = "adaptive"
    norm_tells = True
    cases = (
        Case(curve="AdaFace, $z = -1$", row="$m=0.4$, $z=-1$", norm=_LOW, values=_NORMS),
        Case(curve="AdaFace, $z = 1$", row="$m=0.4$, $z=1$", norm=_HIGH, values=_NORMS),
    )
    boundary = cosine_boundary("s", r"\cos(\theta_1-mz)-m(1+z)", "cos(theta_1 - m z) - m (1 + z)")

    name: Literal["adaface"] = "adaface"
    scale: Scale = 64.0
    margin: AdditiveAngle = 0.4
    concentration: Annotated[float, Within(gt=0)] = 0.333  # h
    momentum: Annotated[float, Within(ge=0, lt=1)] = 0.99  # share of the old value in the running statistics

    def buffers(self) -> dict[str, float]:
        return {"norm_mean": 20.0, "norm_std": 100.0}

    def observe(self, norms_B: Tensor, cos_B: Tensor | None, valid_B: Tensor, values: Values) -> dict[str, Tensor]:
        """Fewer than two valid samples have no deviation, and change nothing."""
        norms_B, count = norms_B.clamp(1e-3, 100), valid_B.sum()
        mean = torch.where(valid_B, norms_B, 0).sum() / count.clamp_min(1)
        square = torch.where(valid_B, (norms_B - mean) ** 2, 0).sum()
        std = (square / (count - 1).clamp_min(1)).sqrt()
        new = {"norm_mean": mean, "norm_std": std}
        share = (1 - self.momentum) * (count > 1)
        return {name: values[name] + share * (value.to(values[name]) - values[name]) for name, value in new.items()}

    def target(self, positives: Positives) -> Tensor:
        norms_B = positives.norms_B.detach().clamp(1e-3, 100)
        deviation_B = (norms_B - positives.values["norm_mean"]) / (positives.values["norm_std"] + 1e-3)
        z_B = (self.concentration * deviation_B).clamp(-1, 1)
        psi_B = monotone_cosine(positives.cos_B, 1.0, -self.margin * z_B)
        return self.scale_of({}) * (psi_B - self.margin * (1 + z_B))


class MagFace(Margin):
    """ArcFace whose margin grows with |x|, plus a pull towards long embeddings: a = |x| clamped to [lower, upper] norm.

    m(a) is linear from (lower_norm, lower_margin) to (upper_norm, upper_margin); L += weight_g g(a),
    g(a) = 1/a + a / upper_norm^2. The length learns too: dt/da = -s m'(a) sin(theta + m(a)), and
    dg/da = 1/upper_norm^2 - 1/a^2; both are 0 where |x| is outside the bounds.

    Beyond theta + m = pi as ArcFace. The authors' code (IrvingMeng/MagFace, magface.py) has another rule by default,
    which the paper does not: no margin, and no lesson for the length, where theta > 90 degrees. That is `easy_margin`.
    """

    formula = "s cos(theta + m(|x|)) and + lambda (1/|x| + |x|/u^2)"
    source = "Meng et al. 2021, MagFace, eq. 2 to 4"
    title = "MagFace"
    demo: ClassVar = {
        "scale": 16.0,
        "lower_norm": 1.0,
        "upper_norm": 20.0,
        "lower_margin": 0.3,
        "upper_margin": 0.6,
        "weight_g": 1.0,
    }
    demo_in_plane: ClassVar = {"lower_margin": 0.1, "upper_margin": 0.3}
    panel = "adaptive"
    norm_tells = True
    cases = (
        Case(curve=r"MagFace, $\Vert x\Vert = 10$", row=r"$\Vert x\Vert=10$, $m=0.45$", norm=10.0),
        Case(curve=r"MagFace, $\Vert x\Vert = 110$", row=r"$\Vert x\Vert=110$, $m=0.8$", norm=110.0),
    )
    boundary = angle_boundary(r"m(\Vert x\Vert)")
    eased = ("lower_margin", "upper_margin")

    name: Literal["magface"] = "magface"
    scale: Scale = 64.0
    lower_norm: Annotated[float, Within(gt=0)] = 10.0
    upper_norm: Annotated[float, Within(gt=0)] = 110.0
    lower_margin: AdditiveAngle = 0.45
    upper_margin: AdditiveAngle = 0.8
    weight_g: Annotated[float, Within(ge=0)] = 35.0  # lambda of g
    easy_margin: bool = False  # no margin beyond 90 degrees, as in the authors' code

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lower_norm >= self.upper_norm or self.lower_margin > self.upper_margin:
            raise UserError(
                f"norms {self.lower_norm} to {self.upper_norm} and margins {self.lower_margin} to {self.upper_margin}: "
                "the lower ones must come first"
            )

    def target(self, positives: Positives) -> Tensor:
        length_B = positives.norms_B.clamp(self.lower_norm, self.upper_norm)
        slope = (self.upper_margin - self.lower_margin) / (self.upper_norm - self.lower_norm)
        margin_B = self.lower_margin + slope * (length_B - self.lower_norm)
        psi_B = monotone_cosine(positives.cos_B, 1.0, margin_B)
        return self.scale_of({}) * (spare_far_targets(positives.cos_B, psi_B) if self.easy_margin else psi_B)

    def regularizer(self, norms_B: Tensor) -> Tensor:
        length_B = norms_B.clamp(self.lower_norm, self.upper_norm)
        return self.weight_g * (1 / length_B + length_B / self.upper_norm**2)


class CurricularFace(Margin):
    """ArcFace in which hard negatives count for more as training goes on.

    Another class is hard where cos(theta_j) > cos(theta_y + m); its cosine becomes cos(theta_j) (t + cos(theta_j)),
    with slope t + 2 cos(theta_j). t is a running mean of the cosines to the own centre,
    t <- 0.01 mean(cos(theta_y)) + 0.99 t, from 0, over the valid samples of the global batch, and a constant to the
    gradient. Costs one more message of [B]: every rank needs the target's cosine before its own negatives. Beyond
    theta + m = pi as ArcFace.
    """

    formula = "s cos(theta + m); hard negatives: s cos(theta_j) (t + cos(theta_j))"
    source = "Huang et al. 2020, CurricularFace, eq. 7 to 11"
    title = "CurricularFace"
    demo: ClassVar = {"scale": 16.0, "margin": 0.5}
    demo_in_plane: ClassVar = {"margin": 0.2}
    reweights = True
    panel = "reweighting"
    cases = (Case(curve="CurricularFace, $t = 0.5$", row="$m=0.5$", values={"t": 0.5}),)
    negatives = tuple(Case(curve=f"CurricularFace, $t = {t:g}$", values={"t": t}) for t in (0.0, 0.5, 1.0))
    boundary = angle_boundary("m")

    name: Literal["curricularface"] = "curricularface"
    scale: Scale = 64.0
    margin: AdditiveAngle = 0.5
    momentum: Annotated[float, Within(ge=0, lt=1)] = 0.99  # share of the old value in t

    def buffers(self) -> dict[str, float]:
        return {"t": 0.0}

    def observe(self, norms_B: Tensor, cos_B: Tensor | None, valid_B: Tensor, values: Values) -> dict[str, Tensor]:
        assert cos_B is not None
        count = valid_B.sum()
        mean = torch.where(valid_B, cos_B, 0).sum() / count.clamp_min(1)
        t = values["t"]
        return {"t": torch.where(count > 0, self.momentum * t + (1 - self.momentum) * mean.to(t), t)}

    def bound(self) -> tuple[float, float]:
        scale = float(self.scale_of({}))
        return -scale, 2 * scale  # c (t + c) with t and c in [-1, 1]

    def target(self, positives: Positives) -> Tensor:
        return self.scale_of({}) * monotone_cosine(positives.cos_B, 1.0, self.margin)

    def hard_cosine(self, values: Values) -> tuple[float, Tensor, float]:
        return 0.0, values["t"], 1.0


class MVSoftmax(Margin):
    """Mis-classified vectors count for more: CosFace (or ArcFace), and hard negatives w cos(theta_j) + w - 1.

    Another class is hard where its cosine is greater than the target's with margin; the slope is then w. Costs one
    more message of [B], as CurricularFace does. MV-Arc goes on beyond theta + m = pi as ArcFace.

    The authors' code (xiaoboCASIA/SV-X-Softmax, fc_layers.py) has the scale 32 of the default here, w = 1.2, the margin
    0.35 for both kinds, and by default a rule for poor targets that the paper does not have: a target at more than 90
    degrees keeps its plain cosine, while what is hard is still measured with the margin. That is `easy_margin`.
    """

    formula = "s (cos(theta) - m); hard negatives: s (w cos(theta_j) + w - 1)"
    source = "Wang et al. 2020, Mis-classified vector guided softmax loss, eq. 8 to 10"
    title = "MV-softmax"
    demo: ClassVar = {"scale": 16.0, "margin": 0.35}
    # In the plane, with a scale of 16, its hard negatives drive all classes into one another.
    demo_in_plane: ClassVar = {"margin": 0.1, "scale": 6.0}
    reweights = True
    panel = "reweighting"
    cases = (
        Case(curve="MV-AM, $m = 0.35$", row="$m=0.35$"),
        Case(curve="MV-Arc, $m = 0.5$", constants={"kind": "arc"}),
    )
    negatives = (Case(curve="MV-softmax, $w = 1.12$"),)
    boundary = cosine_boundary("s", r"\cos\theta_1-m", "cos(theta_1) - m")

    name: Literal["mv_softmax"] = "mv_softmax"
    kind: Literal["am", "arc"] = "am"
    scale: Scale = 32.0
    margin: AdditiveAngle = KINDS_OWN  # am: 0.35, of the cosine; arc: 0.5, of the angle in radians
    emphasis: Annotated[float, Within(ge=1, le=4)] = 1.12  # w
    easy_margin: bool = False  # no margin beyond 90 degrees, as in the authors' code

    def __post_init__(self) -> None:
        set_constant(self, "margin", 0.35 if self.kind == "am" else 0.5)
        super().__post_init__()

    def resolve(self, classes: int, dimension: int) -> Self:
        if self.kind == "am":
            check_cosine_margin(self.name, self.margin, classes, dimension)
        return self

    def bound(self) -> tuple[float, float]:
        scale = float(self.scale_of({}))
        return -scale, scale * (2 * self.emphasis - 1)

    def hard_from(self, positives: Positives) -> Tensor:
        if self.kind == "am":
            return positives.cos_B - self.margin
        return monotone_cosine(positives.cos_B, 1.0, self.margin)

    def target(self, positives: Positives) -> Tensor:
        psi_B = self.hard_from(positives)
        return self.scale_of({}) * (spare_far_targets(positives.cos_B, psi_B) if self.easy_margin else psi_B)

    def hard_cosine(self, values: Values) -> tuple[float, float, float]:
        return self.emphasis - 1, self.emphasis, 0.0
