"""From shards to Batches: every rank decodes its own part of each global batch, ahead of the training."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ByteSize, Field, model_validator

from trainer.data.arrays import ArrayForm, Form, Pixels
from trainer.data.decode import DecoderPool
from trainer.data.image import Preprocessing
from trainer.data.manifest import Manifest
from trainer.data.mix import Mixed, MixedPKSampler, MixedReader, MixedSampler, Part, open_mix
from trainer.data.prefetch import Prefetch, steps_ahead
from trainer.data.reader import Reader, ahead
from trainer.data.samplers import PKSampler, SequentialSampler, ShuffledSampler
from trainer.data.split import Split
from trainer.data.store import DEFAULT_CACHE_BYTES, Address, CacheConfig
from trainer.errors import UserError
from trainer.strict import Strict

_AHEAD = 3  # batches ready before they are asked for
_TOGETHER = 2  # of them in work: while the last images of one are decoded, the next one's keep all decoders busy
PADDING = -1  # the label of a slot that only fills the batch up; the head counts it for nothing


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples of one rank for one step.

    Every rank gets the same number of slots in every step, since collectives need equal shapes: where the last global
    batch of an epoch is short, the missing slots repeat an image and carry the label `PADDING`.

    Attributes:
        images_BCHW: uint8 pixels; or float32 values, of vectors [B, D, 1, 1] and spectrograms [B, 1, frequency, time].
        labels_B: int64 class numbers, or `PADDING`.
        keys: the sample's name in its shard, for messages ("" for padding).
        rows_B: int64 position of each slot in the global batch of this step; augmentation draws its random numbers by
            position, so that they do not depend on the number of ranks.
    """

    images_BCHW: torch.Tensor
    labels_B: torch.Tensor
    keys: tuple[str, ...]
    rows_B: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """Images and labels on a device. Pinned ones travel while the caller goes on; `rows_B` stays where it is."""
        images_BCHW, labels_B = (x.to(device, non_blocking=True) for x in (self.images_BCHW, self.labels_B))
        return replace(self, images_BCHW=images_BCHW, labels_B=labels_B)

    def pinned(self) -> "Batch":
        """In memory from which a GPU can fetch by itself."""
        return replace(self, images_BCHW=self.images_BCHW.pin_memory(), labels_B=self.labels_B.pin_memory())


class DataConfig(Strict):
    """What is read, and in which batches."""

    path: Address = Field(
        Path("data"), description="folder of shards with a manifest.json, or an address such as s3://bucket/faces"
    )
    cache_dir: Path | None = Field(
        None,
        description="where shards from elsewhere are kept, for all workers of a machine; null: ~/.cache/hypersphere",
    )
    cache_bytes: ByteSize = Field(
        ByteSize(DEFAULT_CACHE_BYTES), ge=2**20, description="of it at most; what was used longest ago goes"
    )
    mix: tuple[Part, ...] = Field((), description="sets to train on together in place of `path`, which is validated on")
    mix_identities: Literal["disjoint", "shared"] = Field(
        "disjoint", description="one name in two sets of the mix: two identities, or one"
    )
    train_split: str = "train"
    val_split: str = "val"
    height: int = Field(112, ge=8, le=1024, description="pixels; images are resized to it, other samples are not")
    width: int = Field(112, ge=8, le=1024)
    batch_size: int = Field(256, ge=1, description="samples a step, over all ranks together")
    shuffle_window: int = Field(50_000, ge=1, description="samples among which the order is shuffled")
    identities_per_batch: int | None = Field(
        None, ge=2, description="P of a P x K batch, for losses on pairs; K = batch_size / P; null: plain shuffling"
    )
    cache: Literal["auto", "memory", "none"] = Field(
        "auto", description="keep decoded images: auto = when they fit in 1 GiB"
    )
    decode_threads: int = Field(2, ge=1, le=64, description="threads of each worker that decode images")
    decode_processes: int = Field(0, ge=0, le=64, description="decode in so many processes of each worker instead")
    draft: bool = Field(
        False, description="decode large JPEGs at a fraction of their size: faster, other pixels than the Embedder's"
    )
    max_bad: int = Field(0, ge=0, description="samples that each worker may leave out as unreadable")

    @property
    def remote_cache(self) -> CacheConfig:
        """Where this run keeps what comes from elsewhere."""
        return CacheConfig(self.cache_dir, int(self.cache_bytes))

    @model_validator(mode="after")
    def _weights(self) -> "DataConfig":
        given = [part.weight is not None for part in self.mix]
        if any(given) and not all(given):
            raise ValueError(
                f"mix gives {sum(given)} of {len(given)} sets a weight; give one to all of them, or to none"
            )
        return self

    @model_validator(mode="after")
    def _whole_identities(self) -> "DataConfig":
        if self.identities_per_batch is not None and self.batch_size % self.identities_per_batch:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of identities_per_batch {self.identities_per_batch}; "
                "choose P and K with P x K = batch_size"
            )
        return self


def preprocessing(manifest: Manifest, config: DataConfig) -> Form:
    """How this data set's samples are read, for the stream and for the Embedder that is trained on it."""
    if manifest.image_mode is None:
        return ArrayForm.model_validate({"content": manifest.content, "shape": manifest.shape})
    return Preprocessing(mode=manifest.image_mode, height=config.height, width=config.width)


def training_split(manifest: Manifest, config: DataConfig) -> Split | Mixed:
    """What is trained on: a split of the data set, or of the sets of the mix.

    Raises:
        UserError: a set or its split is not there.
    """
    if not config.mix:
        return manifest.split(config.train_split)
    shared = config.mix_identities == "shared"
    return open_mix(config.mix, config.train_split, shared=shared, cache=config.remote_cache)


