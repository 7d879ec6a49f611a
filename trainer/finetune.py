"""Training that begins with the weights of another: the backbone's by name, and new centres at their class means.

Legend: R classes of this rank, P identities of a batch with K samples each, D dimension.
"""

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

from trainer.config import Config
from trainer.data.augment import as_variant, to_float
from trainer.data.manifest import Manifest
from trainer.data.stream import Stream, training_split
from trainer.distributed import Group, RowRange
from trainer.engine import Engine
from trainer.objective import Objective
from trainer.weights import put, read_weights

_SAMPLES_A_STEP = 512  # of one rank


def begin(config: Config, manifest: Manifest, engine: Engine, objective: Objective, device: torch.device) -> str:
    """Put `config.init` into engine and objective, before the first step; a sentence that says so. A collective.

    Raises:
        UserError: the weights cannot be read, or are of another backbone.
    """
    source = config.init.weights
    assert source is not None
    weights = read_weights(source, config.init.which)
    state = {name: value for name, value in engine.state().items() if not name.startswith("ema.")}
    put(weights, engine.module, source)
    parameters = {name for name, _ in engine.module.named_parameters()}
    state |= {f"{'weight' if name in parameters else 'buffer'}.{name}": value for name, value in weights.items()}
    engine.load_state(state)
    told = f"beginning with the weights of '{source}'"
    if config.init.centres == "random":
        return f"{told} and random class centres"
    means = ClassMeans(config, manifest, device)
    objective.begin_at(cache(lambda unit: means(engine.module, unit=unit)))
    return f"{told}; class centres are means of up to {means.each} samples"


class ClassMeans:
    """The mean embedding of each class: one pass over up to `init.samples` samples an identity, without augmentation.

    Whole batches of identities are dealt out to the ranks, so that a mean has the same samples, in the same order, on
    any number of them. An identity with fewer samples repeats some; each variant of it is a class of its own.
    """

    def __init__(self, config: Config, manifest: Manifest, device: torch.device) -> None:
        split = training_split(manifest, config.data)
        self._device, self._bf16, self._group = device, config.engine.bf16, Group.current()
        self._identities, self._augment = split.identities, config.augment
        self.each = min(config.init.samples, int(split.classes.counts().max()))
        self._together = min(max(1, _SAMPLES_A_STEP // self.each), self._identities)
        self._steps = -(-self._identities // self._together)
        size = {"batch_size": self._together * self.each, "identities_per_batch": self._together}
        data = config.data.model_copy(update=size | {"cache": "none"})
        self._stream = Stream(manifest, data.train_split, data, seed=config.run.seed)

    @torch.no_grad()
    def __call__(self, backbone: nn.Module, *, unit: bool) -> Tensor:
        """[R, D], of embeddings divided by their length where `unit`. A collective: all-gathers of [P, D] a step."""
        group, training = self._group, backbone.training
        rows = RowRange.of(self._augment.variants * self._identities, group.rank, group.size)
        means_RD: Tensor | None = None
        backbone.eval()
        for first in range(0, self._steps, group.size):
            batch = self._stream.batch(0, (first + group.rank) % self._steps)
            identity_B = (first + group.rank) * self._together + batch.rows_B // self.each
            batch = replace(batch, labels_B=torch.where(identity_B < self._identities, batch.labels_B, -1))
            images_BCHW = to_float(batch.images_BCHW.to(self._device))
            for variant in range(self._augment.variants):
                varied_BCHW = as_variant(images_BCHW, variant, self._augment) if variant else images_BCHW
                mean_PD, label_P = self._means(backbone, varied_BCHW, batch.labels_B.to(self._device), unit)
                label_P = torch.where(label_P < 0, label_P, label_P + variant * self._identities)
                mean_PD, label_P = group.all_gather(mean_PD), group.all_gather(label_P)
                own_P = (label_P >= rows.start) & (label_P < rows.stop)
                if means_RD is None:
                    means_RD = mean_PD.new_zeros(len(rows), mean_PD.shape[1])
                means_RD[label_P[own_P] - rows.start] = mean_PD[own_P]
        backbone.train(training)
        assert means_RD is not None
        return means_RD

    def _means(self, backbone: nn.Module, images: Tensor, labels_B: Tensor, unit: bool) -> tuple[Tensor, Tensor]:
        """Of each identity of a batch, its mean and its class; -1 where it has come before."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            x_BD = backbone(images)
        x_BD = nn.functional.normalize(x_BD.float()) if unit else x_BD.float()
        label_PK = labels_B.view(self._together, self.each)  # a sample that could not be read has -1
        label_P, known_PK = label_PK.max(dim=1).values, (label_PK >= 0).to(x_BD)
        sum_PD = (x_BD.view(self._together, self.each, -1) * known_PK[:, :, None]).sum(dim=1)
        return sum_PD / known_PK.sum(dim=1, keepdim=True).clamp_min(1), label_P
