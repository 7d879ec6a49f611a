"""Neural collapse while training runs: how near features and class centres are to a simplex frame.

Legend: c classes that are measured, n samples, K centres a class, D dimension.
"""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from trainer.config import Config
from trainer.data.augment import to_float
from trainer.data.batch import PADDING, Batch
from trainer.data.manifest import Manifest
from trainer.data.stream import Stream
from trainer.distributed import Group
from trainer.errors import UserError
from trainer.evaluation.geometry import class_means, neural_collapse
from trainer.objective import Objective
from trainer.objective.members import ClassCentres

MOST_CLASSES = 512
SAMPLES_A_CLASS = 8
_CLASSES_A_STEP = 32


class Collapse:
    """A bounded sample of the training images, the same at every evaluation, and what is measured on it.

    Up to 512 identities, chosen by the run's seed, with up to 8 images each, without augmentation: at most 4096 images
    go through the backbone, shared by the ranks, one all-reduce fetches the classes' centres, and D x D eigenvectors
    are taken once. Every identity is measured on equally many different images, as many as the smallest one of the
    split has, and each image counts once, on any number of ranks.

    Args:
        config: names the training split.
        group: the ranks, each of which embeds its part.

    Raises:
        UserError: an identity has a single image, so that nothing can be measured within it.
    """

    def __init__(self, config: Config, manifest: Manifest, group: Group) -> None:
        split = manifest.split(config.data.train_split)
        counts = np.asarray(split.class_counts)
        self._each = min(SAMPLES_A_CLASS, int(counts.min()))
        if self._each < 2:
            least = split.classes[int(counts.argmin())]
            raise UserError(
                f"run.collapse compares images of one identity, but '{least}' has {counts.min()}; "
                "import with --min-samples 2, or set run.collapse=false"
            )
        self._group, self._bf16 = group, config.engine.bf16
        self._classes = min(MOST_CLASSES, len(counts))
        self._together = min(_CLASSES_A_STEP, -(-self._classes // group.size))
        self._steps = -(-self._classes // self._together)
        data = config.data.model_copy(
            update={
                "batch_size": self._together * self._each,
                "identities_per_batch": self._together,
                "cache": "none",
            }
        )
        # Whole batches are dealt out to the ranks, not parts of them: identities and images are then the same on any
        # number of ranks. The first groups of an epoch of P x K batches are all identities, in random order.
        self._stream = Stream(data.path, manifest, data.train_split, data, seed=config.run.seed)

    def __call__(self, backbone: nn.Module, objective: Objective, device: torch.device) -> dict[str, float]:
        """The measures by name (`NeuralCollapse.scalars`), on embeddings as the loss uses them (`Objective.compared`).
        A collective; the same numbers on every rank."""
        embedder, unit = objective.compared(backbone)
        training = backbone.training
        embedder.eval()
        features_nD, labels_n = self._embed(embedder, device)
        backbone.train(training)
        classes_c, index_n = np.unique(labels_n, return_inverse=True)
        centres = objective.centres(torch.from_numpy(classes_c))
        if centres is None:
            return neural_collapse(_of_length(features_nD, 1.0 if unit else None), index_n).scalars()
        features_nD = _of_length(features_nD, centres.scale)
        rows_cD = _nearest(centres, class_means(features_nD, index_n, len(classes_c)))
        return neural_collapse(features_nD, index_n, rows_cD, centres.bias_c.cpu().numpy()).scalars()

    @torch.no_grad()
    def _embed(self, embedder: nn.Module, device: torch.device) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Embeddings [n, D] and labels [n] of the sample."""
        vectors: list[torch.Tensor] = []
        labels: list[torch.Tensor] = []
        for first in range(0, self._steps, self._group.size):
            batch = self._batch(first + self._group.rank)
            with torch.autocast(device.type, torch.bfloat16, enabled=self._bf16):
                x_bD = embedder(to_float(batch.images_BCHW.to(device)))
            vectors.append(self._group.all_gather(x_bD.float()).cpu())
            labels.append(self._group.all_gather(batch.labels_B.to(device)).cpu())
        label_n = torch.cat(labels)
        real_n = label_n != PADDING
        return torch.cat(vectors)[real_n].double().numpy(), label_n[real_n].numpy()

    def _batch(self, step: int) -> Batch:
        """The images of some identities; beyond the last identity, some images whose label is `PADDING`."""
        batch = self._stream.batch(0, step % self._steps)
        identity_B = step * self._together + batch.rows_B // self._each
        return replace(batch, labels_B=torch.where(identity_B < self._classes, batch.labels_B, PADDING))


def _of_length(x_ND: NDArray[np.float64], length: float | None) -> NDArray[np.float64]:
    """Embeddings of one length, where there is one; else as they are."""
    if length is None:
        return x_ND
    return np.asarray(length * x_ND / np.maximum(np.linalg.norm(x_ND, axis=1, keepdims=True), 1e-12))


def _nearest(centres: ClassCentres, means_cD: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of several centres of a class the one that most of it is at: the nearest to the class's mean."""
    rows_cKD = centres.rows_cKD.double().cpu().numpy()
    best_c = np.einsum("ckd,cd->ck", rows_cKD, means_cD).argmax(axis=1)
    return np.asarray(rows_cKD[np.arange(len(rows_cKD)), best_c])
