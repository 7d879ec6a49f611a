"""A small network trained on scikit-learn's handwritten digits, to look at what a loss does to embeddings.

The losses, their class centres and the centres' optimizer are the project's own, on one process. Only the network and
its loop are made for this: 1797 images of 8 x 8 pixels need no shards and no engine.

Legend: N samples, C = 10 classes, K centres a class, D dimension of the embedding.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.config import BackboneConfig, Config, DataConfig, OptimizerConfig, RunConfig, ScalingConfig, from_tree
from trainer.errors import UserError
from trainer.evaluation.geometry import Angles, angles, class_means
from trainer.losses import by_name
from trainer.losses.projections import ProjectedTriplet
from trainer.objective import Objective

CLASSES = 10
TEST_SHARE = 0.3
BATCH = 128
NETWORK_LR, HEAD_LR = 2e-3, 2e-2
MARGIN_WARMUP = 0.3  # share of the steps over which additive margins grow to their value

Matrix = NDArray[np.float64]
Labels = NDArray[np.int64]
Show = Callable[[int, int], None]

# Constants for ten classes and a few hundred steps, where they differ from the losses' defaults, which are for many
# thousand classes. The scale is 2.6 times `theory.cosface_scale(10, 0.99)`. A lambda schedule is given per run, see
# `settings`.
# The default gamma of center_invariant leaves ten centres nearly where centre loss has them: in the plane the standard
# deviation of their lengths is 0.27 of the mean after 600 steps, with centre loss 0.3. With this gamma it is less than
# 0.04, and alpha gamma |c|^2 is at most 0.4, well below the 1 at which it becomes unstable.
_SCALE = 16.0
_CONSTANTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "l_softmax": {"margin": 4},
        "a_softmax": {"margin": 4, "lambda_min": 0.0},
        "l2_softmax": {"alpha": _SCALE},
        "normface": {"scale": _SCALE},
        "cosface": {"scale": _SCALE, "margin": 0.35},
        "arcface": {"scale": _SCALE, "margin": 0.5},
        "combined": {"scale": _SCALE, "m2": 0.3, "m3": 0.2},
        "sub_center_arcface": {"scale": _SCALE, "margin": 0.5, "centres": 2},
        "adaface": {"scale": _SCALE, "margin": 0.4},
        "magface": {
            "scale": _SCALE,
            "lower_norm": 1.0,
            "upper_norm": 20.0,
            "lower_margin": 0.3,
            "upper_margin": 0.6,
            "weight_g": 1.0,
        },
        "elasticface": {"scale": _SCALE, "margin": 0.5, "sigma": 0.05},
        "dynamic": {"scale": _SCALE},
        "center_invariant": {"gamma": 5e-3},
        "curricularface": {"scale": _SCALE, "margin": 0.5},
        "mv_softmax": {"scale": _SCALE, "margin": 0.35},
        "tse": {"frozen": True},
        "tpe": {"frozen": True},
    }
)
# Ten centres in the plane are 36 degrees apart, which leaves less room: CosFace allows at most 1 - cos(36 deg) = 0.19.
_IN_THE_PLANE: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "cosface": {"margin": 0.1},
        "arcface": {"margin": 0.2},
        "combined": {"m2": 0.1, "m3": 0.05},
        "sub_center_arcface": {"margin": 0.2},
        "adaface": {"margin": 0.1},
        "magface": {"lower_margin": 0.1, "upper_margin": 0.3},
        "elasticface": {"margin": 0.2, "sigma": 0.02},
        "dynamic": {"greatest": 0.2},
        "curricularface": {"margin": 0.2},
        "mv_softmax": {"margin": 0.1, "scale": 6.0},  # with 16 its hard negatives drive all classes into one another
        "contrastive": {"margin": 0.6},
        "marginal": {"theta": 0.2, "xi": 0.1},
        "range": {"margin": 0.3},
    }
)
# Auxiliary losses, and their weights: alone they do not train a network (centre losses), or are for embeddings that
# another loss has learned (the projections of TSE and TPE, frozen below).
_BESIDE_SOFTMAX: Mapping[str, float] = MappingProxyType(
    {"center": 0.1, "center_invariant": 0.1, "range": 0.1, "tse": 1.0, "tpe": 1.0}
)


@dataclass(frozen=True)
class Split:
    """Images [N, 1, 8, 8] in [-1, 1] and labels of training and test samples, stratified by class."""

    train_images_NCHW: Tensor
    train_labels_N: Tensor
    test_images_NCHW: Tensor
    test_labels_N: Tensor


@dataclass(frozen=True)
class Centres:
    """The class centres as the loss uses them: a decision is the class with the greatest score.

    Attributes:
        rows_CKD: unit vectors where the loss has unit centres.
        bias_C: zeros where there is none.
        scale: the length given to embeddings, or None where they enter as they are.
    """

    rows_CKD: Matrix
    bias_C: Matrix
    scale: float | None

    def scores(self, x_ND: Matrix) -> Matrix:
        """The logits without margin, [N, C]."""
        if self.scale is not None:
            x_ND = self.scale * x_ND / np.maximum(np.linalg.norm(x_ND, axis=1, keepdims=True), 1e-12)
        dots_NCK = np.einsum("nd,ckd->nck", x_ND, self.rows_CKD)
        return np.asarray(dots_NCK.max(axis=2) + self.bias_C)


@dataclass(frozen=True)
class Trained:
    """What one training left: the embeddings, and the class centres if the loss has them.

    Attributes:
        centres: those that decide, of a margin or of the softmax beside an auxiliary loss.
        learned_CD: those that a centre loss lets follow its samples, at their place among the embeddings.
    """

    name: str
    family: str
    angular: bool
    train_ND: Matrix
    train_labels_N: Labels
    test_ND: Matrix
    test_labels_N: Labels
    centres: Centres | None
    learned_CD: Matrix | None
    losses: tuple[float, ...]

    @property
    def mean_directions_CD(self) -> Matrix:
        """The directions of the class means of the unit training embeddings."""
        means_CD = class_means(_unit(self.train_ND), self.train_labels_N, CLASSES)
        return _unit(means_CD)

    def accuracy_by_centres(self) -> float | None:
        """Share of test samples whose greatest logit is their own class's; None without class centres."""
        if self.centres is None:
            return None
        return float(np.mean(self.centres.scores(self.test_ND).argmax(axis=1) == self.test_labels_N))

    def accuracy_by_means(self) -> float:
        """Share of test samples nearest, by the cosine, to the training mean of their own class."""
        return float(np.mean((self.test_ND @ self.mean_directions_CD.T).argmax(axis=1) == self.test_labels_N))

    def angles(self) -> Angles:
        """Of the test embeddings, about their own class means."""
        return angles(self.test_ND, self.test_labels_N)

    def scores(self, x_ND: Matrix) -> Matrix:
        """What decides: the centres' logits, or the cosines to the class means where there are none."""
        if self.centres is not None:
            return self.centres.scores(x_ND)
        return _unit(x_ND) @ self.mean_directions_CD.T


