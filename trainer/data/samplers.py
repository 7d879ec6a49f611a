"""Which samples make up the global batch of a step: a pure function of (seed, epoch, step), whatever the world size.

Nothing is read for it but the manifest and its tables, and any step can be asked for directly, which is all that an
exact resume needs.

Arithmetic at 10M identities x 10 samples in 10,000 shards. Shuffled: the permutation of the shards is 80 kB, that of a
window of 50,000 samples 400 kB, and nothing grows with the number of samples. P x K: the tables are memory-mapped, and
a batch reads P places of the classes' and P * K of the by-class positions; no array grows with the set.
"""

from bisect import bisect_right
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from trainer.data.dealing import OnDemand, WholeEpoch
from trainer.data.tables import Classes, positions_of, samples_of_class
from trainer.errors import UserError

_SHARDS, _WINDOW, _GROUPS, _CLASS = range(4)  # keep the streams of random numbers apart
MOST_DEALT = 2**21  # groups of an epoch that are dealt in one piece: 32 MB for the epoch and as much while it is dealt


class SequentialSampler:
    """The order in which the samples lie in the shards."""

    def __init__(self, samples: int, batch_size: int) -> None:
        self._samples = samples
        self._batch_size = batch_size
        self.steps_per_epoch = -(-samples // batch_size)

    def size(self, step: int) -> int:
        """Samples of the global batch."""
        return min(self._batch_size, self._samples - step * self._batch_size)

    def part(self, epoch: int, step: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions of these rows of the global batch; past its end a short batch begins again."""
        positions = self.positions(epoch, step)
        return positions[rows % len(positions)]

    def positions(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Positions, in the manifest's order of shards, of the samples of one global batch.

        They are fewer than batch_size only in the last one of an epoch.
        """
        start = step * self._batch_size
        return np.arange(start, start + self.size(step))


class ShuffledSampler(SequentialSampler):
    """Shards in random order, laid end to end, and cut into windows; inside a window samples are in random order.

    Every sample comes once an epoch. The shards in which the samples of a batch lie are those of one or two windows.
    """

    def __init__(self, shard_samples: list[int], batch_size: int, window: int, seed: int) -> None:
        super().__init__(sum(shard_samples), batch_size)
        self._counts = np.array(shard_samples)
        self._starts = np.cumsum(self._counts) - self._counts
        self._window = window
        self._seed = seed
        self._shards = lru_cache(2)(self._shuffle_shards)
        self._inside = lru_cache(2)(self._shuffle_window)

    def positions(self, epoch: int, step: int) -> NDArray[np.int64]:
        return self.at(epoch, super().positions(epoch, step))

    def at(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions of the samples that come at these places, from 0, of an epoch."""
        places = places.copy()
        windows = places // self._window
        for window in np.unique(windows).tolist():
            inside = windows == window
            first = window * self._window
            places[inside] = first + self._inside(epoch, window)[places[inside] - first]
        order, ends = self._shards(epoch)
        rank = np.searchsorted(ends, places, side="right")
        shard = order[rank]
        positions: NDArray[np.int64] = self._starts[shard] + places - (ends[rank] - self._counts[shard])
        return positions

    def _shuffle_shards(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        order = np.random.default_rng([self._seed, epoch, _SHARDS]).permutation(len(self._counts))
        return order, np.cumsum(self._counts[order])

    def _shuffle_window(self, epoch: int, window: int) -> NDArray[np.int64]:
        size = min(self._window, self._samples - window * self._window)
        return np.random.default_rng([self._seed, epoch, _WINDOW, window]).permutation(size)


class PKSampler:
    """P identities x K samples a batch, for losses on pairs. Row p * K + k is the k-th sample of the p-th identity.

    Each epoch deals the samples of every class, shuffled, into groups of K; what is left over (fewer than K) waits for
    another epoch. Round j takes the j-th group of each class that has one, in random order. Round 0 holds all classes,
    so an epoch covers all identities. A round with fewer than P classes cannot fill a batch: an epoch ends before it,
    so that a few very large classes are seen in part. No batch is short, and none has an identity twice. How rounds
    are cut into batches is in `trainer.data.dealing`.

    Args:
        classes: of the split.
        by_class: its positions ordered by class.
        identities: P.
        batch_size: P * K.
        seed: of the order.

    Raises:
        UserError: fewer than P classes, or a class with fewer than K samples. Samples are never drawn twice into a
            batch to make up for it: a pair of equal images would be a positive that teaches nothing.
    """

    def __init__(
        self, classes: Classes, by_class: NDArray[np.int64], identities: int, batch_size: int, seed: int
    ) -> None:
        self._classes, self._by_class = classes, by_class
        self._p, self._k, self._seed = identities, batch_size // identities, seed
        self._check()
        by_size = classes.by_size()
        rounds = self._count(identities - 1) // self._k  # those with P classes or more
        sizes = np.array([self._with((j + 1) * self._k) for j in range(rounds)])
        key = [seed, _GROUPS]
        if int(sizes.sum()) <= MOST_DEALT:
            classes.check("the table of classes", len(by_class))
            self._deal: WholeEpoch | OnDemand = WholeEpoch(by_size, classes.counts() // self._k, sizes, identities, key)
        else:
            self._deal = OnDemand(by_size, sizes, identities, key)
        self.steps_per_epoch = self._deal.steps

    def size(self, step: int) -> int:
        """Samples of the global batch: P * K."""
        return self._p * self._k

    def positions(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Positions of the samples of one global batch: 30 µs an identity."""
        return self.part(epoch, step, np.arange(self._p * self._k))

    def part(self, epoch: int, step: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions of these rows of the global batch; only their own identities are looked up."""
        labels, groups = self._deal(epoch, step)
        own, inverse = np.unique(rows // self._k, return_inverse=True)
        found = np.stack([self._group(epoch, int(labels[p]), int(groups[p])) for p in own])
        return found[inverse, rows % self._k]

    def _with(self, samples: int) -> int:
        """How many classes have so many samples or more."""
        return bisect_right(range(len(self._classes)), -samples, key=lambda place: -self._count(place))

    def _count(self, place: int) -> int:
        """Samples of the class at this place of the order by size."""
        return samples_of_class(self._classes, int(self._classes.by_size()[place]), len(self._by_class))[0]

    def _check(self) -> None:
        classes, p, k = self._classes, self._p, self._k
        if len(classes) < p:
            raise UserError(
                f"data.identities_per_batch {p} is more than the {len(classes)} classes of the split; "
                f"give at most {len(classes)}"
            )
        small = classes.by_size()[self._with(k) :]
        if len(small):
            first = int(small.min())
            raise UserError(
                f"a batch takes K = {k} samples of each identity, but class '{classes[first]}' has "
                f"{classes.counts()[first]} and {len(small)} of {len(classes)} classes have fewer than {k}; "
                f"raise data.identities_per_batch, lower data.batch_size, or import with --min-samples {k}"
            )

    def _group(self, epoch: int, label: int, group: int) -> NDArray[np.int64]:
        count, end = samples_of_class(self._classes, label, len(self._by_class))
        dealt = np.random.default_rng([self._seed, epoch, _CLASS, label]).permutation(count)
        chosen: NDArray[np.int64] = self._by_class[end - count + dealt[group * self._k : (group + 1) * self._k]]
        return positions_of(self._classes[label], chosen, len(self._by_class))
