"""The plan of an import: which sample goes into which shard, under which label.

It lies on the disk, in a hidden folder inside the unfinished data set, and is memory-mapped: so the processes that
write shards need next to no memory for it, whatever the number of samples.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trainer.data.importers import Content, PassedOver
from trainer.strict import Strict

PLAN_FOLDER = ".plan"  # in the folder of the unfinished data set
PLAN_FILE, ENTRIES_FILE, IDENTITIES_FILE = "plan.json", "entries.arrow", "identities.arrow"
BATCH = 2**13  # entries that are in memory at a time
COLUMNS = ("identity", "name", "place", "split", "size")  # of the entries; after them come the attributes


class PlannedShard(Strict):
    """A shard to be written: samples `first` to `first + samples - 1` of its split."""

    name: str
    split: str
    first: int
    samples: int


class PlannedSample(NamedTuple):
    """A sample of a shard. `number` is its place in the split, and its key; `row` its place in the listing."""

    number: int
    row: int
    label: int
    identity: str
    name: str
    place: str
    attributes: dict[str, Any]


class PlanFile(Strict):
    """`plan.json`: what is small.

    Attributes:
        digest: of the whole listing, and of all options that decide about the result's bytes.
        total: entries of the listing.
        source, content, shape, attributes, drop_duplicates, threads, provenance, passed_over: as in `Listing`.
        small: identities with too few samples to be taken.
    """

    digest: str
    total: int
    source: str
    content: Content
    shape: tuple[int, ...] | None
    attributes: dict[str, str]
    drop_duplicates: bool
    threads: int
    provenance: dict[str, str]
    passed_over: list[PassedOver]
    small: int
    shards: list[PlannedShard]


class Names(Sequence[str]):
    """Names in an Arrow array, made into text one by one, as they are asked."""

    def __init__(self, array: pa.Array) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        found: str | list[str] = self.array[at].to_pylist() if isinstance(at, slice) else self.array[at].as_py()
        return found


class Plan:
    """A finished plan, as `planning.make_plan` wrote it into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = PlanFile.model_validate_json((folder / PLAN_FILE).read_bytes())
        self.shards = self.file.shards
        self._entries = open_arrow(folder / ENTRIES_FILE)
        self._batches: dict[int, list[pa.Array]] = {}

    @cached_property
    def identities(self) -> Names:
        """All identities of the source, sorted."""
        return Names(open_arrow(self.folder / IDENTITIES_FILE).get_batch(0).column(0))

    @cached_property
    def codes(self) -> NDArray[np.int32]:
        """By row of the listing: the number of its identity."""
        return self._array("codes")

    @cached_property
    def labels(self) -> NDArray[np.int32]:
        """By number of an identity: its label in its split; -1 where it has too few samples."""
        return self._array("labels")

    def classes(self, split: str) -> NDArray[np.int64]:
        """By label of a split: the number of its identity."""
        return self._array(f"classes-{split}")

    def rows(self, split: str) -> NDArray[np.int64]:
        """By number of a sample in its split: its row."""
        return self._array(f"rows-{split}")

    def splits(self) -> list[str]:
        return list(dict.fromkeys(shard.split for shard in self.shards))

    def samples(self, shard: PlannedShard) -> Iterator[PlannedSample]:
        """The samples of a shard, in its order."""
        rows = self.rows(shard.split)[shard.first : shard.first + shard.samples]
        codes = self.codes[rows]
        labels = self.labels[codes]
        for i, (row, code, label) in enumerate(zip(rows.tolist(), codes.tolist(), labels.tolist(), strict=True)):
            name, place, attributes = self.entry(row)
            yield PlannedSample(shard.first + i, row, label, self.identities[code], name, place, attributes)

    def entry(self, row: int) -> tuple[str, str, dict[str, Any]]:
        """Name, place and attributes of a row."""
        number, at = divmod(row, BATCH)
        if number not in self._batches:
            self._batches[number] = self._entries.get_batch(number).columns
        _, names, places, _, _, *attributes = self._batches[number]
        values = {key: column[at].as_py() for key, column in zip(self.file.attributes, attributes, strict=True)}
        return names[at].as_py(), places[at].as_py().decode("utf-8", "surrogateescape"), values

    def _array(self, name: str) -> NDArray[Any]:
        found: NDArray[Any] = np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        return found


def open_arrow(path: Path) -> pa.ipc.RecordBatchFileReader:
    """An Arrow file, memory-mapped."""
    return pa.ipc.open_file(pa.memory_map(str(path)))