def load(seed: int) -> Split:
    """70 % of the digits of each class to train on, 30 % to test on; the seed chooses which.

    Raises:
        UserError: scikit-learn, which carries the digits, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise UserError("the digits come with scikit-learn, which is missing; pip install scikit-learn") from error
    digits = load_digits()
    images_NCHW = (digits.images.astype(np.float32) / 8 - 1)[:, None]
    parts = train_test_split(
        images_NCHW, digits.target.astype(np.int64), test_size=TEST_SHARE, stratify=digits.target, random_state=seed
    )
    train, test, train_labels, test_labels = (torch.from_numpy(part) for part in parts)
    return Split(train, train_labels, test, test_labels)


def settings(name: str, dimension: int, steps: int, **changes: Any) -> Config:
    """The Config under which a loss is trained on the digits.

    Centre losses join softmax, with their weight; TSE and TPE learn their projection from the embeddings that softmax
    learns. L-Softmax and A-Softmax are eased in by
    lambda = 100 (1 + 8 step / steps)^-4, which ends at 0.015.

    Args:
        name: of the loss, as in `hypersphere losses`.
        changes: constants of the loss that differ from the ones used here.

    Raises:
        UserError: no such loss, or a constant that it does not allow.
    """
    known = by_name()
    if name not in known:
        raise UserError(f"loss '{name}' is not known; allowed: {', '.join(known)}")
    constants = dict(_CONSTANTS.get(name, {}))
    if dimension == 2:
        constants |= _IN_THE_PLANE.get(name, {})
    if "lambda_min" in known[name].model_fields:
        constants |= {"lambda_start": 100.0, "lambda_gamma": 8 / steps, "lambda_power": 4.0}
    loss = {"name": name, **constants, **changes}
    tree: dict[str, Any] = {"loss": loss}
    if name in _BESIDE_SOFTMAX:
        tree = {"loss": "softmax", "auxiliary": [{"weight": _BESIDE_SOFTMAX[name], **loss}]}
    return from_tree(
        tree
        | {
            "backbone": BackboneConfig(dimension=dimension),
            "optimizer": OptimizerConfig(head_lr=HEAD_LR, head_weight_decay=0.0),
            "data": DataConfig(batch_size=BATCH),
            "scaling": ScalingConfig(workers=1),
        }
    )


def train(config: Config, steps: int, seed: int, split: Split | None = None, show: Show | None = None) -> Trained:
    """Train the network under a config's losses for some steps of 128 samples, and embed both parts.

    The seed chooses the split (where none is given), the first weights and the order. Same seed, same result.

    Args:
        show: called with (step, steps) as it goes on.

    Raises:
        UserError: the loss has become NaN or infinite.
    """
    split = split or load(seed)
    config = config.model_copy(update={"run": RunConfig(seed=seed)})
    torch.manual_seed(seed)
    network = _network(config.backbone.dimension)
    counts = torch.bincount(split.train_labels_N, minlength=CLASSES).tolist()
    objective = Objective(config, CLASSES, counts, torch.device("cpu"))
    optimizer = torch.optim.AdamW(network.parameters(), lr=NETWORK_LR, weight_decay=5e-4, fused=True)
    losses: list[Tensor] = []
    for step, chosen_B in enumerate(_batches(len(split.train_labels_N), steps, seed)):
        factor = 1 - step / steps
        optimizer.param_groups[0]["lr"] = NETWORK_LR * factor
        objective.set_progress(step, min(1.0, step / (MARGIN_WARMUP * steps)))
        x_BD = network(split.train_images_NCHW[chosen_B])
        loss, _ = objective(x_BD, split.train_labels_N[chosen_B], [f"digit {i}" for i in chosen_B.tolist()])
        optimizer.zero_grad()
        objective.prepare(HEAD_LR * factor)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        objective.step(HEAD_LR * factor)
        losses.append(loss.detach())
        if show is not None:
            show(step + 1, steps)
    history = torch.stack(losses)
    if not bool(history.isfinite().all()):
        raise UserError(f"{config.loss.name}: the loss is not finite; lower the scale or the margin")
    return _finish(config, network, objective, split, tuple(history.tolist()))


def _network(dimension: int) -> nn.Module:
    """64 - 256 - 128 - D, with batch norm inside; the embedding itself is a plain linear map, free in its length."""
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.PReLU()),
        *(nn.Linear(256, 128), nn.BatchNorm1d(128), nn.PReLU()),
        nn.Linear(128, dimension),
    )


def _batches(samples: int, steps: int, seed: int) -> list[Tensor]:
    """Positions of the samples of each step: shuffled anew each epoch, full batches only."""
    generator = torch.Generator().manual_seed(seed)
    batches: list[Tensor] = []
    while len(batches) < steps:
        order_N = torch.randperm(samples, generator=generator)
        batches += torch.split(order_N[: samples - samples % BATCH], BATCH)
    return batches[:steps]


@torch.no_grad()
def _finish(
    config: Config, network: nn.Module, objective: Objective, split: Split, losses: tuple[float, ...]
) -> Trained:
    embedder = objective.embedder(network).eval()
    shown = config.auxiliary[0] if config.auxiliary else config.loss
    centres = _centres(config, objective)
    learned = objective.learned_centres(torch.arange(CLASSES))
    return Trained(
        name=shown.name,
        family=shown.family,
        angular=centres is None or centres.scale is not None,
        train_ND=embedder(split.train_images_NCHW).double().numpy(),
        train_labels_N=split.train_labels_N.numpy(),
        test_ND=embedder(split.test_images_NCHW).double().numpy(),
        test_labels_N=split.test_labels_N.numpy(),
        centres=centres,
        learned_CD=None if learned is None else learned.double().numpy(),
        losses=losses,
    )


def _centres(config: Config, objective: Objective) -> Centres | None:
    """The class centres of the config's margin; None of pair losses, and where a projection of what softmax has
    learned is compared."""
    found = objective.centres(torch.arange(CLASSES))
    if found is None or any(isinstance(spec, ProjectedTriplet) for spec in config.auxiliary):
        return None
    return Centres(found.rows_cKD.double().numpy(), found.bias_c.double().numpy(), found.scale)


def _unit(rows: Matrix) -> Matrix:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12))
