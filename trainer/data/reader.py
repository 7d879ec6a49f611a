"""Samples of a split by position, read, checked and decoded, a little ahead of use. Runs without torch.

The indexes give random access: a rank reads the bytes of its own samples and no others, whatever the number of ranks,
and in the order in which they lie in the shards.
"""

import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainer.data.arrays import Form, Pixels
from trainer.data.decode import DecoderPool, Decoding, Faults
from trainer.data.index import ShardIndex
from trainer.data.split import Split
from trainer.data.store import File
from trainer.data.tar import REMEDY
from trainer.errors import UserError

AUTO_CACHE_BYTES = 2**30
_KEEP_INDEXES = 128  # mapped at a time, each with an open file; P x K batches reach into all shards
_VERIFY = f"run 'hypersphere data verify' and {REMEDY}"
_KEEP_PLACES = 16  # batches
Progress = Callable[[str, int, int], None]  # stage, done, total
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


class Place(NamedTuple):
    """Where one sample lies in its shard, and its label; `crc` is of its bytes."""

    shard: Path
    key: str
    offset: int
    size: int
    label: int
    crc: int


def places_in(shard: Path, index: ShardIndex, rows: NDArray[np.int64]) -> list[Place]:
    """The samples in these rows of a shard's index."""
    records = zip(rows.tolist(), index.records[rows].tolist(), strict=True)
    return [Place(shard, index.key(row), *record[:4]) for row, record in records]


class Samples(NamedTuple):
    """What was read of some positions, in their order.

    Attributes:
        images_BCHW: uint8, or float32 where they are no images.
        labels_B: of the classes of the split.
        keys: names in the shards.
        faults: what is wrong with those that could not be read, by place in the batch; their pixels mean nothing.
    """

    images_BCHW: Pixels
    labels_B: NDArray[np.int64]
    keys: list[str]
    faults: Faults


class Reader:
    """The samples of a split by position, decoded; keeps shard indexes and, if asked, decoded images.

    Args:
        split: what is read.
        form: how each sample becomes what the model reads.
        threads, processes: that decode images; processes, where there are any.
        draft: as for `load_image`.
        cache: keep decoded images: always, never, or ("auto") where they fit in 1 GiB.
        scattered: of a shard from elsewhere only those parts are fetched in which samples lie that are read, as suits
            P x K batches; otherwise all of it.

    Attributes:
        bad: what is wrong with the samples that could not be read so far, by position; they are not tried again.

    Raises:
        UserError: the samples are none that `form` reads, a shard is missing or has another size than the manifest
            says, or the images do not fit the memory.
    """

    def __init__(
        self,
        split: Split,
        form: Form,
        *,
        threads: int = 2,
        processes: int = 0,
        draft: bool = False,
        cache: Literal["auto", "memory", "none"] = "none",
        scattered: bool = False,
    ) -> None:
        if split.holds != form.reads:
            raise UserError(
                f"the data set at '{split.store.address}' holds {split.holds}, and {form.reads} are read here; "
                "choose another set"
            )
        check_sizes(split)
        self.split = split
        self._decoding = Decoding(form, draft)
        self._threads, self._processes = threads, processes
        self._scattered = scattered
        self._index = lru_cache(_KEEP_INDEXES)(split.index)
        self._places = lru_cache(_KEEP_PLACES)(self._look_up)  # a batch is looked up once to fetch and once to read it
        # What places and messages call each shard: where it lies, or its name where it lies elsewhere.
        self._paths = [
            split.path(i) if split.store.is_local(x.file) else Path(x.name) for i, x in enumerate(split.shards)
        ]
        self._files = {path: entry.file for path, entry in zip(self._paths, split.shards, strict=True)}
        self._wanted: set[int] = set()
        self._cache = _make_cache(split.samples, self._decoding, cache)
        self._cached = np.zeros(split.samples if self._cache is not None else 0, dtype=bool)
        self.bad: dict[int, UserError] = {}

    def pool(self, processes: bool = False) -> DecoderPool:
        """What decodes, for a `with` block; `processes`: in processes, if it may."""
        return DecoderPool(self._decoding, threads=self._threads, processes=self._processes if processes else 0)

    def read(self, positions: NDArray[np.int64], pool: DecoderPool) -> tuple[Pixels, NDArray[np.int64], list[str]]:
        """Images [len(positions), C, H, W], labels and keys; a position that occurs twice is decoded once.

        Raises:
            UserError: a sample is damaged, cannot be decoded, or has a label outside the manifest's classes; names its
                shard and its key.
        """
        samples = self.try_read(positions, pool)
        for fault in samples.faults.values():
            raise fault
        return samples.images_BCHW, samples.labels_B, samples.keys

    def try_read(self, positions: NDArray[np.int64], pool: DecoderPool) -> Samples:
        """As `read`, but with what is wrong with single samples in the result.

        Raises:
            UserError: a label is outside the manifest's classes.
        """
        unique, inverse = np.unique(positions, return_inverse=True)
        places = self._places(unique.tobytes())
        labels = np.array([place.label for place in places])
        if (wrong := np.flatnonzero(labels >= self.split.identities)).size:
            place, classes = places[wrong[0]], self.split.identities
            raise UserError(
                f"sample '{place.key}' of shard '{place.shard}' has label {place.label}, but the manifest has "
                f"{classes} classes (0 to {classes - 1}); {_VERIFY}"
            )
        images = self._images(unique, places, pool)
        faults = {i: self.bad[position] for i, position in enumerate(positions.tolist()) if position in self.bad}
        return Samples(images[inverse], labels[inverse], [places[i].key for i in inverse], faults)

    def want(self, positions: NDArray[np.int64]) -> None:
        """Have what is read of these samples fetched in the background, where it lies elsewhere."""
        split = self.split
        if self._scattered:
            split.store.later(lambda: split.store.want(self._ranges(self._places(np.unique(positions).tobytes()))))
            return
        shards = set(np.searchsorted(split.ends, positions, side="right").tolist())
        fresh, self._wanted = shards - self._wanted, shards  # the batches of a window want the same shards
        split.want_indexes(fresh)
        split.store.want({split.shards[shard].file: None for shard in fresh})

    def _ranges(self, places: list[Place]) -> dict[File, list[tuple[int, int]]]:
        """What is read of each shard."""
        wanted: dict[File, list[tuple[int, int]]] = {}
        for place in places:
            wanted.setdefault(self._files[place.shard], []).append((place.offset, place.size))
        return wanted

    def _look_up(self, rising: bytes) -> list[Place]:
        """Where samples lie; their positions are int64 in rising order."""
        positions = np.frombuffer(rising, np.int64)
        shards, firsts = np.unique(np.searchsorted(self.split.ends, positions, side="right"), return_index=True)
        self.split.want_indexes(shards.tolist())
        places: list[Place] = []
        for shard, group in zip(shards.tolist(), np.split(positions, firsts[1:]), strict=True):
            index = self._index(shard)
            places += places_in(self._paths[shard], index, group - (self.split.ends[shard] - index.samples))
        return places

    def _images(self, positions: NDArray[np.int64], places: list[Place], pool: DecoderPool) -> Pixels:
        """The pixels; what cannot be read is noted in `bad`."""
        known = np.array([position in self.bad for position in positions.tolist()])
        missing = np.flatnonzero(~known if self._cache is None else ~known & ~self._cached[positions])
        if not len(missing) and self._cache is not None:
            return self._cache[positions]
        pixels, faults = self._decode([places[i] for i in missing], pool)
        self.bad |= {int(positions[missing[i]]): fault for i, fault in faults.items()}
        if self._cache is not None:
            self._cache[positions[missing]] = pixels
            self._cached[positions[np.delete(missing, list(faults))]] = True
            return self._cache[positions]
        if len(missing) == len(positions):
            return pixels
        images = self._decoding.room(len(positions))
        images[:] = 0
        images[missing] = pixels
        return images

    def _decode(self, places: list[Place], pool: DecoderPool) -> tuple[Pixels, Faults]:
        with self.split.store.open(self._ranges(places), whole=not self._scattered) as files:

            def read(i: int) -> bytes:
                return self._payload(files[self._files[places[i].shard]], places[i])

            return pool.decode([f"{place.shard.name}: {place.key}" for place in places], read)

    def _payload(self, shard: FileIO | UserError, place: Place) -> bytes:
        """The checked bytes of a sample. Of a copy that is wrong there, or not whole, its part is fetched once more."""
        store, file, part = self.split.store, self._files[place.shard], [(place.offset, place.size)]
        try:
            return read_bytes(shard, place)
        except UserError:
            if store.is_local(file):
                raise
            if not isinstance(shard, UserError):
                store.forget(file, part)
        with store.open({file: part}, whole=False) as files:
            return read_bytes(files[file], place)


