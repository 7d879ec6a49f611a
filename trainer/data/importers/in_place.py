"""`--in-place`: WebDataset tars of others as a data set, indexed where they lie; no shard is written."""

import os
from collections import Counter
from pathlib import Path
from shutil import rmtree

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from trainer.atomic import fresh_file
from trainer.data.importers import ImportOptions, Progress, share_held_out
from trainer.data.importers.planning import check_classes
from trainer.data.importers.scan import IDENTITY, Scan, Work, scan
from trainer.data.importers.tars import archives_of, late, peek
from trainer.data.index import make_index, write_index
from trainer.data.manifest import BadSample, Manifest
from trainer.data.reader import ahead
from trainer.data.remote import is_remote, shown
from trainer.data.split import ShardEntry, SplitEntry, write_split
from trainer.data.tables import TableFile
from trainer.errors import UserError

_SCANS = ".scans"  # in the folder of the unfinished data set


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
    work = Work(folder / _SCANS, *peek(addresses[0], options.label_field), options)
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


def _scan_all(addresses: list[str], work: Work, progress: Progress) -> list[Scan]:
    # Threads: decoding, checksums and waiting for a network free the interpreter's lock.
    jobs = work.options.jobs or len(os.sched_getaffinity(0))
    scans: list[Scan] = []
    for one in ahead(lambda item: scan(*item, work), enumerate(addresses), threads=jobs, most=2 * jobs):
        scans.append(one)
        progress("index", len(scans), len(addresses))
    _check_bad(scans, work.options.max_bad)
    return scans


def _late(scans: list[Scan]) -> list[BadSample]:
    """Each field that came too late to be an attribute, once."""
    first = {field: name for one in reversed(scans) for field, name in one.late.items()}
    return [BadSample(**late(field, name)._asdict()) for field, name in first.items()]


def _check_bad(scans: list[Scan], most: float) -> None:
    bad = [one.reason for found in scans for one in found.bad]
    total = sum(found.samples for found in scans) + len(bad)
    if len(bad) > most * total:
        raise UserError(
            f"{len(bad)} of {total} samples cannot be read, over the --max-bad {most:g} that is allowed "
            f"({'; '.join(bad[:3])}); leave their archives out, or raise --max-bad"
        )


def _write_splits(folder: Path, scans: list[Scan], work: Work) -> dict[str, SplitEntry]:
    options = work.options
    counts: Counter[str] = Counter()
    for one in scans:
        found = pc.value_counts(one.table(work.folder).column(IDENTITY))
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


def _write_split(folder: Path, split: str, names: list[str], scans: list[Scan], work: Work) -> SplitEntry:
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
                writer.write_table(table.remove_column(IDENTITY))
    found = write_split(folder, split, names, counts, shards)
    if work.attributes:
        return found.model_copy(update={"attributes": TableFile.of(path)})
    path.unlink()
    return found


def _members(one: Scan, folder: Path, classes: pa.Array) -> tuple[NDArray[np.void], pa.Table]:
    """The samples of an archive whose identities are among the classes, labelled."""
    table = one.table(folder)
    labels = pc.fill_null(pc.index_in(table.column(IDENTITY), classes), -1).to_numpy()
    rows = np.flatnonzero(labels >= 0)
    records = one.records(folder)[rows]
    records["label"] = labels[rows]
    return records, table.take(pa.array(rows))
