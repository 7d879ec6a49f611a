"""The one training loop. Every rank runs it, on one machine or many, on CPUs or GPUs.

    samples -> backbone (inside the DeepSpeed engine) -> head -> loss -> both are stepped, visibly

Nothing random is carried from step to step: order, augmentation, dropout and margins' noise are functions of the seed
and the step. A resumed run therefore needs no generator's state, and gives the losses of the uninterrupted one.
"""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from trainer import finetune, memory
from trainer.backbones import build
from trainer.checkpoint import CHECKPOINTS, Best, Checkpoint, CheckpointManifest, Saver, check_finite, go_on, set_aside
from trainer.config import Config
from trainer.data.augment import Augment, check_augment
from trainer.data.manifest import Manifest
from trainer.data.stream import Batch, Stream, preprocessing
from trainer.distributed import Group, average_buffers, sum_not_mean
from trainer.divergence import RECORD, Divergence
from trainer.engine import Engine
from trainer.errors import Diverged, UserError
from trainer.meter import Meter
from trainer.monitor import Monitor
from trainer.objective import Objective
from trainer.pulse import PULSE, Wishes
from trainer.resume import IDENTITIES, SHARDS, changes, data_digest, identities
from trainer.storage import Folder
from trainer.watch import Agreement, Watch

_DROPOUT_PRIME = 1_000_003  # spreads (seed, step, rank) over the generator's seeds


@dataclass(frozen=True)
class Record:
    """What rank 0 tells the launcher."""

    kind: Literal["start", "step", "metrics", "note", "back", "stopped", "error", "plan"]
    step: int = 0
    total_steps: int = 0
    values: dict[str, float] = field(default_factory=dict)
    text: str = ""
    time_ms: int = field(default_factory=lambda: int(time.time() * 1000))


def run(
    config: Config,
    *,
    resume: bool,
    report: Callable[[Record], None],
    local_rank: int = 0,
    wishes: Wishes | None = None,
    untold: Callable[[], list[dict[str, Any]]] = list,
) -> None:
    """Train from the config's first step, or from the newest checkpoint, to the last; the process group is up.

    Args:
        config: the resolved tree, the same on every rank.
        resume: go on from the newest checkpoint in `config.run.out`.
        report: takes records; called on every rank, so that a caller may listen to rank 0 only.
        local_rank: which GPU of this machine is this rank's.
        wishes: what is to be done beside training, looked at every few steps.
        untold: which records may get lost, as trees; called on rank 0. They lie in the next checkpoint, and are
            reported again by who goes on from it.

    Raises:
        UserError: data, config and checkpoint do not fit together, a sample is bad, or memory runs out.
        Diverged: the numbers are no longer finite; checkpoints that may be spoilt are set aside.
    """
    device = torch.device("cuda", local_rank) if config.scaling.use_gpu else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, int(config.scaling.cpus_per_worker)))
    with memory.told(config):
        while _goes_back(config, resume, device, report, wishes or Wishes(), untold):
            resume = True


def _goes_back(
    config: Config,
    resume: bool,
    device: torch.device,
    report: Callable[[Record], None],
    wishes: Wishes,
    untold: Callable[[], list[dict[str, Any]]],
) -> bool:
    """Train to the end; true if the run diverged, and is to go on from its newest checkpoint with a lower rate."""
    trainer = _Run(config, resume, device, report, wishes, untold)
    try:
        if resume:
            trainer.resume()
        trainer.begin()
        trainer.train()
    except Diverged as error:
        return trainer.diverged(error)
    finally:
        trainer.saver.close()
    return False


