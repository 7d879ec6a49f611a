"""The papers' formulas, one sample and one class at a time in float64: what the head is compared with."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.losses import LossSpec


@dataclass
class World:
    """Everything that a loss of the family may depend on besides its constants.

    Attributes:
        x: [B, D]; w: [C, K, D]; bias: [C]; labels: -1 is padding.
        scalars: learnable scale or alpha.
        running: AdaFace's mean and deviation, CurricularFace's t, *before* this batch.
        relaxation: lambda of L- and A-Softmax.
    """

    x: Tensor
    w: Tensor
    bias: Tensor
    labels: Sequence[int]
    counts: Sequence[int]
    noise: Tensor
    scalars: Mapping[str, Tensor] = field(default_factory=dict)
    running: Mapping[str, float] = field(default_factory=dict)
    relaxation: float = 0.0


def unit(v: Tensor) -> Tensor:
    return v / v.norm()


def cosine(world: World, i: int, j: int) -> Tensor:
    """cos(theta_ij), of the nearest centre."""
    best = unit(world.x[i]) @ unit(world.w[j, 0])
    for k in range(1, world.w.shape[1]):
        other = unit(world.x[i]) @ unit(world.w[j, k])
        best = other if bool(other > best) else best
    return best


def psi(theta: Tensor, factor: float, offset: float | Tensor = 0.0) -> Tensor:
    """(-1)^k cos(phi) - 2k, by trying the branches one after another."""
    phi = factor * theta + offset
    if bool(phi < 0):
        return torch.ones_like(phi)
    k = 0
    while bool(phi > (k + 1) * math.pi):
        k += 1
    return (-1) ** k * torch.cos(phi) - 2 * k


def quality(spec: LossSpec, world: World) -> list[Tensor]:
    """AdaFace's z of each sample."""
    norms = [world.x[i].norm().detach().clamp(0.001, 100) for i in range(len(world.labels))]
    valid = [norms[i] for i, label in enumerate(world.labels) if label >= 0]
    mean = sum(valid) / len(valid)
    deviation = (sum((n - mean) ** 2 for n in valid) / (len(valid) - 1)) ** 0.5
    mean = spec.momentum * world.running["norm_mean"] + (1 - spec.momentum) * mean
    deviation = spec.momentum * world.running["norm_std"] + (1 - spec.momentum) * deviation
    return [(spec.concentration * (n - mean) / (deviation + 1e-3)).clamp(-1, 1) for n in norms]


def dealt_out(world: World) -> dict[int, Tensor]:
    """ElasticFace+: the least noise for the sample nearest to its centre, and so on."""
    valid = [i for i, label in enumerate(world.labels) if label >= 0]
    noise = sorted((world.noise[i] for i in valid), key=float)
    valid.sort(key=lambda i: float(cosine(world, i, world.labels[i]).detach()), reverse=True)
    return dict(zip(valid, noise, strict=True))


