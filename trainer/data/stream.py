"""From shards to Batches: every rank decodes its own part of each global batch, ahead of the training."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import ByteSize, Field, model_validator

from trainer.data.image import Preprocessing
from trainer.data.manifest import Manifest
from trainer.data.prefetch import Prefetch
from trainer.data.reader import Reader, ahead
from trainer.data.samplers import PKSampler, SequentialSampler, ShuffledSampler
from trainer.data.store import DEFAULT_CACHE_BYTES, Address, CacheConfig
from trainer.errors import UserError
from trainer.strict import Strict

_AHEAD = 3  # batches ready before they are asked for
PADDING = -1  # the label of a slot that only fills the batch up; the head counts it for nothing


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples of one rank for one step.

    Every rank gets the same number of slots in every step, since collectives need equal shapes: where the last global
    batch of an epoch is short, the missing slots repeat an image and carry the label `PADDING`.

    Attributes:
        images_BCHW: uint8 pixels.
        labels_B: int64 class numbers, or `PADDING`.
        keys: the sample's name in its shard, for messages ("" for padding).
        rows_B: int64 position of each slot in the global batch of this step; augmentation draws its random numbers by
            position, so that they do not depend on the number of ranks.
    """

    images_BCHW: torch.Tensor
    labels_B: torch.Tensor
    keys: tuple[str, ...]
    rows_B: torch.Tensor


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
    train_split: str = "train"
    val_split: str = "val"
    height: int = Field(112, ge=8, le=1024, description="pixels; images are resized to it")
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

    @property
    def remote_cache(self) -> CacheConfig:
        """Where this run keeps what comes from elsewhere."""
        return CacheConfig(self.cache_dir, int(self.cache_bytes))

    @model_validator(mode="after")
    def _whole_identities(self) -> "DataConfig":
        if self.identities_per_batch is not None and self.batch_size % self.identities_per_batch:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of identities_per_batch {self.identities_per_batch}; "
                "choose P and K with P x K = batch_size"
            )
        return self


def preprocessing(manifest: Manifest, config: DataConfig) -> Preprocessing:
    """How this data set's images are read, for the stream and for the Embedder that is trained on it."""
    return Preprocessing(mode=manifest.image_mode, height=config.height, width=config.width)


class Stream:
    """The Batches of one rank.

    The global batch of a step depends on (seed, epoch, step) alone; rank r takes rows r * b to (r + 1) * b of it, with
    b = batch_size / world_size. A short last batch is filled up with its own images, whose label is `PADDING`: every
    batch has the same shape, and its padding has the statistics of real images.

    Args:
        manifest: of the data set.
        split: name of the split, for example `config.train_split`.
        config: sizes of image, batch and window; P x K batches where `identities_per_batch` is set (and `shuffle`).
        shuffle: False gives the samples in the order of the shards, each once, as evaluation wants them.

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
    ) -> None:
        if config.batch_size % world_size:
            raise UserError(
                f"data.batch_size {config.batch_size} is not a multiple of the {world_size} workers; "
                "every worker takes an equal part: change one of them"
            )
        self._split = manifest.split(split)
        slots = config.batch_size // world_size
        self._rows = np.arange(rank * slots, (rank + 1) * slots)  # of a global batch
        self._reader = Reader(
            self._split,
            preprocessing(manifest, config),
            threads=config.decode_threads,
            cache=config.cache,
            scattered=shuffle and config.identities_per_batch is not None,
        )
        self._sampler = self._make_sampler(config, seed, shuffle)
        self._prefetch = Prefetch(self._reader, self._sampler, lambda samples: self._rows % samples)
        self.steps_per_epoch = self._sampler.steps_per_epoch

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from `start_step` on, prepared in a background thread.

        Raises:
            UserError: a label outside the manifest's classes or an image that cannot be decoded (named with key and
                shard), or a damaged shard; at the batch that it concerns.
        """
        steps = range(start_step, self.steps_per_epoch)
        # One thread prepares the batches, in order; it hands single images to the pool.
        with self._reader.pool() as pool:
            yield from ahead(lambda step: self._batch(epoch, step, pool), steps, threads=1, most=_AHEAD)

    def batch(self, epoch: int, step: int) -> Batch:
        """One batch, prepared here and now."""
        with self._reader.pool() as pool:
            return self._batch(epoch, step, pool)

    def _make_sampler(self, config: DataConfig, seed: int, shuffle: bool) -> SequentialSampler | PKSampler:
        split, p = self._split, config.identities_per_batch
        if not shuffle:
            return SequentialSampler(split.samples, config.batch_size)
        if p is not None:
            return PKSampler(split.classes, split.by_class, p, config.batch_size, seed)
        shards = [entry.samples for entry in split.shards]
        return ShuffledSampler(shards, config.batch_size, config.shuffle_window, seed)

    def _batch(self, epoch: int, step: int, pool: ThreadPoolExecutor) -> Batch:
        self._prefetch(epoch, step)
        positions = self._sampler.positions(epoch, step)
        rows = self._rows
        real = rows < len(positions)
        images, labels, keys = self._reader.read(positions[rows % len(positions)], pool)
        return Batch(
            images_BCHW=torch.from_numpy(images),
            labels_B=torch.from_numpy(np.where(real, labels, PADDING).astype(np.int64)),
            keys=tuple(key if is_real else "" for key, is_real in zip(keys, real, strict=True)),
            rows_B=torch.from_numpy(rows),
        )