class _Run:
    """The objects of one run on one rank."""

    def __init__(
        self,
        config: Config,
        resume: bool,
        device: torch.device,
        report: Callable[[Record], None],
        wishes: Wishes,
        untold: Callable[[], list[dict[str, Any]]] = list,
    ) -> None:
        self.config, self.device, self.report, self.wishes, self.untold = config, device, report, wishes, untold
        self.checkpoints = Folder.at(config.run.out) / CHECKPOINTS
        PULSE.at("reading the data set")
        data, seed, self.group = config.data, config.run.seed, (group := Group.current())
        self.manifest = manifest = Manifest.read(data.path, data.remote_cache)
        self.form = form = preprocessing(manifest, data)
        check_augment(config.augment, form)
        rank, size, cuda = group.rank, group.size, device.type == "cuda"
        self.stream = Stream(manifest, data.train_split, data, rank=rank, world_size=size, seed=seed, pin=cuda)
        split = self.stream.split
        self.monitor = Monitor(config, manifest, group)
        together = data.batch_size // data.identities_per_batch if data.identities_per_batch else 1
        self.augment = Augment(config.augment, seed, split.identities, together)
        variants = config.augment.variants
        self.classes = variants * split.identities
        self.class_digest, self.data_digest = split.class_digest, data_digest(split)
        PULSE.at("building the network")
        torch.manual_seed(config.run.torch_seed)
        backbone = build(config.backbone, *form.shape_CHW).to(device)
        self.engine = Engine(backbone, config, device)
        PULSE.at("making the class centres")
        counts = torch.from_numpy(np.tile(split.classes.counts(), variants))
        self.objective = Objective(config, self.classes, counts, device)
        steps = config.run.epochs * self.stream.steps_per_epoch
        self.total_steps = min(steps, config.run.max_steps or steps)
        self.step = 0
        self.watch, self.agreement = Watch(), Agreement(self.group, device)
        self.divergence = Divergence(config, group, resume)
        self.best = Best(config.run.keep_best, self.monitor.ranking)
        self.saver, self.saved = Saver(self.checkpoints, config.run.keep_checkpoints, group), -1

    def train(self) -> None:
        """Every step that is left, with evaluations and checkpoints where the config wants them."""
        config = self.config
        self.report(Record("start", self.step, self.total_steps))
        meter = Meter(self.device)
        while self.step < self.total_steps:
            epoch, first = divmod(self.step, self.stream.steps_per_epoch)
            PULSE.at("waiting for data", self.step + 1)
            for batch in self.stream.batches(epoch, first):
                losses = self._step_or_skip(batch, epoch)
                meter.samples += int((batch.labels_B >= 0).sum()) * self.group.size
                self.step += 1
                self.saver.look()
                if losses:
                    self.watch(losses["loss"], self.step)
                    if self.step % config.run.log_every == 0 or self.step == self.total_steps:
                        self._report_step(losses, meter)
                if config.run.checkpoint_every and self.step % config.run.checkpoint_every == 0:
                    self.save()
                if self.step == self.total_steps:
                    break
                if self._stops():
                    return
                PULSE.at("waiting for data", self.step + 1)
            self._after_epoch(epoch)
            meter.restart()
        if self.saved != self.step:
            self.save()
        self.saver.finish()

    def _stops(self) -> bool:
        """Whether the run is to end before its last step, with a checkpoint; it may be asked for one alone, too."""
        save, stop = self.agreement(self.step, self.wishes)
        if save or stop:
            self.wishes.save = False
            if self.saved != self.step:
                self.save()
        if save:
            self.report(Record("note", text=f"a node will be taken away: a checkpoint of step {self.step} is written"))
        if stop:
            self.saver.finish()
            self.report(Record("stopped", self.step, self.total_steps))
        return stop

    def _step_or_skip(self, batch: Batch, epoch: int) -> dict[str, torch.Tensor]:
        """One update; or none, and no losses, where the loss is not finite and such batches are to be skipped."""
        self.divergence.begin(self.step + 1, batch.keys)
        if self.config.run.on_divergence != "skip":
            return self._step(batch, epoch)
        buffers = [*self.engine.module.buffers(), *self.objective.buffers()]
        before = [buffer.clone() for buffer in buffers]
        try:
            losses = self._step(batch, epoch)
        except Diverged as error:
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(old)
            check_finite(self.step, {"the backbone": self.engine.module.state_dict()}, self.group)
            self.divergence.skip(self.step + 1, error)
            self.report(Record("note", text=f"step {self.step + 1} is skipped: {error}; its samples are in {RECORD}"))
            return {}
        self.divergence.went_well()
        return losses

    def _step(self, batch: Batch, epoch: int) -> dict[str, torch.Tensor]:
        """One update of backbone and head; the losses of the global batch, still on the device."""
        config = self.config
        torch.manual_seed(_dropout_seed(config.run.torch_seed, self.step, self.group.rank))
        PULSE.at("forward")
        images_BCHW, labels_B = self.augment(batch.to(self.device), epoch, self.step, config.data.batch_size)
        x_BD = self.engine(images_BCHW, self.step)
        # The engine averages gradients over the ranks, but each rank's gradient is its part of one global mean: the sum
        # is right. The factor is applied here, to what flows into the backbone only.
        x_BD = sum_not_mean(x_BD, self.group)
        self.objective.set_progress(self.step, config.schedule.margin_factor(self.step))
        loss, parts = self.objective(x_BD, labels_B, batch.keys)
        if config.run.on_divergence == "skip" and not math.isfinite(value := float(loss.detach())):
            raise Diverged(f"the loss is {value}")
        factor = self.divergence.rate * config.schedule.learning_rate_factor(self.step, self.total_steps)
        head_lr = config.head_lr() * factor
        self.objective.prepare(head_lr)
        PULSE.at("backward, in which the engine sums the gradients")
        self.engine.backward(loss)
        PULSE.at("update")
        self.engine.step(config.optimizer.lr * factor)
        self.objective.step(head_lr)
        return parts

    def _report_step(self, losses: dict[str, torch.Tensor], meter: Meter) -> None:
        values = {name: float(value) for name, value in losses.items()}
        if not all(map(math.isfinite, values.values())):
            raise Diverged(f"the run has diverged: the loss at step {self.step} is {values}")
        lr = self.config.optimizer.lr * self.divergence.rate
        values["learning_rate"] = lr * self.config.schedule.learning_rate_factor(self.step - 1, self.total_steps)
        if (norm := self.engine.gradient_norm()) is not None:
            values["gradient_norm"] = norm
        if self.config.data.max_bad:
            values["bad_samples"] = float(self.stream.bad)
        for note in self.objective.notes(values):
            self.report(Record("note", text=note))
        self.report(Record("step", self.step, self.total_steps, values | meter.read()))

    def _after_epoch(self, epoch: int) -> None:
        every, last = self.config.run.eval_every, self.step == self.total_steps
        if not self.monitor or not every or (not last and (epoch + 1) % every):
            return
        PULSE.at("evaluation")
        with self.engine.evaluated() as backbone:
            check_finite(self.step, {"the backbone": backbone.state_dict()}, self.group)  # else it embeds nothing
            values = self.monitor(backbone, self.objective, self.device)
        self.report(Record("metrics", self.step, self.total_steps, values))
        if self.best(values):
            if self.saved != self.step:
                self.save()
            self.saver.mark_best(self.step, self.best.metric, values[self.best.metric])

    def save(self) -> None:
        """Begin to write a checkpoint of this step, if it is sound. A collective."""
        PULSE.at("checkpoint")
        self.watch.look()
        average_buffers(self.engine.module, self.group)
        manifest = CheckpointManifest(
            step=self.step,
            world_size=self.group.size,
            classes=self.classes,
            class_digest=self.class_digest,
            data_digest=self.data_digest,
            config=self.config.model_dump(mode="json"),
            files={},
            untold=self.untold() if self.group.rank == 0 else [],
        )
        self.saver.save(manifest, self.objective.files(), self.engine.tensors())
        self.saved = self.step

    def resume(self) -> None:
        """Go on from the newest checkpoint; a run that has none starts from its first step. A collective."""
        PULSE.at("reading the checkpoint")
        found = go_on(self.checkpoints, self.group, self._load, lambda text: self.report(Record("note", text=text)))
        if found is None:
            self.report(Record("note", text=f"no checkpoint in '{self.checkpoints}' yet: starting at step 0"))
            return
        self.step = self.saved = found.step
        self.best.resume(self.checkpoints, found.step, self.group)
        for told in found.manifest.untold:
            self.report(Record(**told))
        self.report(Record("note", text=f"going on from step {found.step} of '{found.folder}'"))
        if self.divergence.rate != 1:
            text = f"the learning rates are multiplied by {self.divergence.rate:g}: the run has diverged, see {RECORD}"
            self.report(Record("note", text=text))

    def begin(self) -> None:
        """Take over other weights, where the config names some and the run is at its first step. A collective."""
        if self.step == 0 and self.config.init.weights is not None:
            text = finetune.begin(self.config, self.manifest, self.engine, self.objective, self.device)
            self.report(Record("note", text=text))

    def diverged(self, error: Diverged) -> bool:
        """Put spoilt checkpoints away; true if the run goes on from a good one with a lower rate. A collective.

        Raises:
            Diverged: it does not.
        """
        with suppress(UserError):  # the first one counts
            self.saver.finish()
        good = set_aside(self.checkpoints, self.step, self.group)
        back, lr = self.divergence.goes_back(self.step, error), self.config.optimizer.lr
        if not back:
            remedy = f"lower optimizer.lr (now {lr * self.divergence.rate:g}), lengthen schedule.warmup_steps or set"
            more = f"{remedy} engine.gradient_clipping, and --resume, which goes on from step {good}"
            raise Diverged(f"{error}; {more}") from error
        text = f"{error}; going on from step {good} with optimizer.lr x {self.divergence.rate:g}; see {RECORD}"
        self.report(Record("back", good, self.total_steps, text=text))
        return True

    def _load(self, found: Checkpoint) -> None:
        self._check(found)
        self.engine.load_state(found.parts("backbone"))
        self.objective.load(found)

    def _check(self, found: Checkpoint) -> None:
        facts = {IDENTITIES: identities(self.classes, self.class_digest), SHARDS: self.data_digest}
        refused, warned = changes(found, self.config, facts | {"scaling.workers": self.group.size})
        if refused:
            raise UserError("\n".join(refused))
        for text in warned:
            self.report(Record("note", text=text))
        if found.step > self.total_steps:
            raise UserError(
                f"the checkpoint '{found.folder}' is at step {found.step}, the run ends at {self.total_steps}; "
                "raise run.epochs or run.max_steps to train on"
            )


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    """What torch is seeded with for a step. torch takes 64 bits."""
    return ((seed * _DROPOUT_PRIME + step) * _DROPOUT_PRIME + rank) % 2**64
