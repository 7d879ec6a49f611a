"""Samples of a split by position, decoded, and work that runs a little ahead of its use. Runs without torch."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainer.data.image import Preprocessing, load_image
from trainer.data.index import ShardIndex, check_sizes, open_shard, read_bytes, read_index
from trainer.data.manifest import Split
from trainer.errors import UserError

AUTO_CACHE_BYTES = 2**30
Item = TypeVar("Item")
Result = TypeVar("Result")
_Place = tuple[int, ShardIndex, int]  # number of the shard, its index, row in it


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
    """The samples of a split by position, decoded; keeps shard indexes and, if asked, decoded images.

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
        check_sizes(folder, split.shards)
        self._folder = folder
        self._split = split
        self._preprocessing = preprocessing
        self._threads = threads
        self._ends = np.cumsum([entry.samples for entry in split.shards])
        self._index = lru_cache(keep_indexes)(self._read_index)
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
        indexes = {shard: self._index(shard) for shard in np.unique(shards).tolist()}
        starts = {shard: self._ends[shard] - self._split.shards[shard].samples for shard in indexes}
        places = [(s, indexes[s], int(i - starts[s])) for s, i in zip(shards.tolist(), unique, strict=True)]
        labels = np.array([index.labels[row] for _, index, row in places])
        keys = [index.keys[row].decode() for _, index, row in places]
        return self._images(unique, places, pool)[inverse], labels[inverse], [keys[i] for i in inverse]

    def all_labels(self) -> NDArray[np.int32]:
        """The label of every sample."""
        return np.concatenate([self._index(shard).labels for shard in range(len(self._ends))])

    def _images(
        self, positions: NDArray[np.int64], places: list[_Place], pool: ThreadPoolExecutor
    ) -> NDArray[np.uint8]:
        if self._cache is None:
            return self._decode_all(places, pool)
        missing = np.flatnonzero(~self._cached[positions])
        if len(missing):
            self._cache[positions[missing]] = self._decode_all([places[i] for i in missing], pool)
            self._cached[positions[missing]] = True
        return self._cache[positions]

    def _decode_all(self, places: list[_Place], pool: ThreadPoolExecutor) -> NDArray[np.uint8]:
        with ExitStack() as stack:
            shards = {shard for shard, _, _ in places}
            files = {shard: stack.enter_context(open_shard(self._path(shard))) for shard in shards}
            return np.stack(list(pool.map(lambda place: self._decode(files[place[0]], *place[1:]), places)))

    def _decode(self, file: FileIO, index: ShardIndex, row: int) -> NDArray[np.uint8]:
        name = f"{Path(file.name).name}: {index.keys[row].decode()}"
        return load_image(read_bytes(file, index, row), self._preprocessing, name)

    def _read_index(self, shard: int) -> ShardIndex:
        return read_index(self._path(shard), self._split.shards[shard], len(self._split.classes))

    def _path(self, shard: int) -> Path:
        return self._folder / self._split.shards[shard].name


def _make_cache(samples: int, preprocessing: Preprocessing, cache: str) -> NDArray[np.uint8] | None:
    """Room for the decoded split, or None. Memory is taken as it is written to, by every rank for what it has read."""
    shape = (samples, preprocessing.channels, preprocessing.height, preprocessing.width)
    size = math.prod(shape)
    if cache == "none" or (cache == "auto" and size > AUTO_CACHE_BYTES):
        return None
    try:
        return np.empty(shape, dtype=np.uint8)
    except MemoryError as error:
        raise UserError(
            f"data.cache=memory needs {size / 2**30:.1f} GiB a worker, which cannot be had; use auto or none"
        ) from error
