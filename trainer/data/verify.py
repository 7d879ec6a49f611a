"""A data set compared with its digests, counts and checksums, byte for byte. Runs without torch."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from trainer.data.index import ShardIndex
from trainer.data.manifest import MANIFEST_FILE, Manifest
from trainer.data.reader import Progress, places_in, read_bytes
from trainer.data.split import Split
from trainer.data.tables import by_class
from trainer.data.tar import REMEDY
from trainer.errors import UserError


def verify(manifest: Manifest, progress: Progress | None = None) -> None:
    """Read every file of a data set and compare it with the manifest and the indexes.

    Of tables, indexes and shards size and SHA-256; then whether what they say fits together: each sample's checksum and
    key, the samples of each class, and the orders by class and by size.

    Raises:
        UserError: names every damaged file and what is wrong with it.
    """
    splits = [manifest.split(name) for name in manifest.splits]
    total = sum(entry.bytes for split in splits for entry in split.shards)
    done = 0
    faults: list[str] = []
    for split in splits:
        known = len(faults)
        for shard, entry in enumerate(split.shards):
            with _noted(faults):
                _verify_shard(split, shard)
            done += entry.bytes
            if progress is not None:
                progress("verify", done, total)
        whole, known = len(faults) == known, len(faults)
        for table in (split.entry.classes, split.entry.by_class, split.entry.attributes):
            if table is not None:
                with _noted(faults):
                    _compare(split.store.path(table.file, table.bytes, table.sha256), table.bytes, table.sha256)
        if len(faults) == known:
            with _noted(faults):
                _verify_tables(split, whole)
    if faults:
        raise UserError("\n".join(faults))


@contextmanager
def _noted(faults: list[str]) -> Iterator[None]:
    """What is found wrong in the block goes to `faults`, and the search goes on."""
    try:
        yield
    except UserError as error:
        faults.append(str(error))


def _verify_shard(split: Split, shard: int) -> None:
    """Compare a shard with its digest and its index."""
    path, entry = split.path(shard), split.shards[shard]
    _compare(path, entry.bytes, entry.sha256)
    index = split.index(shard)
    _verify_keys(path, index)
    with path.open("rb", buffering=0) as file:
        for place in places_in(path, index, np.arange(index.samples)):
            read_bytes(file, place)
    if (largest := int(index.labels.max())) >= split.identities:
        raise UserError(
            f"the index of shard '{path}' has label {largest}, but the manifest has {split.identities} classes "
            f"(0 to {split.identities - 1}); {REMEDY}"
        )


def _verify_tables(split: Split, whole: bool) -> None:
    """Compare what the split's tables say with each other and, if all shards are whole, with their indexes.

    The tables are opened before anything is made in a size that the manifest names. Memory: 8 bytes a class and, for
    the by-class positions as they should be, 8 bytes a sample.
    """
    classes, entry = split.classes, split.entry
    classes.check(entry.classes.file if entry.classes else MANIFEST_FILE, split.samples)
    if entry.classes and classes.digest() != entry.classes.names_sha256:
        raise UserError(f"'{entry.classes.file}' has other names than the manifest's names_sha256 says; {REMEDY}")
    if not whole:
        return
    counts = np.zeros(len(classes), np.int64)
    for labels in split.labels():
        counts += np.bincount(labels, minlength=len(classes))
    if (wrong := np.flatnonzero(counts != classes.counts())).size:
        label = int(wrong[0])
        raise UserError(
            f"the shards hold {counts[label]} samples of class '{classes[label]}', but the manifest says "
            f"{classes.counts()[label]}; {REMEDY}"
        )
    if entry.by_class is not None:
        right = np.empty(split.samples, np.int64)
        by_class(split.labels(), classes, right)
        if (wrong := np.flatnonzero(split.by_class != right)).size:
            raise UserError(
                f"'{entry.by_class.file}' has position {split.by_class[wrong[0]]} in place {wrong[0]}, where the "
                f"samples' labels want {right[wrong[0]]}; {REMEDY}"
            )


def _verify_keys(path: Path, index: ShardIndex) -> None:
    ends = index.records["key_end"].astype(np.int64)
    if len(index.keys) and ((np.diff(ends) < 0).any() or ends[-1] != len(index.keys)):
        raise UserError(f"the index of shard '{path}' has keys whose ends do not rise to their last byte; {REMEDY}")


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
