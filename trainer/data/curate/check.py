"""A data set examined: digests, counts, decoding, balance, and samples that occur twice. Runs without torch."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data.curate.duplicates import MAX_DISTANCE, Pairs, equal_pairs, near_pairs
from trainer.data.curate.scan import Findings, scan
from trainer.data.manifest import Manifest
from trainer.data.reader import Progress
from trainer.data.remote import text_of
from trainer.data.split import Split
from trainer.data.verify import verify
from trainer.errors import UserError

_UNSEEN = 2**24  # samples without an index that are made room for: 1 GB


@dataclass(frozen=True, slots=True)
class Balance:
    """How many samples the identities of a split have; `bins`: from, to, and how many identities have so many."""

    samples: int
    identities: int
    fewest: int
    median: float
    most: int
    bins: list[tuple[int, int, int]]

    @classmethod
    def of(cls, counts: NDArray[np.int64]) -> "Balance":
        """Bins of 1, 2, 3 to 4, 5 to 8, 9 to 16, ... samples."""
        bins, low = [], 1
        while low <= counts.max():
            high = max(1, 2 * (low - 1))
            bins.append((low, high, int(((counts >= low) & (counts <= high)).sum())))
            low = high + 1
        fewest, most = int(counts.min()), int(counts.max())
        return cls(int(counts.sum()), len(counts), fewest, float(np.median(counts)), most, bins)


@dataclass(frozen=True, slots=True)
class Check:
    """What was found.

    Attributes:
        balance: of each split.
        faults: a sentence each: files that are not as they were written, samples that cannot be decoded.
        equal, near: pairs in two identities or two splits, by position among all samples.
        equal_within, near_within: how many pairs lie inside one identity.
    """

    manifest: Manifest
    splits: dict[str, Split]
    scan: Findings
    balance: dict[str, Balance]
    faults: list[str]
    equal: Pairs
    near: Pairs
    equal_within: int
    near_within: int

    @property
    def wrong(self) -> bool:
        """Something is surely wrong. Near duplicates do not count: a person has to judge them."""
        return bool(self.faults or len(self.equal))


def check(
    address: str | Path, *, distance: int = MAX_DISTANCE, jobs: int | None = None, progress: Progress | None = None
) -> Check:
    """Examine every file and every sample of a data set. Memory: about 60 bytes a sample.

    Args:
        address: of the data set.
        distance: bits of 256 in which two perceptual hashes may differ to count as near duplicates: 0 to 12.
        jobs: processes that decode; None: as many as there are cores.
        progress: called with the stages "verify" and "decode".

    Raises:
        UserError: there is no data set, an option is not allowed, or a decoding process was killed.
    """
    jobs = (os.cpu_count() or 1) if jobs is None else jobs
    if not 0 <= distance <= MAX_DISTANCE:
        raise UserError(f"--distance {distance} is not allowed; give 0 to {MAX_DISTANCE} bits")
    if jobs < 1:
        raise UserError(f"--jobs {jobs} is not allowed; give 1 or more")
    manifest = Manifest.read(address)
    faults: list[str] = []
    try:
        verify(manifest, progress)
    except UserError as error:
        faults += str(error).split("\n")
    _check_claims(manifest)
    found = scan(text_of(address), manifest, jobs, progress)
    faults += [fault for fault in found.faults if fault not in faults]
    good = np.flatnonzero(found.good)
    equal, equal_within = _apart(found, _at(good, equal_pairs(found.digests[good])))
    near, near_within = Pairs.none(), 0
    if manifest.content == "image":
        pairs = near_pairs(found.digests[good], found.hashes[good], distance)
        near, near_within = _apart(found, _at(good, pairs))
    splits = {name: manifest.split(name) for name in manifest.splits}
    return Check(manifest, splits, found, _balance(splits), faults, equal, near, equal_within, near_within)


def _check_claims(manifest: Manifest) -> None:
    """Memory is taken for every sample that the manifest claims: so an index has to say the same of most of them."""
    claimed = 0
    for name in manifest.splits:
        split = manifest.split(name)
        for shard, entry in enumerate(split.shards):
            try:
                split.index(shard)
            except UserError as error:
                claimed += entry.samples
                if claimed > _UNSEEN:
                    raise UserError(f"{claimed} samples have no index that can be read; the last: {error}") from error


def _balance(splits: dict[str, Split]) -> dict[str, Balance]:
    """Of the splits whose table of classes can be read; the verification names the others."""
    balance = {}
    for name, split in splits.items():
        with suppress(UserError):
            balance[name] = Balance.of(split.classes.counts())
    return balance


def _at(good: NDArray[np.int64], pairs: Pairs) -> Pairs:
    return Pairs(good[pairs.first], good[pairs.second], pairs.distance)


def _apart(found: Findings, pairs: Pairs) -> tuple[Pairs, int]:
    """The pairs in two identities or splits, and the number of the others."""
    other_split = found.split_of(pairs.first) != found.split_of(pairs.second)
    apart = other_split | (found.labels[pairs.first] != found.labels[pairs.second])
    return pairs.where(apart), int((~apart).sum())
