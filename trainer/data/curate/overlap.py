"""What two splits share: identities by name, and samples by their bytes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data.split import Split


@dataclass(frozen=True, slots=True)
class Overlap:
    """Of the second split: names of identities that the first has too, and how many samples, by length and CRC-32."""

    names: list[str]
    samples: int


def overlap(first: Split, second: Split) -> Overlap:
    """What of the second split is in the first one already. Reads the indexes and names of both, no sample."""
    names = set(first.classes.names())
    known = np.unique(_digests(first))
    return Overlap(
        names=[name for name in second.classes.names() if name in names],
        samples=int(np.isin(_digests(second), known).sum()),
    )


def _digests(split: Split) -> NDArray[np.uint64]:
    """Length and CRC-32 of each sample's bytes, as one number."""
    records = [split.index(shard).records for shard in range(len(split.shards))]
    return np.concatenate([one["size"].astype(np.uint64) << np.uint64(32) | one["crc"] for one in records])
