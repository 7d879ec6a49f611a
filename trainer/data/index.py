"""Where each sample lies in its shard, and whether the shards are the ones that were written. Runs without torch.

Reading only headers gives random access: a rank then reads the bytes of its own samples and no others, whatever the
number of ranks. The walk below reads 512 bytes a member (measured: 20 times the speed of `tarfile`, which checks what
SHA-256 checks better).
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data.manifest import Manifest, ShardEntry
from trainer.errors import UserError

Progress = Callable[[str, int, int], None]  # stage, done, total

_BLOCK = 512
_IMAGES = ("png", "jpg", "jpeg")
_FETCH = "import the data again, or fetch this shard anew"
REMEDY = f"run 'hypersphere data verify' and {_FETCH}"


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """The samples of one shard, in its order: 25 bytes a sample."""

    keys: NDArray[np.bytes_]
    offsets: NDArray[np.int64]  # of the image's bytes in the file
    sizes: NDArray[np.int32]
    labels: NDArray[np.int32]


def check_sizes(folder: Path, shards: Iterable[ShardEntry]) -> None:
    """Compare every shard's size with the manifest's: one `stat` each, cheap enough for every start.

    Raises:
        UserError: a shard is missing or has another size.
    """
    for entry in shards:
        path = folder / entry.name
        try:
            size = path.stat().st_size
        except OSError as error:
            raise UserError(f"shard '{path}' cannot be read: {error.strerror}; {REMEDY}") from error
        if size != entry.bytes:
            raise UserError(f"shard '{path}' has {size} bytes, but the manifest says {entry.bytes}; {REMEDY}")


def verify(folder: Path, manifest: Manifest, progress: Progress | None = None) -> None:
    """Read all shards and compare size, SHA-256, number of samples and labels with the manifest.

    Raises:
        UserError: names every damaged shard and what is wrong with it.
    """
    entries = [(split, entry) for split in manifest.splits.values() for entry in split.shards]
    total = sum(entry.bytes for _, entry in entries)
    done = 0
    faults = []
    for split, entry in entries:
        try:
            _verify_shard(folder, entry, len(split.classes))
        except UserError as error:
            faults.append(str(error).replace(REMEDY, _FETCH))
        done += entry.bytes
        if progress is not None:
            progress("verify", done, total)
    if faults:
        raise UserError("\n".join(faults))


def _verify_shard(folder: Path, entry: ShardEntry, classes: int) -> None:
    check_sizes(folder, [entry])
    path = folder / entry.name
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != entry.sha256:
        raise UserError(f"shard '{path}' has SHA-256 {digest}, but the manifest says {entry.sha256}; {REMEDY}")
    read_index(path, entry, classes)


def read_index(path: Path, entry: ShardEntry, classes: int) -> ShardIndex:
    """Walk a shard's headers.

    Raises:
        UserError: the shard is missing, cut off or not a tar of samples; or a label is not below `classes`, and then
            the message names the sample.
    """
    with open_shard(path) as file:
        # members of one sample follow each other
        grouped = groupby(_members(file.fileno(), path), key=lambda member: member[0].partition(b".")[0])
        samples = [(key, *_sample(file.fileno(), path, key, members)) for key, members in grouped]
    for key, _, _, label in samples:
        if not 0 <= label < classes:
            raise UserError(
                f"sample '{_text(key)}' of shard '{path}' has label {label}, but the manifest has {classes} classes "
                f"(0 to {classes - 1}); {REMEDY}"
            )
    if len(samples) != entry.samples:
        raise UserError(f"shard '{path}' has {len(samples)} samples, but the manifest says {entry.samples}; {REMEDY}")
    keys, offsets, sizes, labels = zip(*samples, strict=True)
    return ShardIndex(np.array(keys), np.array(offsets), np.array(sizes).astype(np.int32), np.array(labels, np.int32))


def open_shard(path: Path) -> FileIO:
    """A shard to be read at any place.

    Raises:
        UserError: it cannot be opened.
    """
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise UserError(f"shard '{path}' cannot be opened: {error.strerror}; {REMEDY}") from error


def read_bytes(shard: FileIO, index: ShardIndex, row: int) -> bytes:
    """The image file of one sample; several threads may read one shard.

    Raises:
        UserError: the shard ends before the sample does.
    """
    size = int(index.sizes[row])
    data = os.pread(shard.fileno(), size, int(index.offsets[row]))
    if len(data) != size:
        raise UserError(f"shard '{shard.name}' is cut off inside sample '{_text(index.keys[row])}'; {REMEDY}")
    return data


def _sample(handle: int, path: Path, key: bytes, members: Iterator[tuple[bytes, int, int]]) -> tuple[int, int, int]:
    """Offset and size of a sample's image, and its label."""
    image: tuple[int, int] | None = None
    label: int | None = None
    for name, offset, size in members:
        kind = _text(name.partition(b".")[2]).lower()
        if kind in _IMAGES:
            image = offset, size
        elif kind == "cls":
            text = os.pread(handle, min(size, 20), offset)
            if not text.strip().isdigit():
                raise UserError(f"sample '{_text(name)}' of shard '{path}' has no number; {REMEDY}")
            label = int(text)
    if image is None or label is None:
        missing = "an image (.png or .jpg)" if image is None else "a label (.cls)"
        raise UserError(f"sample '{_text(key)}' of shard '{path}' lacks {missing}; {REMEDY}")
    return *image, label


def _members(handle: int, path: Path) -> Iterator[tuple[bytes, int, int]]:
    """Name, offset and size of each file in a plain ustar archive."""
    end = os.fstat(handle).st_size
    offset = 0
    while True:
        header = os.pread(handle, _BLOCK, offset)
        if len(header) == _BLOCK and not any(header):
            return
        digits = header[124:136].strip(b" \0")
        octal = digits != b"" and not digits.strip(b"01234567")
        if len(header) < _BLOCK or header[257:262] != b"ustar" or not octal or header[156:157] not in b"0\0":
            raise UserError(f"shard '{path}' is cut off or damaged at byte {offset}; {REMEDY}")
        size = int(digits, 8)
        offset += _BLOCK
        if offset + size > end:
            raise UserError(f"shard '{path}' is cut off at byte {end}; {REMEDY}")
        yield header[:100].rstrip(b"\0"), offset, size
        offset += -(-size // _BLOCK) * _BLOCK


def _text(name: bytes) -> str:
    return name.decode(errors="replace")
