"""How the groups of an epoch of P x K batches are cut into batches: in one piece, or each batch by itself.

A group is K samples of one class; round j is the j-th group of each class that has one. Both deals give, for an epoch
and a step, the P classes of the batch and which group of each.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_FEISTEL_ROUNDS = 6  # 4 make a pseudo-random permutation; narrow halves want a few more
Dealt = tuple[NDArray[np.int64], NDArray[np.int64]]  # classes and groups


class WholeEpoch:
    """Rounds laid end to end and cut into batches of P, rearranged so that the P identities of a batch differ.

    The last batch is filled up with further identities. Memory: 16 bytes a group of an epoch, for two epochs.

    Args:
        by_size: classes by falling number of groups.
        groups: of each class.
        sizes: classes of each round.
        p: identities of a batch.
        key: (seed, use) of the random numbers.
    """

    def __init__(
        self, by_size: NDArray[np.int64], groups: NDArray[np.int64], sizes: NDArray[np.int64], p: int, key: list[int]
    ) -> None:
        self._by_size, self._groups, self._sizes, self._p, self._key = by_size, groups, sizes, p, key
        self.steps = -(-int(sizes.sum()) // p)
        self._epoch = lru_cache(2)(self._deal)

    def __call__(self, epoch: int, step: int) -> Dealt:
        batch = slice(step * self._p, (step + 1) * self._p)
        classes, groups = self._epoch(epoch)
        return classes[batch], groups[batch]

    def _deal(self, epoch: int) -> Dealt:
        """Class and number of each group of the epoch, in order."""
        seed, use = self._key
        random = np.random.default_rng([seed, epoch, use])
        classes: list[NDArray[np.int64]] = []
        tail = np.empty(0, dtype=np.int64)  # groups of the batch that the last round left unfinished
        for size in self._sizes.tolist():
            fresh = random.permutation(np.sort(self._by_size[:size]))
            _part(fresh, self._p - len(tail), tail)
            classes.append(fresh)
            laid = np.concatenate([tail, fresh])
            tail = laid[len(laid) - len(laid) % self._p :]
        rounds = [np.full(len(fresh), j) for j, fresh in enumerate(classes)]
        if len(tail):
            others = random.permutation(np.setdiff1d(classes[-1], tail))[: self._p - len(tail)]
            classes.append(others)
            rounds.append(len(self._sizes) % self._groups[others])
        return np.concatenate(classes), np.concatenate(rounds)


def _part(fresh: NDArray[np.int64], need: int, tail: NDArray[np.int64]) -> None:
    """Exchange, in place, those of the first `need` classes that are in `tail` with later ones that are not.

    There are always enough: of the P or more classes in `fresh` at most len(tail) = P - need are in `tail`.
    """
    clash = np.flatnonzero(np.isin(fresh[:need], tail))
    free = need + np.flatnonzero(~np.isin(fresh[need:], tail))[: len(clash)]
    fresh[clash], fresh[free] = fresh[free], fresh[clash]


class OnDemand:
    """Each round cut into batches by itself; its last batch goes back as far as it must to be full.

    So up to P - 1 groups of a round come twice in an epoch. A batch is computed from its number alone: no memory but
    8 bytes a round, and P places of `by_size` are read. Arguments as of `WholeEpoch`.
    """

    def __init__(self, by_size: NDArray[np.int64], sizes: NDArray[np.int64], p: int, key: list[int]) -> None:
        self._by_size, self._sizes, self._p, self._key = by_size, sizes, p, key
        self._ends = np.cumsum(-(-sizes // p))
        self.steps = int(self._ends[-1])

    def __call__(self, epoch: int, step: int) -> Dealt:
        seed, use = self._key
        j = int(np.searchsorted(self._ends, step, side="right"))
        size, before = int(self._sizes[j]), int(self._ends[j - 1]) if j else 0
        first = min((step - before) * self._p, size - self._p)
        places = permuted(np.arange(first, first + self._p), size, [seed, epoch, use, j])
        return self._by_size[places], np.full(self._p, j)


def permuted(places: NDArray[np.int64], size: int, seed: list[int]) -> NDArray[np.int64]:
    """`permutation[places]` of a pseudo-random permutation of range(size), without the permutation.

    A balanced Feistel network over the next power of 4, walked until the place is below `size` (Black and Rogaway,
    "Ciphers with Arbitrary Finite Domains", 2002): at most 4 walks a place on average.
    """
    half = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    keys = np.random.default_rng(seed).integers(0, 2**64, _FEISTEL_ROUNDS, dtype=np.uint64)
    found = places.astype(np.uint64)
    outside = np.ones(len(found), bool)
    while outside.any():
        found[outside] = _feistel(found[outside], half, keys)
        outside = found >= size
    return found.astype(np.int64)


def _feistel(x: NDArray[np.uint64], half: np.uint64, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return (left << half) | right


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Every bit of the result depends on every bit of x (the finaliser of SplitMix64, Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