def logits(spec: LossSpec, world: World, i: int) -> list[Tensor]:
    """All logits of sample i, the target's with its margin."""
    x, y, classes = world.x[i], world.labels[i], range(len(world.w))
    name = spec.name
    if name in ("softmax", "weighted_softmax", "focal"):
        return [x @ world.w[j, 0] + world.bias[j] for j in classes]
    if name == "l2_softmax":
        alpha = world.scalars.get("alpha", spec.alpha)
        return [alpha * (unit(x) @ world.w[j, 0]) + world.bias[j] for j in classes]
    cos = [cosine(world, i, j) for j in classes]
    theta = torch.acos(cos[y])
    if name in ("modified_softmax", "a_softmax"):
        z = [x.norm() * cos[j] for j in classes]
        if name == "a_softmax":
            z[y] = x.norm() * (world.relaxation * cos[y] + psi(theta, spec.margin)) / (1 + world.relaxation)
        return z
    if name == "l_softmax":
        z = [x @ world.w[j, 0] for j in classes]
        eased = (world.relaxation * cos[y] + psi(theta, spec.margin)) / (1 + world.relaxation)
        z[y] = x.norm() * world.w[y, 0].norm() * eased
        return z
    scale = world.scalars.get("scale", spec.scale)
    target = target_cosine(spec, world, i, theta)
    others = list(cos)
    if name == "curricularface":
        valid = [k for k, label in enumerate(world.labels) if label >= 0]
        mean = sum(float(cosine(world, k, world.labels[k]).detach()) for k in valid) / len(valid)
        t = spec.momentum * world.running["t"] + (1 - spec.momentum) * mean
        others = [c * (t + c) if bool(c > target) else c for c in cos]
    if name == "mv_softmax":
        margined = cos[y] - spec.margin if spec.kind == "am" else psi(theta, 1, spec.margin)
        others = [spec.emphasis * c + spec.emphasis - 1 if bool(c > margined) else c for c in cos]
    return [scale * (target if j == y else others[j]) for j in classes]


def target_cosine(spec: LossSpec, world: World, i: int, theta: Tensor) -> Tensor:
    """What stands in place of cos(theta) for the target."""
    name, y = spec.name, world.labels[i]
    if getattr(spec, "easy_margin", False) and bool(theta > math.pi / 2):
        return torch.cos(theta)
    if name == "normface":
        return torch.cos(theta)
    if name in ("cosface", "mv_softmax"):
        return torch.cos(theta) - spec.margin if getattr(spec, "kind", "am") == "am" else psi(theta, 1, spec.margin)
    if name in ("arcface", "sub_center_arcface", "curricularface"):
        return psi(theta, 1, spec.margin)
    if name == "combined":
        return psi(theta, spec.m1, spec.m2) - spec.m3
    if name == "dynamic":
        rarity = [n**-spec.power for n in world.counts]
        share = (rarity[y] - min(rarity)) / (max(rarity) - min(rarity))
        return psi(theta, 1, spec.least + share * (spec.greatest - spec.least))
    if name == "elasticface":
        margin = spec.margin + spec.sigma * (dealt_out(world)[i] if spec.plus else world.noise[i])
        return psi(theta, 1, margin) if spec.kind == "arc" else torch.cos(theta) - margin
    if name == "adaface":
        z = quality(spec, world)[i]
        return psi(theta, 1, -spec.margin * z) - spec.margin * (1 + z)
    assert name == "magface"
    length = world.x[i].norm().clamp(spec.lower_norm, spec.upper_norm)
    slope = (spec.upper_margin - spec.lower_margin) / (spec.upper_norm - spec.lower_norm)
    return psi(theta, 1, spec.lower_margin + slope * (length - spec.lower_norm))


def sample_loss(spec: LossSpec, world: World, i: int) -> Tensor:
    """-log p of the target, with what the loss makes of it."""
    z, y = logits(spec, world, i), world.labels[i]
    top = max(float(v.detach()) for v in z)
    log_p = z[y] - top - torch.log(sum(torch.exp(v - top) for v in z))
    if spec.name == "focal":
        return -((1 - log_p.exp()) ** spec.gamma) * log_p
    if spec.name == "weighted_softmax":
        weights = [n**-spec.power for n in world.counts]
        mean = sum(w * n for w, n in zip(weights, world.counts, strict=True)) / sum(world.counts)
        return -weights[y] / mean * log_p
    if spec.name == "magface":
        length = world.x[i].norm().clamp(spec.lower_norm, spec.upper_norm)
        return -log_p + spec.weight_g * (1 / length + length / spec.upper_norm**2)
    return -log_p


def mean_loss(spec: LossSpec, world: World) -> Tensor:
    """The mean over the samples that are not padding."""
    losses = [sample_loss(spec, world, i) for i, label in enumerate(world.labels) if label >= 0]
    return sum(losses) / len(losses)
