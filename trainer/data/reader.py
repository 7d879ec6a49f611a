"""Samples of a split by position, decoded, and work that runs a little ahead of its use. Runs without torch."""

import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainer.data.image import Preprocessing, load_image
from trainer.data.index import REMEDY, ShardIndex, check_sizes, read_bytes, read_index
from trainer.data.manifest import Split
from trainer.errors import UserError

AUTO_CACHE_BYTES = 2**30
_OPEN_SHARDS = 128  # far below the usual limit of 1024 open files
Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(work: Callable[[Item], Result], items: Iterable[Item], threads: int, most: int) -> Iterator[Result]:
    """`work` of each item, in order, computed by threads that are at most `most` results ahead of the caller.

    An exception of `work` is raised at the item that it concerns; what is not yet begun then is given up.
    """
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) > most:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


class Reader:
    """The samples of a split by position, decoded; keeps shard indexes, open files and, if asked, decoded images.

    Args:
        folder: the data set.
        threads: that decode images.
        cache: keep decoded images: always, never, or ("auto") where they fit in 1 GiB.
        keep_indexes: how many shards' indexes stay in memory, 25 bytes a sample.

    Raises:
        UserError: a shard is missing or has another size than the manifest says, or the images do not fit the memory.
    """

    def __init__(
        self,
        folder: Path,
        split: Split,
        preprocessing: Preprocessing,
        *,
        threads: int = 2,
        cache: Literal["auto", "memory", "none"] = "none",
        keep_indexes: int = 8,
    ) -> None:
        check_sizes(folder, split)
        self._paths = [folder / entry.name for entry in split.shards]
        self._split = split
        self._preprocessing = preprocessing
        self._threads = threads
        self._ends = np.cumsum([entry.samples for entry in split.shards])
        self._lock = threading.Lock()
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._keep_indexes = keep_indexes
        self._files: OrderedDict[int, int] = OrderedDict()
        weakref.finalize(self, _close_all, self._files)
        self._cache = _make_cache(split.samples, preprocessing, cache)
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
        """The label of every sample; called by a sampler while a batch is prepared, before its images are read."""
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


def _make_cache(samples: int, preprocessing: Preprocessing, cache: str) -> NDArray[np.uint8] | None:
    """Room for the decoded split, or None. Memory is taken as it is written to, by every rank for what it has read."""
    shape = (samples, preprocessing.channels, preprocessing.height, preprocessing.width)
    size = int(np.prod(shape, dtype=np.int64))
    if cache == "none" or (cache == "auto" and size > AUTO_CACHE_BYTES):
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
