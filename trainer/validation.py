"""Held-out metrics while training runs: all ranks embed, rank 0's numbers count."""

import numpy as np
import torch
from torch import nn

from trainer.config import Config
from trainer.data.augment import to_float
from trainer.data.manifest import Manifest
from trainer.data.stream import Stream
from trainer.distributed import Group
from trainer.evaluation.protocols import quick

# The figures of a training in progress need no more, and their cost grows with the square.
_MOST_SAMPLES = 20_000


class Validation:
    """The validation split of a run, its images decoded once.

    Args:
        config: names the split; its batch size is used for embedding, too.
        group: the ranks, each of which embeds its part of every batch.
    """

    def __init__(self, config: Config, manifest: Manifest, group: Group) -> None:
        data = config.data
        self._group, self._bf16 = group, config.engine.bf16
        self._stream = Stream(
            data.path, manifest, data.val_split, data, rank=group.rank, world_size=group.size, shuffle=False
        )

    def __call__(self, backbone: nn.Module, device: torch.device) -> dict[str, float]:
        """Rank-1 and open-set errors on the identities held out. A collective; the same numbers on every rank."""
        embeddings, labels = self._embed(backbone, device)
        result = quick(embeddings, labels)
        values = {"val/rank1": result.rank1}
        if result.fnir_at_fpir_1pct is not None:
            values["val/fnir_at_fpir_1pct"] = result.fnir_at_fpir_1pct
        return values

    @torch.no_grad()
    def _embed(self, backbone: nn.Module, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors [N, D] and labels [N] of the first samples of the split."""
        vectors: list[torch.Tensor] = []
        labels: list[torch.Tensor] = []
        backbone.eval()
        seen = 0
        for batch in self._stream.batches(0):
            with torch.autocast(device.type, torch.bfloat16, enabled=self._bf16):
                x_bD = backbone(to_float(batch.images_BCHW.to(device)))
            vectors.append(self._group.all_gather(nn.functional.normalize(x_bD.float())).cpu())
            labels.append(self._group.all_gather(batch.labels_B.to(device)).cpu())
            seen += len(labels[-1])
            if seen >= _MOST_SAMPLES:
                break
        backbone.train()
        label_N = torch.cat(labels)
        real_N = label_N >= 0
        return torch.cat(vectors)[real_N].numpy(), label_N[real_N].numpy()
