"""Which samples make up the global batch of a step: a pure function of (seed, epoch, step), whatever the world size.

Nothing is read for it but the manifest's counts, and any step can be asked for directly, which is all that an exact
resume needs.

Arithmetic of the shuffled sampler at 10M identities x 10 samples in 10,000 shards: the permutation of the shards is
80 kB, that of a window of 50,000 samples 400 kB, and nothing grows with the number of samples. The P x K sampler
needs the labels: 4 + 8 bytes a sample (1.2 GB there) and 12 bytes a group of K samples.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from trainer.data.split import Split
from trainer.errors import UserError

_SHARDS, _WINDOW, _GROUPS, _CLASS = range(4)  # keep the streams of random numbers apart


class SequentialSampler:
    """The order in which the samples lie in the shards."""

    def __init__(self, samples: int, batch_size: int) -> None:
        self._samples = samples
        self._batch_size = batch_size
        self.steps_per_epoch = -(-samples // batch_size)

    def positions(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Positions, in the manifest's order of shards, of the samples of one global batch.

        They are fewer than batch_size only in the last one of an epoch.
        """
        start = step * self._batch_size
        return np.arange(start, min(start + self._batch_size, self._samples))


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
        places = super().positions(epoch, step)
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
    another epoch. Round j takes the j-th group of each class that has one, in random order; batches are P groups from
    the rounds laid end to end, rearranged so that the P identities of a batch differ. Round 0 holds all classes, so an
    epoch covers all identities. A round with fewer than P classes cannot fill a batch: an epoch ends before it, so that
    a few very large classes are seen in part. The last batch is filled up with further identities and is never short.

    Raises:
        UserError: fewer than P classes, or a class with fewer than K samples. Samples are never drawn twice into a
            batch to make up for it: a pair of equal images would be a positive that teaches nothing.
    """

    def __init__(self, split: Split, identities: int, batch_size: int, seed: int) -> None:
        self._p = identities
        self._k = batch_size // identities
        self._seed = seed
        self._split = split
        self._counts = split.classes.counts()
        self._check(split)
        self._groups = self._counts // self._k
        self._rounds = int(np.sort(self._groups)[-self._p])  # rounds 0 to this one have P classes or more
        self.steps_per_epoch = -(-int(np.minimum(self._groups, self._rounds).sum()) // self._p)
        self._epoch = lru_cache(2)(self._deal)

    def positions(self, epoch: int, step: int) -> NDArray[np.int64]:
        batch = slice(step * self._p, (step + 1) * self._p)
        classes, rounds = (dealt[batch].tolist() for dealt in self._epoch(epoch))
        return np.concatenate([self._group(epoch, c, j) for c, j in zip(classes, rounds, strict=True)])

    def _check(self, split: Split) -> None:
        p, k, classes = self._p, self._k, len(split.classes)
        if classes < p:
            raise UserError(
                f"data.identities_per_batch {p} is more than the {classes} classes of the split; give at most {classes}"
            )
        small = np.flatnonzero(self._counts < k)
        if len(small):
            first = int(small[0])
            raise UserError(
                f"a batch takes K = {k} samples of each identity, but class '{split.classes[first]}' has "
                f"{self._counts[first]} and {len(small)} of {classes} classes have fewer than {k}; "
                f"raise data.identities_per_batch, lower data.batch_size, or import with --min-samples {k}"
            )

    def _group(self, epoch: int, label: int, group: int) -> NDArray[np.int64]:
        dealt = np.random.default_rng([self._seed, epoch, _CLASS, label]).permutation(self._counts[label])
        start = self._split.classes.ends()[label] - self._counts[label]
        chosen: NDArray[np.int64] = self._split.by_class[start + dealt[group * self._k : (group + 1) * self._k]]
        return chosen

    def _deal(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Class and number of each group of the epoch, in order."""
        random = np.random.default_rng([self._seed, epoch, _GROUPS])
        classes: list[NDArray[np.int64]] = []
        tail = np.empty(0, dtype=np.int64)  # groups of the batch that the last round left unfinished
        for j in range(self._rounds):
            fresh = random.permutation(np.flatnonzero(self._groups > j))
            _part(fresh, self._p - len(tail), tail)
            classes.append(fresh)
            laid = np.concatenate([tail, fresh])
            tail = laid[len(laid) - len(laid) % self._p :]
        rounds = [np.full(len(fresh), j) for j, fresh in enumerate(classes)]
        if len(tail):
            others = random.permutation(np.setdiff1d(classes[-1], tail))[: self._p - len(tail)]
            classes.append(others)
            rounds.append(self._rounds % self._groups[others])
        return np.concatenate(classes), np.concatenate(rounds)


def _part(fresh: NDArray[np.int64], need: int, tail: NDArray[np.int64]) -> None:
    """Exchange, in place, those of the first `need` classes that are in `tail` with later ones that are not.

    There are always enough: of the P or more classes in `fresh` at most len(tail) = P - need are in `tail`.
    """
    clash = np.flatnonzero(np.isin(fresh[:need], tail))
    free = need + np.flatnonzero(~np.isin(fresh[need:], tail))[: len(clash)]
    fresh[clash], fresh[free] = fresh[free], fresh[clash]
