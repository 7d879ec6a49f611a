"""From shards to Batches: every rank decodes its own part of each global batch, ahead of the training."""

import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.artifact import Preprocessing
from trainer.config import DataConfig
from trainer.data.batch import PADDING, Batch
from trainer.data.image import load_image
from trainer.data.index import REMEDY, ShardIndex, check_sizes, read_bytes, read_index
from trainer.data.manifest import Manifest, Split
from trainer.data.order import Identities, Order, Sequential, Shuffled
from trainer.errors import UserError

AUTO_CACHE_BYTES = 2**30
_AHEAD = 3  # batches ready before they are asked for
_OPEN_SHARDS = 128  # far below the usual limit of 1024 open files


def preprocessing(manifest: Manifest, config: DataConfig) -> Preprocessing:
    """How this data set's images are read, for the stream and for the Embedder that is trained on it."""
    return Preprocessing(mode=manifest.image_mode, height=config.height, width=config.width)


class Stream:
    """The Batches of one rank.

    The global batch of a step depends on (seed, epoch, step) alone; rank r takes rows r * b to (r + 1) * b of it, with
    b = batch_size / world_size. A short last batch is filled up with its own images, whose label is `PADDING`: every
    batch has the same shape, and its padding has the statistics of real images.

    Args:
        folder: the data set.
        split: name of the split, for example `config.train_split`.
        config: sizes of image, batch and window; P x K batches where `identities_per_batch` is set (and `shuffle`).
        shuffle: False gives the samples in the order of the shards, each once, as evaluation wants them.

    Raises:
        UserError: no such split, a shard that is missing or has another size than the manifest says, a batch that the
            world size does not divide, or a data set that cannot give P x K batches.
    """

    def __init__(
        self,
        folder: Path,
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
        check_sizes(folder, self._split)
        self._rank = rank
        self._slots = config.batch_size // world_size
        self._reader = _Reader(folder, self._split, preprocessing(manifest, config), config)
        self._order = self._make_order(config, seed, shuffle)

    @property
    def steps_per_epoch(self) -> int:
        return self._order.steps_per_epoch

    @property
    def samples(self) -> int:
        return self._split.samples

    @property
    def classes(self) -> int:
        return len(self._split.classes)

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from `start_step` on, prepared in a background thread.

        Raises:
            UserError: a label outside the manifest's classes or an image that cannot be decoded (named with key and
                shard), or a damaged shard; at the batch that it concerns.
        """
        pending: deque[Future[Batch]] = deque()
        # One thread prepares the batches, in order; it hands single images to the pool.
        with self._reader.pool() as pool, ThreadPoolExecutor(1, "batches") as ahead:
            try:
                for step in range(start_step, self.steps_per_epoch):
                    pending.append(ahead.submit(self._batch, epoch, step, pool))
                    if len(pending) > _AHEAD:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()

    def batch(self, epoch: int, step: int) -> Batch:
        """One batch, prepared here and now."""
        with self._reader.pool() as pool:
            return self._batch(epoch, step, pool)

    def _make_order(self, config: DataConfig, seed: int, shuffle: bool) -> Order:
        if not shuffle:
            return Sequential(self._split.samples, config.batch_size)
        if config.identities_per_batch is not None:
            return Identities(
                self._split, config.identities_per_batch, config.batch_size, seed, self._reader.all_labels
            )
        shards = [entry.samples for entry in self._split.shards]
        return Shuffled(shards, config.batch_size, config.shuffle_window, seed)

    def _batch(self, epoch: int, step: int, pool: ThreadPoolExecutor) -> Batch:
        positions = self._order.positions(epoch, step)
        rows = np.arange(self._rank * self._slots, (self._rank + 1) * self._slots)
        real = rows < len(positions)
        images, labels, keys = self._reader.read(positions[rows % len(positions)], pool)
        return Batch(
            images_BCHW=torch.from_numpy(images),
            labels_B=torch.from_numpy(np.where(real, labels, PADDING).astype(np.int64)),
            keys=tuple(key if is_real else "" for key, is_real in zip(keys, real, strict=True)),
            rows_B=torch.from_numpy(rows),
        )


class _Reader:
    """Samples by position, decoded; keeps shard indexes, open files and, where they fit, the decoded images."""

    def __init__(self, folder: Path, split: Split, preprocessing: Preprocessing, config: DataConfig) -> None:
        self._paths = [folder / entry.name for entry in split.shards]
        self._split = split
        self._preprocessing = preprocessing
        self._threads = config.decode_threads
        self._ends = np.cumsum([entry.samples for entry in split.shards])
        self._lock = threading.Lock()
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        # The shards of two windows are in use at a time; P x K batches reach into all of them. 25 bytes a sample.
        windows = 4 + 2 * config.shuffle_window * len(split.shards) // split.samples
        self._keep_indexes = len(split.shards) if config.identities_per_batch else windows
        self._files: OrderedDict[int, int] = OrderedDict()
        weakref.finalize(self, _close_all, self._files)
        self._cache = _make_cache(split.samples, preprocessing, config)
        self._cached = np.zeros(split.samples if self._cache is not None else 0, dtype=bool)

    def pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._threads, "decode")

    def read(
        self, positions: NDArray[np.int64], pool: ThreadPoolExecutor
    ) -> tuple[NDArray[np.uint8], NDArray[np.int32], list[str]]:
        """Images [len(positions), C, H, W], labels and keys; a position that occurs twice is decoded once."""
        unique, inverse = np.unique(positions, return_inverse=True)
        shards = np.searchsorted(self._ends, unique, side="right")
        labels = np.empty(len(unique), dtype=np.int32)
        keys = np.empty(len(unique), dtype=object)
        with self._lock:
            places = []
            for shard in np.unique(shards).tolist():
                index, here = self._index(shard), shards == shard
                rows = unique[here] - (self._ends[shard] - self._split.shards[shard].samples)
                labels[here] = index.labels[rows]
                keys[here] = [key.decode() for key in index.keys[rows]]
                places += [(shard, row) for row in rows.tolist()]
            images = self._images(unique, places, pool)
            while len(self._files) > _OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
            while len(self._indexes) > self._keep_indexes:
                self._indexes.popitem(last=False)
        return images[inverse], labels[inverse], keys[inverse].tolist()

    def all_labels(self) -> NDArray[np.int32]:
        """The label of every sample; called by the order while a batch is prepared, before its images are read."""
        return np.concatenate([self._index(shard).labels for shard in range(len(self._paths))])

    def _images(
        self, unique: NDArray[np.int64], places: list[tuple[int, int]], pool: ThreadPoolExecutor
    ) -> NDArray[np.uint8]:
        shape = (self._preprocessing.channels, self._preprocessing.height, self._preprocessing.width)
        images = np.empty((len(unique), *shape), dtype=np.uint8)
        missing = np.arange(len(unique))
        if self._cache is not None:
            known = self._cached[unique]
            images[known] = self._cache[unique[known]]
            missing = np.flatnonzero(~known)
        wanted = [places[i] for i in missing]
        for shard in {shard for shard, _ in wanted}:
            self._open(shard)
        for i, image in zip(missing, pool.map(self._decode, wanted), strict=True):
            images[i] = image
        if self._cache is not None:
            self._cache[unique[missing]] = images[missing]
            self._cached[unique[missing]] = True
        return images

    def _decode(self, place: tuple[int, int]) -> NDArray[np.uint8]:
        shard, row = place
        path, index = self._paths[shard], self._indexes[shard]
        data = read_bytes(self._files[shard], path, index, row)
        return load_image(data, self._preprocessing, f"{path.name}: {index.keys[row].decode()}")

    def _index(self, shard: int) -> ShardIndex:
        index = self._indexes.get(shard)
        if index is None:
            index = read_index(self._paths[shard], self._split.shards[shard], len(self._split.classes))
            self._indexes[shard] = index
        self._indexes.move_to_end(shard)
        return index

    def _open(self, shard: int) -> None:
        if shard not in self._files:
            try:
                self._files[shard] = os.open(self._paths[shard], os.O_RDONLY)
            except OSError as error:
                raise UserError(f"shard '{self._paths[shard]}' cannot be opened: {error.strerror}; {REMEDY}") from error
        self._files.move_to_end(shard)


def _make_cache(samples: int, preprocessing: Preprocessing, config: DataConfig) -> NDArray[np.uint8] | None:
    """Room for the decoded split, or None. Memory is taken as it is written to, by every rank for what it has read."""
    shape = (samples, preprocessing.channels, preprocessing.height, preprocessing.width)
    size = int(np.prod(shape, dtype=np.int64))
    if config.cache == "none" or (config.cache == "auto" and size > AUTO_CACHE_BYTES):
        return None
    try:
        return np.empty(shape, dtype=np.uint8)
    except MemoryError as error:
        raise UserError(
            f"data.cache=memory needs {size / 2**30:.1f} GiB a worker, which cannot be had; use auto or none"
        ) from error


def _close_all(files: OrderedDict[int, int]) -> None:
    while files:
        os.close(files.popitem()[1])
