"""Neural collapse while training runs: how near features and class centres are to a simplex frame.

Legend: c classes that are measured, n samples, K centres a class, D dimension.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from trainer.config import Config
from trainer.data.augment import to_float
from trainer.data.manifest import Manifest
from trainer.data.stream import Stream
from trainer.distributed import Group
from trainer.errors import UserError
from trainer.evaluation.geometry import class_means, neural_collapse
from trainer.objective import Objective
from trainer.objective_parts import ClassCentres

MOST_CLASSES = 512
SAMPLES_A_CLASS = 8
_CLASSES_A_STEP = 32


class Collapse:
    """A bounded sample of the training images, the same at every evaluation, and what is measured on it.

    Up to 512 identities with up to 8 images each, without augmentation: at most 4096 images go through the backbone,
    shared by the ranks, one all-reduce fetches the classes' centres, and D x D eigenvectors are taken once. Every
    identity is measured on equally many images, as many as the smallest one has.

    Args:
        config: names the training split.
        group: the ranks, each of which embeds its part.

    Raises:
        UserError: an identity has a single image, so that nothing can be measured within it.
    """

    def __init__(self, config: Config, manifest: Manifest, group: Group) -> None:
        split = manifest.split(config.data.train_split)
        counts = np.asarray(split.class_counts)
        each = min(SAMPLES_A_CLASS, int(counts.min()))
        if each < 2:
            least = split.classes[int(counts.argmin())]
            raise UserError(
                f"run.collapse compares images of one identity, but '{least}' has {counts.min()}; "
                "import with --min-samples 2, or set run.collapse=false"
            )
        self._group, self._bf16 = group, config.engine.bf16
        together = group.size * max(1, min(_CLASSES_A_STEP, len(counts)) // group.size)
        data = config.data.model_copy(
            update={"batch_size": together * each, "identities_per_batch": together, "cache": "none"}
        )
        self._stream = Stream(data.path, manifest, data.train_split, data, rank=group.rank, world_size=group.size)
        self._steps = min(-(-min(MOST_CLASSES, len(counts)) // together), self._stream.steps_per_epoch)

    def __call__(self, backbone: nn.Module, objective: Objective, device: torch.device) -> dict[str, float]:
        """The measures by name (`NeuralCollapse.scalars`), on embeddings as the loss uses them. A collective; the same
        numbers on every rank."""
        features_nD, labels_n = self._embed(backbone, device)
        classes_c, index_n = np.unique(labels_n, return_inverse=True)
        centres = objective.centres(torch.from_numpy(classes_c))
        if centres is None:
            return neural_collapse(features_nD, index_n).scalars()
        if centres.scale is not None:
            norms_n1 = np.maximum(np.linalg.norm(features_nD, axis=1, keepdims=True), 1e-12)
            features_nD = centres.scale * features_nD / norms_n1
        rows_cD = _nearest(centres, class_means(features_nD, index_n, len(classes_c)))
        return neural_collapse(features_nD, index_n, rows_cD, centres.bias_c.cpu().numpy()).scalars()

    @torch.no_grad()
    def _embed(self, backbone: nn.Module, device: torch.device) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Embeddings [n, D] and labels [n] of the sample."""
        vectors: list[torch.Tensor] = []
        labels: list[torch.Tensor] = []
        training = backbone.training
        backbone.eval()
        for step in range(self._steps):
            batch = self._stream.batch(0, step)
            with torch.autocast(device.type, torch.bfloat16, enabled=self._bf16):
                x_bD = backbone(to_float(batch.images_BCHW.to(device)))
            vectors.append(self._group.all_gather(x_bD.float()).cpu())
            labels.append(self._group.all_gather(batch.labels_B.to(device)).cpu())
        backbone.train(training)
        return torch.cat(vectors).double().numpy(), torch.cat(labels).numpy()


def _nearest(centres: ClassCentres, means_cD: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of several centres of a class the one that most of it is at: the nearest to the class's mean."""
    rows_cKD = centres.rows_cKD.double().cpu().numpy()
    best_c = np.einsum("ckd,cd->ck", rows_cKD, means_cD).argmax(axis=1)
    return np.asarray(rows_cKD[np.arange(len(rows_cKD)), best_c])
