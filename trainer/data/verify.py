"""A data set compared with its digests, counts and checksums, byte for byte. Runs without torch."""

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data.manifest import Manifest
from trainer.data.reader import Progress, places_in, read_bytes
from trainer.data.split import Split
from trainer.data.tar import REMEDY
from trainer.errors import UserError


def verify(manifest: Manifest, progress: Progress | None = None) -> None:
    """Read every file of a data set and compare it with the manifest and the indexes.

    Of tables and shards size and SHA-256; of indexes too, with each sample's checksum and the samples of each class.

    Raises:
        UserError: names every damaged file and what is wrong with it.
    """
    splits = [manifest.split(name) for name in manifest.splits]
    total = sum(entry.bytes for split in splits for entry in split.shards)
    done = 0
    faults: list[str] = []
    for split in splits:
        counts: NDArray[np.int64] | None = np.zeros(split.identities, np.int64)
        for shard, entry in enumerate(split.shards):
            try:
                found = _verify_shard(split, shard)
                counts = None if counts is None else counts + found
            except UserError as error:
                faults.append(str(error))
                counts = None
            done += entry.bytes
            if progress is not None:
                progress("verify", done, total)
        try:
            _verify_tables(split, counts)
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("\n".join(faults))


def _verify_shard(split: Split, shard: int) -> NDArray[np.int64]:
    """Compare a shard with its digest and its index: the samples of each class that it holds."""
    path, entry = split.path(shard), split.shards[shard]
    _compare(path, entry.bytes, entry.sha256)
    index = split.index(shard)
    with path.open("rb", buffering=0) as file:
        for place in places_in(path, index, np.arange(index.samples)):
            read_bytes(file, place)
    if (largest := int(index.labels.max())) >= split.identities:
        raise UserError(
            f"the index of shard '{path}' has label {largest}, but the manifest has {split.identities} classes "
            f"(0 to {split.identities - 1}); {REMEDY}"
        )
    return np.bincount(index.labels, minlength=split.identities)


def _verify_tables(split: Split, counts: NDArray[np.int64] | None) -> None:
    """Compare the split's tables with their digests, and its classes with what was counted (None: not all was)."""
    entry = split.entry
    for table in (entry.classes, entry.by_class, entry.attributes):
        if table is not None:
            _compare(split.store.path(table.file, table.bytes, table.sha256), table.bytes, table.sha256)
    if counts is not None and (wrong := np.flatnonzero(counts != split.classes.counts())).size:
        label = int(wrong[0])
        raise UserError(
            f"the shards hold {counts[label]} samples of class '{split.classes[label]}', but the manifest says "
            f"{split.classes.counts()[label]}; {REMEDY}"
        )


def _compare(path: Path, size: int, sha256: str) -> None:
    try:
        found = path.stat().st_size
        if found != size:
            raise UserError(f"'{path}' has {found} bytes, but the manifest says {size}; {REMEDY}")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}; {REMEDY}") from error
    if digest != sha256:
        raise UserError(f"'{path}' has SHA-256 {digest}, but the manifest says {sha256}; {REMEDY}")