def _make_cache(samples: int, decoding: Decoding, cache: str) -> Pixels | None:
    """Room for the decoded split, or None. Memory is taken as it is written to, by every rank for what it has read."""
    size = samples * decoding.sample_bytes
    if cache == "none" or (cache == "auto" and size > AUTO_CACHE_BYTES):
        return None
    try:
        return decoding.room(samples)
    except MemoryError as error:
        raise UserError(
            f"data.cache=memory needs {size / 2**30:.1f} GiB a worker, which cannot be had; use auto or none"
        ) from error


def check_sizes(split: Split) -> None:
    """Compare every shard's size with the manifest's: one `stat` each, cheap enough for every start.

    Raises:
        UserError: a shard is missing or has another size.
    """
    for shard, entry in enumerate(split.shards):
        if not split.store.is_local(entry.file):  # what arrives is compared
            continue
        path = split.path(shard)
        try:
            size = path.stat().st_size
        except OSError as error:
            raise UserError(f"shard '{path}' cannot be read: {error.strerror}; {_VERIFY}") from error
        if size != entry.bytes:
            raise UserError(f"shard '{path}' has {size} bytes, but the manifest says {entry.bytes}; {_VERIFY}")


def read_bytes(shard: FileIO | UserError, place: Place) -> bytes:
    """The payload of one sample, checked; several threads may read one shard.

    Raises:
        UserError: the shard cannot be had (as it says itself), ends before the sample does, or holds other bytes there
            than it did when it was indexed.
    """
    if isinstance(shard, UserError):
        raise UserError(f"sample '{place.key}' of shard '{place.shard}' cannot be had: {shard}")
    data = os.pread(shard.fileno(), place.size, place.offset)
    if len(data) != place.size:
        raise UserError(f"shard '{place.shard}' is cut off inside sample '{place.key}'; {_VERIFY}")
    if zlib.crc32(data) != place.crc:
        raise UserError(f"sample '{place.key}' of shard '{place.shard}' is damaged: its CRC-32 is wrong; {_VERIFY}")
    return data
