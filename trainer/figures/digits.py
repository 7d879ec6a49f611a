"""A small network trained on scikit-learn's handwritten digits, to look at what a loss does to embeddings.

The losses, their class centres and the centres' optimizer are the project's own, on one process. Only the network and
its loop are made for this: 1797 images of 8 x 8 pixels need no shards and no engine.

Legend: N samples, C = 10 classes, K centres a class, D dimension of the embedding.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.config import BackboneConfig, Config, RunConfig, from_tree
from trainer.data.stream import DataConfig
from trainer.errors import UserError
from trainer.evaluation.geometry import Angles, angles, class_means
from trainer.head.settings import HeadConfig, HeadOptimizerConfig
from trainer.losses import by_name
from trainer.objective import Objective
from trainer.objective.geometry import ClassCentres, of_length
from trainer.scaling import ScalingConfig

CLASSES = 10
TEST_SHARE = 0.3
BATCH = 128
NETWORK_LR, HEAD_LR = 2e-3, 2e-2
MARGIN_WARMUP = 0.3  # share of the steps over which margins grow to their value

Matrix = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Digits:
    """Images [N, 1, 8, 8] in [-1, 1] and labels of training and test samples, stratified by class."""

    train_images_NCHW: Tensor
    train_labels_N: Tensor
    test_images_NCHW: Tensor
    test_labels_N: Tensor


@dataclass(frozen=True)
class Trained:
    """What one training left: the embeddings, and the class centres if the loss has them.

    Attributes:
        title: the loss for people, and what else tells it from its neighbours.
        angular: only directions decide.
        centres: those that decide, of a margin or of the softmax beside an auxiliary loss.
        learned_CD: those that a centre loss lets follow its samples, at their place among the embeddings.
    """

    name: str
    title: str
    angular: bool
    train_ND: Matrix
    train_labels_N: Labels
    test_ND: Matrix
    test_labels_N: Labels
    centres: ClassCentres | None
    learned_CD: Matrix | None
    losses: tuple[float, ...]

    @property
    def mean_directions_CD(self) -> Matrix:
        """The directions of the class means of the unit training embeddings."""
        return of_length(class_means(of_length(self.train_ND, 1.0), self.train_labels_N, CLASSES), 1.0)

    @property
    def centres_MD(self) -> Matrix:
        """The class centres, of which a class may have several; the directions of the means where there are none."""
        if self.centres is None:
            return self.mean_directions_CD
        return self.centres.rows_cKD.reshape(-1, self.test_ND.shape[1])

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
        return of_length(x_ND, 1.0) @ self.mean_directions_CD.T


def load(seed: int) -> Digits:
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
    return Digits(train, train_labels, test, test_labels)


def settings(name: str, dimension: int, steps: int, **changes: Any) -> Config:
    """The Config under which a loss is trained on the digits.

    Its constants are those that its class gives for few classes. A loss that trains no network alone joins softmax.

    Args:
        name: of the loss, as in `hypersphere losses`.
        changes: constants of the loss that differ from the ones used here.

    Raises:
        UserError: no such loss, or a constant that it does not allow.
    """
    known = by_name()
    if name not in known:
        raise UserError(f"loss '{name}' is not known; allowed: {', '.join(known)}")
    spec = known[name]
    loss = {"name": name, **spec.demo_constants(dimension, steps), **changes}
    tree: dict[str, Any] = {
        "loss": loss,
        "backbone": BackboneConfig(dimension=dimension),
        "head": HeadConfig(optimizer=HeadOptimizerConfig(lr=HEAD_LR, weight_decay=0.0)),
        "data": DataConfig(batch_size=BATCH),
        "scaling": ScalingConfig(workers=1),
    }
    if spec.beside_softmax is not None:
        tree |= {"loss": "softmax", "auxiliary": [{"weight": spec.beside_softmax, **loss}]}
    return from_tree(tree)


def train(config: Config, steps: int, seed: int, split: Digits) -> Trained:
    """Train the network under a config's losses for some steps of 128 samples, and embed both parts.

    The seed chooses the first weights and the order. Same seed, same result.

    Raises:
        UserError: the loss has become NaN or infinite.
    """
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
    config: Config, network: nn.Module, objective: Objective, split: Digits, losses: tuple[float, ...]
) -> Trained:
    geometry, every_C = objective.geometry(), torch.arange(CLASSES)
    embedder = geometry.embedder(network).eval()
    shown = config.auxiliary[0] if config.auxiliary else config.loss
    # None of pair losses, and where a projection of what softmax has learned is compared.
    decides = geometry.centres if geometry.projection_nD is None else None
    centres = None if decides is None else decides(every_C)
    return Trained(
        name=shown.name,
        title=shown.title,
        angular=centres is None or centres.scale is not None,
        train_ND=embedder(split.train_images_NCHW).double().numpy(),
        train_labels_N=split.train_labels_N.numpy(),
        test_ND=embedder(split.test_images_NCHW).double().numpy(),
        test_labels_N=split.test_labels_N.numpy(),
        centres=centres,
        learned_CD=None if geometry.followed is None else geometry.followed(every_C),
        losses=losses,
    )
