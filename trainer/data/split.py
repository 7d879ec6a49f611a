"""The samples of one use, such as training: their shards, indexes and classes. Runs without torch.

Samples have positions: 0, 1, ... in the order of the shards and of each shard's index.
"""

import hashlib
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from trainer.data.index import RECORD, ShardIndex, make_index, open_index, write_index
from trainer.data.remote import checked
from trainer.data.store import DataStore, File
from trainer.data.tables import (
    Classes,
    ClassesFile,
    TableFile,
    by_class,
    open_by_class,
    plain_name,
    write_by_class,
    write_classes,
)
from trainer.data.tar import REMEDY, TarSample, samples_of
from trainer.errors import UserError
from trainer.strict import Strict

SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")  # that a new split may have: its files are called by it
MAX_SHARD_BYTES = 2**42  # 4 TiB: of a shard from elsewhere the cache keeps a byte for every 64 KiB
_HEADER_BYTES = 512  # that a sample takes in a tar at least


class ShardEntry(Strict):
    """One tar file, and the index beside the manifest that says which of its samples belong to the split.

    `bytes` and `sha256` are of the whole tar; `samples` are those of the index. Without `index_sha256` (in manifests
    of format 1) the index is made when it is first needed.
    """

    name: str
    url: str | None = Field(None, description="where the tar lies, if not beside the manifest")
    samples: int = Field(ge=1)
    bytes: int = Field(ge=1, le=MAX_SHARD_BYTES)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    index_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")

    _plain = field_validator("name")(lambda value: plain_name(value))
    _known = field_validator("url")(lambda value: None if value is None else checked(value))

    @model_validator(mode="after")
    def _holds(self) -> "ShardEntry":
        if self.samples * _HEADER_BYTES > self.bytes:
            raise ValueError(f"a tar of {self.bytes} bytes cannot hold {self.samples} samples")
        return self

    @property
    def index_file(self) -> str:
        return self.name.removesuffix(".tar") + ".idx"

    @property
    def file(self) -> File:
        return File(self.name, self.bytes, self.sha256, self.url)


class SplitEntry(Strict):
    """A split as the manifest has it. Labels count from 0 within the split."""

    samples: int = Field(ge=1)
    identities: int = Field(ge=2, le=2**32)
    classes: ClassesFile | None = Field(None, description="null: the names are in the manifest itself (format 1)")
    by_class: TableFile | None = Field(None, description="positions ordered by label; null: made when needed")
    attributes: TableFile | None = Field(None, description="one row a sample, in order of position")
    shards: list[ShardEntry] = Field(min_length=1)

    @model_validator(mode="after")
    def _sums(self) -> "SplitEntry":
        total = sum(shard.samples for shard in self.shards)
        if total != self.samples:
            raise ValueError(f"the shards sum to {total}, but samples is {self.samples}")
        return self


class Split:
    """A split at hand; its tables and indexes are opened when they are first asked for.

    Args:
        name: of the split.
        entry: what the manifest says of it.
        store: where its files lie.
        classes: where they are not in a file of their own.
        holds: what the samples are, in words, as `Form.reads` says it.
    """

    def __init__(
        self, name: str, entry: SplitEntry, store: DataStore, classes: Classes | None = None, holds: str = "images"
    ) -> None:
        self.name, self.entry, self.store, self.holds = name, entry, store, holds
        self.samples, self.identities, self.shards = entry.samples, entry.identities, entry.shards
        self._inline = classes
        self._checked: set[int] = set()
        self._made: dict[int, ShardIndex] = {}

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """The position after the last sample of each shard."""
        return np.cumsum([entry.samples for entry in self.shards])

    @cached_property
    def classes(self) -> Classes:
        """The identities: `classes[label]` is a name.

        Raises:
            UserError: their table is missing or damaged.
        """
        table = self.entry.classes
        if table is None:
            if self._inline is None:
                raise UserError(f"the manifest names no table of classes for the split '{self.name}'; {REMEDY}")
            return self._inline
        path = self.store.path(table.file, table.bytes, table.sha256)
        classes = Classes.open(path)
        if len(classes) != self.identities:
            raise UserError(f"'{path}' has {len(classes)} classes, but the manifest says {self.identities}; {REMEDY}")
        return classes

    @cached_property
    def class_digest(self) -> str:
        """Of the names in order: which label is whom."""
        return self.entry.classes.names_sha256 if self.entry.classes else self.classes.digest()

    @cached_property
    def by_class(self) -> NDArray[np.int64]:
        """Positions of all samples ordered by label, then position; class c ends at `classes.ends()[c]`.

        Raises:
            UserError: the table is damaged, or the shards do not hold what the manifest says.
        """
        table = self.entry.by_class
        if table is not None:
            return open_by_class(self.store.path(table.file, table.bytes, table.sha256), self.samples)
        if self.store.scratch is not None:
            path = self.store.scratch / f"{self.name}.by_class.npy"
            if not path.exists():
                write_by_class(path, self.labels(), self.classes)
            return open_by_class(path, self.samples)
        positions = np.empty(self.samples, np.int64)
        by_class(self.labels(), self.classes, positions)
        return positions

    def path(self, shard: int) -> Path:
        """Where the tar can be read."""
        return self.store.path(*self.shards[shard].file)

    def index(self, shard: int) -> ShardIndex:
        """The index of a shard; its digest is compared when it is first opened.

        Raises:
            UserError: it is missing, damaged or of another shard.
        """
        entry = self.shards[shard]
        if entry.index_sha256 is None:
            return self._own_index(shard)
        path = self.store.path(entry.index_file, sha256=entry.index_sha256)
        index = open_index(path)
        if shard not in self._checked:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != entry.index_sha256:
                raise UserError(
                    f"index '{path}' has SHA-256 {digest}, but the manifest says {entry.index_sha256}; {REMEDY}"
                )
            _compare(path, index, entry)
            self._checked.add(shard)
        return index

    def want_indexes(self, shards: Iterable[int]) -> None:
        """Have the indexes of these shards fetched at the same time, where they lie elsewhere and are not here yet."""
        entries = [self.shards[shard] for shard in shards if shard not in self._checked]
        self.store.want({File(e.index_file, None, e.index_sha256): None for e in entries if e.index_sha256})

    def labels(self) -> Iterator[NDArray[np.uint32]]:
        """The labels of all samples in order of position, shard by shard."""
        return (self.index(shard).labels for shard in range(len(self.shards)))

    def _own_index(self, shard: int) -> ShardIndex:
        """The index of a shard that came without one: made once, and kept beside it where that can be written."""
        if shard in self._made:
            return self._made[shard]
        entry, scratch = self.shards[shard], self.store.scratch
        kept = scratch / entry.index_file if scratch is not None else None
        if kept is not None and kept.exists():
            index = open_index(kept)
            _compare(kept, index, entry)
            return index
        index = index_shard(self.path(shard), entry, self.identities)
        if kept is None:
            self._made[shard] = index
        else:
            write_index(kept, index)
        return index


