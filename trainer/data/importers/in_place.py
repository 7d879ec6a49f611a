"""`--in-place`: WebDataset tars of others as a data set, indexed where they lie; no shard is written."""

import os
import zlib
from collections import Counter
from io import BufferedReader
from itertools import islice
from pathlib import Path
from shutil import rmtree
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from trainer.atomic import fresh_file
from trainer.data.importers import Content, ImportOptions, Progress, share_held_out
from trainer.data.importers.payload import store_of
from trainer.data.importers.planning import check_classes
from trainer.data.importers.ranges import REQUEST, Hashed
from trainer.data.importers.tars import archives_of, fields_of, identity_in, late, peek, unknown
from trainer.data.index import RECORD, make_index, write_index
from trainer.data.manifest import BadSample, Manifest
from trainer.data.reader import ahead
from trainer.data.remote import is_remote, shown
from trainer.data.split import ShardEntry, SplitEntry, write_split
from trainer.data.tables import TableFile
from trainer.data.tar import TarSample, samples_of
from trainer.errors import UserError

_SCANS = ".scans"  # in the folder of the unfinished data set
_IDENTITY = 1  # the place of its column in `_Scan.table`: an attribute may have the same name
_BATCH = 10_000  # samples


class _Work(NamedTuple):
    """What all archives are scanned with; `folder` takes what is found."""

    folder: Path
    content: Content
    shape: tuple[int, ...] | None
    attributes: list[str]
    options: ImportOptions


class _Scan(NamedTuple):
    """What was found in an archive; its samples are in files, `<number>.npy` and `<number>.arrow`. `late`: fields that
    are no attributes, and the name of the first sample that has each."""

    address: str
    number: int
    size: int
    sha256: str
    samples: int
    grey: bool
    bad: list[BadSample]
    late: dict[str, str]

    def records(self, folder: Path) -> NDArray[np.void]:
        """`RECORD`s whose labels are not known yet."""
        found: NDArray[np.void] = np.load(folder / f"{self.number:06d}.npy", allow_pickle=False)
        return found

    def table(self, folder: Path) -> pa.Table:
        """Key, identity and attributes of the samples, as text; memory-mapped."""
        with pa.memory_map(str(folder / f"{self.number:06d}.arrow")) as file:
            return pa.ipc.open_file(file).read_all()


def index_in_place(source: str, folder: Path, options: ImportOptions, progress: Progress) -> Manifest:
    """Read every archive once, several at a time, and write indexes and tables into `folder`.

    Identities, splits and labels are those of an import. The archives must stay as they are: their digests are noted.

    Args:
        source: as of `tars.list_tars`.

    Raises:
        UserError: as `tars.list_tars`; or too many samples cannot be read, or an address has a password or token.
    """
    addresses = [address if is_remote(address) else os.path.abspath(address) for address in archives_of(source)]
    for address in addresses:
        if shown(address) != address:
            raise UserError(
                f"the address '{shown(address)}' carries a password or token, which would stand in the manifest; give "
                "credentials as the storage's own tools take them (environment or files)"
            )
    work = _Work(folder / _SCANS, *peek(addresses[0], options.label_field), options)
    work.folder.mkdir()
    scans = _scan_all(addresses, work, progress)
    if not any(one.samples or one.bad for one in scans):
        raise UserError(f"SOURCE '{shown(source)}' holds no samples; give one that does")
    splits = _write_splits(folder, scans, work)
    rmtree(work.folder)
    image = work.content == "image"
    return Manifest(
        kind="tars",
        image_mode=("L" if all(one.grey for one in scans) else "RGB") if image else None,
        content=work.content,
        shape=list(work.shape or ()),
        splits=splits,
        bad=[*(bad for one in scans for bad in one.bad), *_late(scans)],
        provenance={
            "source": os.path.basename(shown(source).rstrip("/")),
            "held_out": f"{options.holdout_share:g} of the identities",
            "seed": str(options.seed),
            "shards": "left where they lay",
        },
    )


def _scan_all(addresses: list[str], work: _Work, progress: Progress) -> list[_Scan]:
    # Threads: decoding, checksums and waiting for a network free the interpreter's lock.
    jobs = work.options.jobs or len(os.sched_getaffinity(0))
    scans: list[_Scan] = []
    for one in ahead(lambda item: _scan(*item, work), enumerate(addresses), threads=jobs, most=2 * jobs):
        scans.append(one)
        progress("index", len(scans), len(addresses))
    _check_bad(scans, work.options.max_bad)
    return scans


def _late(scans: list[_Scan]) -> list[BadSample]:
    """Each field that came too late to be an attribute, once."""
    first = {field: name for one in reversed(scans) for field, name in one.late.items()}
    return [BadSample(**late(field, name)._asdict()) for field, name in first.items()]


def _check_bad(scans: list[_Scan], most: float) -> None:
    bad = [one.reason for found in scans for one in found.bad]
    total = sum(found.samples for found in scans) + len(bad)
    if len(bad) > most * total:
        raise UserError(
            f"{len(bad)} of {total} samples cannot be read, over the --max-bad {most:g} that is allowed "
            f"({'; '.join(bad[:3])}); leave their archives out, or raise --max-bad"
        )


