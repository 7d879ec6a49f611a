"""What the coming steps read is on its way before they come. Runs without torch.

Measured (benchmarks/data_remote.py, 20 ms and 200 Mbit/s a connection; the table is in docs/data.md): a window of
shuffled samples is quickest by whole shards, of which every part is needed; a P x K batch by the blocks in which its
samples lie, as one sample in a shard would cost all of it.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from trainer.data.reader import Reader
from trainer.data.samplers import PKSampler, SequentialSampler, ShuffledSampler
from trainer.errors import UserError

_STEPS = 8  # P x K batches fetched ahead
_SHARE = 0.9  # of the cache that is filled ahead of use, so that what is in use is never removed for it
Sampler = SequentialSampler | PKSampler


class Prefetch:
    """Tells the store, step by step, what the next ones read; does nothing where all shards are local.

    Args:
        reader: of the split; it knows where samples lie.
        sampler: the order.
        part: which samples of a global batch this rank reads, given how many there are.

    Raises:
        UserError: the cache is too small for the windows of a batch.
    """

    def __init__(self, reader: Reader, sampler: Sampler, part: Callable[[int], NDArray[np.int64]]) -> None:
        self._reader, self._sampler, self._part = reader, sampler, part
        self._shards = reader.split.shards
        self._store = reader.split.store
        self._local = all(self._store.is_local(entry.file) for entry in self._shards)
        self._wanted: set[int] = set()
        self._next = 0  # step, counted over all epochs
        if isinstance(sampler, ShuffledSampler) and not self._local:
            self._check(sampler.window)

    def __call__(self, epoch: int, step: int) -> None:
        """Have fetched what this step and the next ones read and is not under way."""
        if self._local:
            return
        if isinstance(self._sampler, PKSampler):
            self._want_samples(epoch * self._sampler.steps_per_epoch + step)
        else:
            self._want_shards(self._sampler, epoch, step)

    def _want_samples(self, now: int) -> None:
        first = self._next if now < self._next <= now + 1 + _STEPS else now
        self._next = now + 1 + _STEPS
        for step in range(first, self._next):
            positions = self._sampler.positions(*divmod(step, self._sampler.steps_per_epoch))
            self._reader.want(positions[self._part(len(positions))])

    def _want_shards(self, sampler: SequentialSampler, epoch: int, step: int) -> None:
        """The shards of the window of this step and of the next window, as far as the cache holds them."""
        start = step * sampler.batch_size // sampler.window * sampler.window
        stop = start + 2 * sampler.window
        shards = self._between(epoch, start, stop)
        if stop > self._reader.split.samples:
            shards += self._between(epoch + 1, 0, stop - self._reader.split.samples)
        room = _SHARE * self._store.cache_limit - np.cumsum([self._shards[shard].bytes for shard in shards])
        kept = [shard for shard, left in zip(shards, room, strict=True) if left >= 0]
        fresh = [shard for shard in dict.fromkeys(kept) if shard not in self._wanted]
        self._reader.split.want_indexes(fresh)
        self._store.want({self._shards[shard].file: None for shard in fresh})
        self._wanted = set(kept)

    def _between(self, epoch: int, start: int, stop: int) -> list[int]:
        """The shards in which these places of an epoch lie."""
        ends = self._reader.split.ends
        order = np.arange(len(ends))
        if isinstance(self._sampler, ShuffledSampler):
            order, ends = self._sampler.shards(epoch)
        first, last = np.searchsorted(ends, [start, min(stop, int(ends[-1])) - 1], side="right")
        found: list[int] = order[first : last + 1].tolist()
        return found

    def _check(self, window: int) -> None:
        sizes = sorted((entry.bytes for entry in self._shards), reverse=True)
        most = -(-2 * window * len(sizes) // self._reader.split.samples) + 1  # shards of two windows
        need, limit = sum(sizes[:most]), self._store.cache_limit
        if need > limit:
            raise UserError(
                f"data.cache_bytes {limit} is less than the {need} bytes of the two windows of data.shuffle_window "
                f"{window} samples that a batch can reach into; raise the one, or lower the other"
            )