def write_split(
    folder: Path, name: str, names: Sequence[str], counts: NDArray[np.int64], shards: list[ShardEntry]
) -> SplitEntry:
    """Write the tables of a split whose indexes are in the folder already; what the manifest says of it.

    Args:
        folder: where the manifest will be.
        name: of the split.
        names, counts: of its classes.
        shards: whose indexes are written.

    Raises:
        UserError: the indexes do not hold `counts[label]` samples of each label.
    """
    classes_file = write_classes(folder / f"{name}.classes.arrow", names, counts)
    classes = Classes.open(folder / classes_file.file)
    labels = (open_index(folder / entry.index_file).labels for entry in shards)
    table = write_by_class(folder / f"{name}.by_class.npy", labels, classes)
    samples = sum(entry.samples for entry in shards)
    return SplitEntry(samples=samples, identities=len(names), classes=classes_file, by_class=table, shards=shards)


def index_shard(path: Path, entry: ShardEntry, classes: int) -> ShardIndex:
    """Make the index of a whole shard from the shard itself, whose digest is compared with the manifest's.

    Raises:
        UserError: the shard is missing, cut off or not the one of the manifest; or a sample is incomplete or its label
            not below `classes`, and then the message names the sample.
    """
    keys: list[str] = []
    records: list[tuple[int, int, int, int, int]] = []
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            if digest != entry.sha256:
                raise UserError(f"shard '{path}' has SHA-256 {digest}, but the manifest says {entry.sha256}; {REMEDY}")
            for sample in samples_of(file, str(path)):
                keys.append(sample.key)
                label = _label(sample, path, classes)
                records.append((sample.offset, len(sample.payload), label, zlib.crc32(sample.payload), 0))
    except OSError as error:
        raise UserError(f"shard '{path}' cannot be opened: {error.strerror}; {REMEDY}") from error
    index = make_index(np.array(records, RECORD), keys, entry.bytes)
    _compare(path, index, entry)
    return index


def _label(sample: TarSample, path: Path, classes: int) -> int:
    if sample.label is None or sample.label >= classes:
        what = "no label (.cls)" if sample.label is None else f"label {sample.label}"
        raise UserError(
            f"sample '{sample.key}' of shard '{path}' has {what}, but the manifest has {classes} classes "
            f"(0 to {classes - 1}); {REMEDY}"
        )
    return sample.label


def _compare(path: Path, index: ShardIndex, entry: ShardEntry) -> None:
    if (index.samples, index.tar_bytes) != (entry.samples, entry.bytes):
        raise UserError(
            f"'{path}' has {index.samples} samples in a shard of {index.tar_bytes} bytes, but the manifest says "
            f"{entry.samples} in {entry.bytes}; {REMEDY}"
        )
    ends = index.records["offset"] + index.records["size"]  # a sum beyond 64 bits starts again at 0
    if (wrong := np.flatnonzero((ends > index.tar_bytes) | (ends < index.records["offset"]))).size:
        row = int(wrong[0])
        offset, size = (int(index.records[field][row]) for field in ("offset", "size"))
        raise UserError(
            f"'{path}' has {size} bytes at {offset} for sample '{index.key(row)}', but the shard has {entry.bytes} "
            f"bytes; {REMEDY}"
        )
