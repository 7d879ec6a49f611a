"""A rehearsal: one step on each rank, on made-up samples, and what it takes of the memory, part by part."""

import json
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from trainer.config import Config
from trainer.data.stream import Batch
from trainer.pulse import Wishes
from trainer.train import Record, _Run
from trainer.weights import put, read_weights


def rehearse(config: Config, report: Callable[[Record], None], local_rank: int = 0) -> None:
    """Build what `train.run` builds, check `init.weights`, and do one step; nothing is written. A collective.

    The record has the bytes of each part, of the rank that has most of it. Activations are what the backbone's forward
    keeps for its backward, each memory once; on a GPU the record has the most that was allocated, too.

    Args:
        report: gets the table, and the notes of a run's start.

    Raises:
        UserError: as `train.run`.
        Diverged: the step's loss is not finite.
    """
    device = torch.device("cuda", local_rank) if config.scaling.use_gpu else torch.device("cpu")
    run = _Run(config, True, device, report, Wishes())  # as for a resume: what an earlier run recorded stays
    if config.init.weights is not None:
        put(read_weights(config.init.weights, config.init.which), run.engine.module, config.init.weights)
    kept = _Kept(run.engine.module)
    run.engine.around_forward = kept
    run.watch(run._step(_made_up(run), 0)["loss"], 1)
    run.watch.look()
    parts = run.engine.memory() | run.objective.memory() | {"activations": kept.most}
    if device.type == "cuda":
        parts["allocated at most"] = torch.cuda.max_memory_allocated(device)
    found = [json.loads(text) for text in run.group.gather_text(json.dumps(parts))]
    most = {name: float(max(one.get(name, 0) for one in found)) for name in parts}
    report(Record("plan", 1, run.total_steps, most))


def _made_up(run: _Run) -> Batch:
    """Random samples in the data set's form, of random classes that are the same on any number of ranks."""
    size, group, generator = run.config.data.batch_size, run.group, torch.Generator().manual_seed(0)
    labels_B = torch.randint(run.stream.split.identities, (size,), generator=generator)
    rows_b = torch.arange(size).chunk(group.size)[group.rank]
    images_bCHW = torch.rand(len(rows_b), *run.form.shape_CHW, generator=generator)
    if run.form.reads == "images":
        images_bCHW = (images_bCHW * 255).to(torch.uint8)
    keys = tuple(f"made-up {row}" for row in rows_b.tolist())
    batch = Batch(images_BCHW=images_bCHW, labels_B=labels_B[rows_b], keys=keys, rows_B=rows_b)
    return batch.pinned() if run.device.type == "cuda" else batch


class _Kept:
    """Each time it is entered, notes the memory that is kept for the backward, by address, but for the backbone's own.

    Attributes:
        most: bytes of the forward that kept most: of accumulated parts only one is there at a time.
    """

    def __init__(self, backbone: nn.Module) -> None:
        tensors = backbone.state_dict(keep_vars=True).values()
        self._own = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._bytes_at: dict[int, int] = {}
        self.most = 0

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._bytes_at[storage.data_ptr()] = storage.nbytes()
        return tensor

    def __enter__(self) -> None:
        self._bytes_at.clear()
        self._hooks.__enter__()

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        self.most = max(self.most, sum(self._bytes_at.values()))
