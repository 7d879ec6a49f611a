"""A data set made of other sets' shards: new indexes and tables in a folder of its own, and no shard written."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trainer.atomic import Kind, fresh_file, fresh_folder
from trainer.data.index import ShardIndex, make_index, open_index, write_index
from trainer.data.manifest import MANIFEST_FILE, Manifest
from trainer.data.remote import is_remote, join
from trainer.data.split import ShardEntry, Split, SplitEntry
from trainer.data.store import File
from trainer.data.tables import Classes, TableFile, write_by_class, write_classes
from trainer.errors import UserError

_DATA_SET = Kind("a data set", MANIFEST_FILE)
_OWN_COLUMNS = ("name", "samples", "end", "by_size")  # of a classes table; the others are attributes


@dataclass(frozen=True, slots=True)
class Piece:
    """Samples of a split that go into a new one.

    Attributes:
        split: where they are now.
        kept: which positions are taken; None: all.
        relabel: the row of the new split's identities for each label.
    """

    split: Split
    kept: NDArray[np.bool_] | None
    relabel: NDArray[np.int64]

    @classmethod
    def whole(cls, split: Split) -> "Piece":
        """The split as it is."""
        return cls(split, None, np.arange(len(split.classes)))

    def shards(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Each shard that has samples to be taken, and their rows in its index."""
        for shard, end in enumerate(self.split.ends.tolist()):
            samples = self.split.shards[shard].samples
            rows = np.arange(samples) if self.kept is None else np.flatnonzero(self.kept[end - samples : end])
            if len(rows):
                yield shard, rows

    def counts(self, identities: int) -> NDArray[np.int64]:
        """How many samples of each new identity it brings.

        Raises:
            UserError: an index has a label that the split does not have.
        """
        counts = np.zeros(identities, np.int64)
        for shard, rows in self.shards():
            labels = self.split.index(shard).labels[rows]
            if (largest := int(labels.max())) >= len(self.relabel):
                raise UserError(
                    f"the index of shard '{self.split.shards[shard].name}' has label {largest}, but the split "
                    f"'{self.split.name}' has {len(self.relabel)} identities; import the data again"
                )
            np.add.at(counts, self.relabel[labels], 1)
        return counts


class View:
    """A new data set, being written into `folder`, that is to lie at `out`."""

    def __init__(self, folder: Path, out: Path) -> None:
        # As the system comes to it: a way up and down again from there would not lead back through a link.
        self.folder, self._out = folder, Path(os.path.realpath(out.parent), out.name)
        self.splits: dict[str, SplitEntry] = {}

    def add(self, name: str, pieces: Sequence[Piece], identities: pa.Table) -> None:
        """Write a split. Identities of which no sample is taken fall away, the others keep their order.

        Args:
            name: of the split.
            pieces: its samples, in this order.
            identities: `name` and attributes of those that the pieces' `relabel` points to.

        Raises:
            UserError: fewer than two identities are left, or attributes of samples have no common type.
        """
        counts = np.sum([piece.counts(len(identities)) for piece in pieces], axis=0)
        used = np.flatnonzero(counts)
        if len(used) < 2:
            raise UserError(
                f"the split '{name}' would have {len(used)} identities, and needs 2 or more; take more samples into it"
            )
        labels = np.cumsum(counts > 0) - 1
        shards: list[ShardEntry] = []
        for piece in pieces:
            for shard, rows in piece.shards():
                shards.append(self._shard(f"{name}-{len(shards):06d}", piece, shard, rows, labels))
        kept = identities.take(pa.array(used))
        attributes = {column: kept[column] for column in kept.column_names if column != "name"}
        names = kept["name"].combine_chunks()
        file = write_classes(self.folder / f"{name}.classes.arrow", names, counts[used], attributes)
        positions = (open_index(self.folder / entry.index_file).labels for entry in shards)
        classes = Classes.open(self.folder / file.file)
        self.splits[name] = SplitEntry(
            samples=int(counts.sum()),
            identities=len(used),
            classes=file,
            by_class=write_by_class(self.folder / f"{name}.by_class.npy", positions, classes),
            attributes=self._attributes(name, pieces),
            shards=shards,
        )

    def carry(self, manifest: Manifest, names: Sequence[str]) -> None:
        """Write some splits as they are."""
        for name in names:
            split = manifest.split(name)
            self.add(name, [Piece.whole(split)], identities_of(split))

    def _shard(
        self, name: str, piece: Piece, shard: int, rows: NDArray[np.int64], labels: NDArray[np.int64]
    ) -> ShardEntry:
        old, index = piece.split.shards[shard], piece.split.index(shard)
        records = index.records[rows].copy()
        records["label"] = labels[piece.relabel[records["label"]]]
        entry = ShardEntry(
            name=f"{name}.tar",
            url=_url(piece.split, old, self._out),
            samples=len(rows),
            bytes=old.bytes,
            sha256=old.sha256,
        )
        digest = write_index(self.folder / entry.index_file, make_index(records, _keys(index, rows), index.tar_bytes))
        return entry.model_copy(update={"index_sha256": digest})

    def _attributes(self, name: str, pieces: Sequence[Piece]) -> TableFile | None:
        """The pieces' attributes of samples, one under the other; what a piece does not have is null there."""
        tables = [attributes_of(piece.split) for piece in pieces]
        if all(table is None for table in tables):
            return None
        rows = []
        for piece, table in zip(pieces, tables, strict=True):
            taken = piece.split.samples if piece.kept is None else int(piece.kept.sum())
            if table is None:
                table = pa.table({"key": pa.nulls(taken, pa.string())})
            elif piece.kept is not None:
                table = table.filter(pa.array(piece.kept))
            rows.append(table)
        try:
            whole = pa.concat_tables(rows, promote_options="default")
        except pa.ArrowException as error:
            raise UserError(f"attributes of samples have different types ({error}); rename or convert one") from error
        path = self.folder / f"{name}.attributes.arrow"
        with fresh_file(path) as file, pa.ipc.new_file(file, whole.schema) as writer:
            writer.write_table(whole.combine_chunks(), max_chunksize=max(1, len(whole)))
        return TableFile.of(path)


