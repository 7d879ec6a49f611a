"""What is measured while training runs: rank-1 and open-set errors on held-out identities, and neural collapse.

Legend: c classes that are measured, N samples of all ranks, D dimension.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.config import Config
from trainer.data.augment import to_float
from trainer.data.manifest import Manifest
from trainer.data.stream import PADDING, Batch, Stream, training_split
from trainer.distributed import Group
from trainer.errors import UserError
from trainer.evaluation.geometry import class_means, neural_collapse
from trainer.evaluation.protocols import quick
from trainer.objective import Objective

# The figures of a training in progress need no more, and their cost grows with the square.
MOST_SAMPLES = 20_000
MOST_CLASSES = 512
SAMPLES_A_CLASS = 8
# Images that are measured for each that is trained on. Embedding one and what is computed with it takes 0.3 to 0.45 of
# a step on CPUs (a forward pass is a third): together within 5 % of the time. The least is what FNIR at FPIR 1 % takes,
# 300 searches by strangers and as many by others: with fewer than 16,000 images between two evaluations they cost more.
MEASURED_SHARE = 0.08
LEAST_SAMPLES = 640
_CLASSES_A_STEP = 32
RANK1, FNIR = "val/rank1", "val/fnir_at_fpir_1pct"
GREATER_IS_BETTER = {RANK1: True, FNIR: False}


class Monitor:
    """The measurements of a run that its config asks for; held-out images are decoded once.

    Args:
        config: names the splits.
        group: the ranks, each of which embeds its part.

    Raises:
        UserError: neural collapse is asked for, and an identity has a single image.
    """

    def __init__(self, config: Config, manifest: Manifest, group: Group) -> None:
        data, split = config.data, manifest.splits.get(config.data.val_split)
        self._group, self._bf16 = group, config.engine.bf16
        most = measured_at_most(config, training_split(manifest, data).samples)
        self._batches = -(-min(MOST_SAMPLES, most) // data.batch_size)
        self._held_out = self._collapse = None
        if config.run.eval_every and split is not None and split.samples:
            rank, size = group.rank, group.size
            self._held_out = Stream(manifest, data.val_split, data, shuffle=False, rank=rank, world_size=size)
        if config.run.collapse:
            self._collapse = Collapse(config, manifest, group)

    def __bool__(self) -> bool:
        """Whether there is anything to measure."""
        return self._held_out is not None or self._collapse is not None

    @property
    def ranking(self) -> dict[str, bool]:
        """The metrics of held-out identities by which models can be ranked: whether the greater one is better."""
        return GREATER_IS_BETTER if self._held_out is not None else {}

    def __call__(self, backbone: nn.Module, objective: Objective, device: torch.device) -> dict[str, float]:
        """All measures by name. A collective; the same numbers on every rank."""
        values: dict[str, float] = {}
        if self._held_out is not None:
            embedder = objective.geometry().embedder(backbone)
            batches = islice(self._held_out.batches(0), self._batches)
            x_ND, labels_N = embed(embedder, batches, self._group, device, self._bf16)
            part = slice(self._group.rank, None, self._group.size)
            x_ND = nn.functional.normalize(x_ND)
            values[RANK1], fnir = quick(x_ND.numpy(), labels_N.numpy(), part, partial(_together, self._group, device))
            if fnir is not None:
                values[FNIR] = fnir
        if self._collapse is not None:
            values |= self._collapse(backbone, objective, device)
        return values


def measured_at_most(config: Config, trained: int) -> int:
    """Images of each kind, held out and trained on, that an evaluation may embed: half of `MEASURED_SHARE` each."""
    between = trained * max(1, min(config.run.eval_every, config.run.epochs))
    return max(LEAST_SAMPLES, round(MEASURED_SHARE * between / 2))


def _together(group: Group, device: torch.device, found_P: NDArray[np.floating]) -> NDArray[np.floating]:
    """What the probes of all ranks found, of which each has searched some: rank r the r-th and every W-th after it."""
    if group.size == 1:
        return found_P
    counts = group.all_gather(torch.tensor([len(found_P)], device=device)).cpu()
    padded = torch.full((int(counts.max()),), float("nan"), dtype=torch.float64, device=device)
    padded[: len(found_P)] = torch.from_numpy(found_P)
    every = group.all_gather(padded).cpu().numpy()
    return np.asarray(every[~np.isnan(every)])


@torch.no_grad()
def embed(
    model: nn.Module, batches: Iterable[Batch], group: Group, device: torch.device, bf16: bool
) -> tuple[Tensor, Tensor]:
    """Embeddings [N, D] in fp32 and labels [N] of all ranks' batches, on the CPU, without padding.

    Args:
        bf16: under autocast, as in training.
    """
    vectors: list[Tensor] = []
    labels: list[Tensor] = []
    training = model.training
    model.eval()
    for batch in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            x_bD = model(to_float(batch.images_BCHW.to(device)))
        vectors.append(group.all_gather(x_bD.float()).cpu())
        labels.append(group.all_gather(batch.labels_B.to(device)).cpu())
    model.train(training)
    labels_N = torch.cat(labels)
    real_N = labels_N != PADDING
    return torch.cat(vectors)[real_N], labels_N[real_N]


class Collapse:
    """A bounded sample of the training images, the same at every evaluation, and how near it is to a simplex frame.

    Up to 512 identities, chosen by the run's seed, with up to 8 images each, without augmentation: at most 4096 images
    go through the backbone, shared by the ranks, one all-reduce fetches the classes' centres, and D x D eigenvectors
    are taken once. Every identity is measured on equally many different images, as many as the smallest one of the
    split has, and each image counts once, on any number of ranks.
    """

    def __init__(self, config: Config, manifest: Manifest, group: Group) -> None:
        split = training_split(manifest, config.data)
        least = int(split.classes.by_size()[-1])
        self._each = min(SAMPLES_A_CLASS, int(split.classes.counts()[least]))
        if self._each < 2:
            raise UserError(
                f"run.collapse compares images of one identity, but '{split.classes[least]}' has {self._each}; "
                "import with --min-samples 2, or set run.collapse=false"
            )
        self._group, self._bf16 = group, config.engine.bf16
        affordable = measured_at_most(config, split.samples) // self._each
        self._classes = min(MOST_CLASSES, split.identities, max(2, affordable))
        self._together = min(_CLASSES_A_STEP, -(-self._classes // group.size))
        self._steps = -(-self._classes // self._together)
        size = {"batch_size": self._together * self._each, "identities_per_batch": self._together}
        data = config.data.model_copy(update=size | {"cache": "none"})
        # Whole batches are dealt out to the ranks, not parts of them: identities and images are then the same on any
        # number of ranks. The first groups of an epoch of P x K batches are all identities, in random order.
        self._stream = Stream(manifest, data.train_split, data, seed=config.run.seed)

    def __call__(self, backbone: nn.Module, objective: Objective, device: torch.device) -> dict[str, float]:
        """The measures of neural collapse by name, on embeddings as the losses compare them."""
        geometry = objective.geometry()
        model = geometry.compared(backbone)
        x_ND, labels_N = embed(model, self._batches(), self._group, device, self._bf16)
        classes_c, index_N = np.unique(labels_N.numpy(), return_inverse=True)
        centres = None if geometry.centres is None else geometry.centres(torch.from_numpy(classes_c))
        features_ND = geometry.placed(x_ND.double().numpy(), centres)
        if centres is None:
            measures = neural_collapse(features_ND, index_N)
        else:
            rows_cD = centres.nearest(class_means(features_ND, index_N, len(classes_c)))
            measures = neural_collapse(features_ND, index_N, rows_cD, centres.bias_c)
        return {f"neural_collapse/{name}": value for name, value in measures.items()}

    def _batches(self) -> Iterator[Batch]:
        """This rank's batches; beyond the last identity, some images whose label is `PADDING`."""
        for first in range(0, self._steps, self._group.size):
            step = first + self._group.rank
            batch = self._stream.batch(0, step % self._steps)
            identity_B = step * self._together + batch.rows_B // self._each
            yield replace(batch, labels_B=torch.where(identity_B < self._classes, batch.labels_B, PADDING))