def _write_splits(folder: Path, scans: list[_Scan], work: _Work) -> dict[str, SplitEntry]:
    options = work.options
    counts: Counter[str] = Counter()
    for one in scans:
        found = pc.value_counts(one.table(work.folder).column(_IDENTITY))
        counts.update(dict(zip(found.field("values").to_pylist(), found.field("counts").to_pylist(), strict=True)))
    kept = sorted(name for name, count in counts.items() if count >= options.min_samples)
    held_out = set(share_held_out(options.holdout_share, options.seed)(kept))
    splits: dict[str, SplitEntry] = {}
    for split in ("train", "val"):
        names = [name for number, name in enumerate(kept) if (number in held_out) == (split == "val")]
        if names:
            check_classes(len(names), split, options.min_samples)
            splits[split] = _write_split(folder, split, names, scans, work)
    if not splits:
        check_classes(0, None, options.min_samples)
    return splits


def _write_split(folder: Path, split: str, names: list[str], scans: list[_Scan], work: _Work) -> SplitEntry:
    """Indexes of the archives that hold samples of these identities, and the split's tables."""
    classes = pa.array(names)
    counts = np.zeros(len(names), np.int64)
    shards: list[ShardEntry] = []
    path = folder / f"{split}.attributes.arrow"
    schema = pa.schema([("key", pa.string()), *((name, pa.string()) for name in work.attributes)])
    with fresh_file(path) as file, pa.ipc.new_file(file, schema) as writer:
        for one in scans:
            records, table = _members(one, work.folder, classes)
            if len(records):
                index = make_index(records, table["key"].to_pylist(), one.size)
                entry = ShardEntry(
                    name=f"{split}-{len(shards):06d}.tar",
                    url=one.address,
                    samples=len(records),
                    bytes=one.size,
                    sha256=one.sha256,
                )
                digest = write_index(folder / entry.index_file, index)
                shards.append(entry.model_copy(update={"index_sha256": digest}))
                counts += np.bincount(index.labels, minlength=len(names))
                writer.write_table(table.remove_column(_IDENTITY))
    found = write_split(folder, split, names, counts, shards)
    if work.attributes:
        return found.model_copy(update={"attributes": TableFile.of(path)})
    path.unlink()
    return found


def _members(one: _Scan, folder: Path, classes: pa.Array) -> tuple[NDArray[np.void], pa.Table]:
    """The samples of an archive whose identities are among the classes, labelled."""
    table = one.table(folder)
    labels = pc.fill_null(pc.index_in(table.column(_IDENTITY), classes), -1).to_numpy()
    rows = np.flatnonzero(labels >= 0)
    records = one.records(folder)[rows]
    records["label"] = labels[rows]
    return records, table.take(pa.array(rows))


def _scan(number: int, address: str, work: _Work) -> _Scan:
    """Read an archive once.

    Raises:
        UserError: it is missing, cut off or damaged, or a sample has no label; samples that cannot be read are noted.
    """
    raw = Hashed(address)
    reading = _Reading(work, shown(address))
    path = work.folder / f"{number:06d}"
    schema = pa.schema([(name, pa.string()) for name in ("key", "identity", *work.attributes)])
    records = [np.empty(0, RECORD)]
    with BufferedReader(raw, REQUEST) as file, pa.ipc.new_file(f"{path}.arrow", schema) as writer:
        found = filter(None, map(reading.read, samples_of(file, reading.archive)))
        while batch := list(islice(found, _BATCH)):
            rows, texts = zip(*batch, strict=True)
            records.append(np.array(list(rows), RECORD))
            columns = [pa.array(column, pa.string()) for column in zip(*texts, strict=True)]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
        digest = raw.finish()
    whole = np.concatenate(records)
    np.save(f"{path}.npy", whole, allow_pickle=False)
    return _Scan(address, number, raw.size, digest, len(whole), reading.grey, reading.bad, reading.late)


class _Reading:
    """Reads the samples of an archive, and notes what cannot be used."""

    def __init__(self, work: _Work, archive: str) -> None:
        self.archive = archive
        self.grey = True
        self.bad: list[BadSample] = []
        self.late: dict[str, str] = {}
        self._known = set(work.attributes)
        self._work = work
        self._store = store_of(work.content, work.shape, work.options)

    def read(self, sample: TarSample) -> tuple[tuple[int, ...], list[str | None]] | None:
        """A `RECORD`, and what is written in words; None: the sample is left out."""
        field = self._work.options.label_field
        identity = identity_in(sample, field, self.archive)
        name = f"{os.path.basename(self.archive)}/{sample.key}"
        try:
            self.grey &= self._store(sample.payload, sample.key).grey
        except UserError as error:
            self.bad.append(BadSample(name=name, reason=str(error)))
            return None
        fields = fields_of(sample, field) if sample.text else {}
        self.late |= dict.fromkeys(unknown(fields, self._known), name)
        record = sample.offset, sample.size, 0, zlib.crc32(sample.payload), 0
        return record, [sample.key, identity, *map(fields.get, self._work.attributes)]