@contextmanager
def fresh_view(
    out: Path,
    overwrite: bool,
    like: Manifest,
    provenance: Mapping[str, str],
    sources: Iterable[Manifest] | None = None,
    needed: Iterable[Path] = (),
) -> Iterator[View]:
    """A View to add splits to; the data set appears at `out`, whole, when the block ends without an exception.

    Args:
        like: says what the samples are; its provenance is kept.
        provenance: what is added to it.
        sources: the data sets that the splits come from; None: `like` alone.
        needed: other files that must stay.

    Raises:
        UserError: `out` exists, or `overwrite` would remove files of a source, or needed ones.
    """
    keep(out, needed)
    keep(out, (file for manifest in ([like] if sources is None else sources) for file in local_files(manifest)))
    with fresh_folder(out, _DATA_SET, overwrite) as folder:
        view = View(folder, out)
        yield view
        told = {**like.provenance, **provenance}
        like.model_copy(update={"splits": view.splits, "provenance": told}).write(folder)


def keep(out: Path, files: Iterable[Path]) -> None:
    """Refuse to replace a folder, however it is named, in which files lie that are still needed.

    Raises:
        UserError: one of the files is in `out`, or is `out` itself.
    """
    if not os.path.exists(out):
        return
    for place in dict.fromkeys(place for file in files for place in _way(file)):
        if os.path.exists(place) and os.path.samefile(place, out):
            raise UserError(
                f"'{out}' cannot be replaced: files that the new data set is made of lie in it; choose another --out"
            )


def local_files(manifest: Manifest) -> Iterator[Path]:
    """The manifest, beside which are the tables and indexes, and the shards, as far as they lie on this machine."""
    for name in manifest.splits:
        split = manifest.split(name)
        if split.store.is_local(File(MANIFEST_FILE)):
            yield split.store.path(MANIFEST_FILE)
        yield from (split.path(shard) for shard, entry in enumerate(split.shards) if split.store.is_local(entry.file))


def _way(file: Path) -> Iterator[Path]:
    """A file and the folders above it, by the names that lead to it and as it lies once links are followed."""
    for path in (Path(os.path.abspath(file)), Path(os.path.realpath(file))):
        yield path
        yield from path.parents


def identities_of(split: Split) -> pa.Table:
    """Names and attributes of a split's identities, in the order of their labels."""
    file = split.entry.classes
    if file is None:
        return pa.table({"name": pa.array(split.classes.names(), pa.large_string())})
    table = _read(split.store.path(file.file, file.bytes, file.sha256))
    return table.select([name for name in table.column_names if name == "name" or name not in _OWN_COLUMNS])


def attributes_of(split: Split) -> pa.Table | None:
    """Attributes of a split's samples, in the order of their positions; None: it has none."""
    file = split.entry.attributes
    if file is None:
        return None
    table = _read(split.store.path(file.file, file.bytes, file.sha256))
    if len(table) != split.samples:
        raise UserError(f"'{file.file}' has {len(table)} rows, but the split {split.samples} samples; fetch it anew")
    return table


def labels_of(split: Split) -> NDArray[np.int64]:
    """The label of each sample by position: 8 bytes a sample.

    Raises:
        UserError: an index has a label that the split does not have.
    """
    labels = np.concatenate(list(split.labels())).astype(np.int64)
    if (largest := int(labels.max())) >= split.identities:
        raise UserError(
            f"the split '{split.name}' has a sample with label {largest}, but {split.identities} identities; run "
            "'hypersphere data verify', and import the data again"
        )
    return labels


def key_at(split: Split, position: int) -> tuple[str, str]:
    """Name of the shard and key of a sample."""
    shard = int(np.searchsorted(split.ends, position, side="right"))
    index = split.index(shard)
    return split.shards[shard].name, index.key(position - (int(split.ends[shard]) - index.samples))


def _read(path: Path) -> pa.Table:
    try:
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_file(file).read_all()
        table.validate(full=True)  # Arrow believes files that their offsets lie inside of them
        return table
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"'{path}' is not a table of attributes: {error}; fetch this file anew") from error


def _keys(index: ShardIndex, rows: NDArray[np.int64]) -> Sequence[str] | int:
    """The rows' keys; where they are numbers that count on, the first one alone."""
    if not index.keys and rows[-1] - rows[0] == len(rows) - 1:
        return index.first + int(rows[0])
    return [index.key(row) for row in rows.tolist()]


def _url(split: Split, entry: ShardEntry, out: Path) -> str:
    """Where a shard lies: an address as it is, a path as seen from `out`, so that sets may be moved together."""
    place, address = (entry.url or entry.name).removeprefix("file://"), split.store.address
    if split.store.is_local(entry.file):
        return os.path.relpath(os.path.realpath(os.path.join(address, place)), out)
    return place if is_remote(place) else join(address, place)