class Stream:
    """The Batches of one rank.

    The global batch of a step depends on (seed, epoch, step) alone; rank r takes rows r * b to (r + 1) * b of it, with
    b = batch_size / world_size. A short last batch is filled up with its own images, whose label is `PADDING`: every
    batch has the same shape, and its padding has the statistics of real images. A sample that cannot be read is
    replaced by the next one of the global batch that can, as padding, as long as there are at most `config.max_bad`.

    Args:
        manifest: of the data set.
        split: name of the split; `config.train_split` is that of the mix, where there is one.
        config: sizes of image, batch and window; P x K batches where `identities_per_batch` is set (and `shuffle`).
        shuffle: False gives the samples in the order of the shards, each once, as evaluation wants them.
        pin: batches in memory from which a GPU can fetch by itself.

    Attributes:
        split: what is read.

    Raises:
        UserError: no such split, a shard that is missing or has another size than the manifest says, a batch that the
            world size does not divide, or a data set that cannot give P x K batches.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        config: DataConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        pin: bool = False,
    ) -> None:
        if config.batch_size % world_size:
            raise UserError(
                f"data.batch_size {config.batch_size} is not a multiple of the {world_size} workers; "
                "every worker takes an equal part: change one of them"
            )
        training = split == config.train_split
        self.split = training_split(manifest, config) if training else manifest.split(split)
        slots = config.batch_size // world_size
        self._rows = np.arange(rank * slots, (rank + 1) * slots)  # of a global batch
        self._pin = pin
        self._max_bad = config.max_bad
        scattered = shuffle and config.identities_per_batch is not None
        self._reader = _make_reader(self.split, preprocessing(manifest, config), config, scattered)
        self._sampler = _make_sampler(self.split, config, seed, shuffle)
        self.steps_per_epoch = self._sampler.steps_per_epoch
        parts = self.split.parts if isinstance(self.split, Mixed) else [self.split]
        window = config.shuffle_window if shuffle else config.batch_size
        steps = steps_ahead(parts, config.batch_size, None if scattered else window)
        self._prefetch = Prefetch(steps, self.steps_per_epoch, self._want)

    @property
    def bad(self) -> int:
        """Samples that this rank has left out so far."""
        return len(self._reader.bad)

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from `start_step` on, prepared in the background.

        Raises:
            UserError: a label outside the manifest's classes; or more than `config.max_bad` samples that cannot be read
                (named with key and shard); at the batch that it concerns.
        """
        steps = range(start_step, self.steps_per_epoch)
        with self._reader.pool(processes=True) as pool:
            yield from ahead(lambda step: self._batch(epoch, step, pool), steps, threads=_TOGETHER, most=_AHEAD)

    def batch(self, epoch: int, step: int) -> Batch:
        """One batch, prepared here and now."""
        with self._reader.pool() as pool:
            return self._batch(epoch, step, pool)

    def _want(self, epoch: int, step: int) -> None:
        self._reader.want(self._sampler.part(epoch, step, self._rows))

    def _batch(self, epoch: int, step: int, pool: DecoderPool) -> Batch:
        self._prefetch(epoch, step)
        rows = self._rows
        real = rows < self._sampler.size(step)
        samples = self._reader.try_read(self._sampler.part(epoch, step, rows), pool)
        for slot, fault in samples.faults.items():
            others = np.roll(self._sampler.positions(epoch, step), -rows[slot])
            self._fill(samples.images_BCHW[slot], others, fault, pool)
            real[slot] = False
        batch = Batch(
            images_BCHW=torch.from_numpy(samples.images_BCHW),
            labels_B=torch.from_numpy(np.where(real, samples.labels_B, PADDING).astype(np.int64)),
            keys=tuple(key if is_real else "" for key, is_real in zip(samples.keys, real, strict=True)),
            rows_B=torch.from_numpy(rows),
        )
        return batch.pinned() if self._pin else batch

    def _fill(self, image_CHW: Pixels, positions: NDArray[np.int64], fault: UserError, pool: DecoderPool) -> None:
        """Put the first of `positions` that can be read where a bad sample was to be."""
        for position in positions:
            if self.bad > self._max_bad:
                break
            found = self._reader.try_read(np.array([position]), pool)
            if not found.faults:
                image_CHW[:] = found.images_BCHW[0]
                return
        if self._max_bad == 0:
            raise fault
        told = f"{self.bad} samples cannot be read (data.max_bad is {self._max_bad})"
        raise UserError(f"{told}; the last: {fault}")


def _make_reader(split: Split | Mixed, form: Form, config: DataConfig, scattered: bool) -> Reader | MixedReader:
    def make(part: Split) -> Reader:
        return Reader(
            part,
            form,
            threads=config.decode_threads,
            processes=config.decode_processes,
            draft=config.draft,
            cache=config.cache,
            scattered=scattered,
        )

    return MixedReader(split, [make(part) for part in split.parts]) if isinstance(split, Mixed) else make(split)


def _make_sampler(
    split: Split | Mixed, config: DataConfig, seed: int, shuffle: bool
) -> SequentialSampler | PKSampler | MixedSampler | MixedPKSampler:
    p = config.identities_per_batch
    if not shuffle:
        return SequentialSampler(split.samples, config.batch_size)
    if isinstance(split, Mixed):
        return split.sampler(config.batch_size, config.shuffle_window, p, seed)
    if p is not None:
        return PKSampler(split.classes, split.by_class, p, config.batch_size, seed)
    shards = [entry.samples for entry in split.shards]
    return ShuffledSampler(shards, config.batch_size, config.shuffle_window, seed)
