"""Makes the plan of an import out of a listing. Memory: some tens of bytes a sample, and about 50 an identity."""

import dataclasses
import hashlib
import json
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from trainer.atomic import write_file
from trainer.data.importers import Entry, HeldOut, ImportOptions, Listing, Progress, share_held_out
from trainer.data.importers.plan import (
    BATCH,
    COLUMNS,
    ENTRIES_FILE,
    IDENTITIES_FILE,
    PLAN_FILE,
    Names,
    PlanFile,
    PlannedShard,
    open_arrow,
)
from trainer.data.remote import shown
from trainer.data.split import SPLIT_NAME
from trainer.errors import UserError

if TYPE_CHECKING:
    from hashlib import _Hash

MAX_SHARD_BYTES = 2**30
_UNLIKE = ("max_bad", "overwrite", "jobs")  # options that do not decide about the bytes
_SHUFFLE = 0x5A0F
_TAR_BYTES = 2560  # of a sample, besides its payload: headers, label and description
_MAX_SPLITS = 100
_NO_SPLIT = -1


def make_plan(folder: Path, kind: str, listing: Listing, options: ImportOptions, show: Progress) -> None:
    """List the source, share its samples out to shards, and write the plan into an empty folder, `plan.json` last.

    Of each split the identities are numbered in the order of their names. The samples of "train" lie in an order
    shuffled by the seed, so that a shard is a mixture of identities; those of other splits as they are listed.

    Raises:
        UserError: there are no samples, an identity is in two splits, or a split has fewer than two identities.
    """
    digest = _digest(kind, listing, options, detector := _detector(listing, options))
    total = _write_entries(folder / ENTRIES_FILE, listing, digest, show)
    if listing.prepare is not None:
        listing.source = listing.prepare(folder)
    table = open_arrow(folder / ENTRIES_FILE).read_all()
    codes = _number(table["identity"], folder / IDENTITIES_FILE)
    identities = Names(open_arrow(folder / IDENTITIES_FILE).get_batch(0).column(0))
    provenance = listing.provenance | ({"detector": detector} if detector else {})
    if listing.held_out is None:
        which = " without a split" if table["split"].null_count < total else ""
        provenance = provenance | {"held_out": f"{options.holdout_share:g} of the identities{which}"}
    held_out = listing.held_out or share_held_out(options.holdout_share, options.seed)
    split_names, split_of = _splits(table["split"], codes, identities, held_out)
    kept = np.bincount(codes, minlength=len(identities)) >= options.min_samples
    labels = np.full(len(identities), -1, np.int32)
    shards: list[PlannedShard] = []
    for number, split in enumerate(split_names):
        members = kept & (split_of == number)
        classes, rows = np.flatnonzero(members), np.flatnonzero(members[codes])
        if len(classes):
            check_classes(len(classes), split, options.min_samples)
            labels[classes] = np.arange(len(classes))
            if split == "train":
                np.random.default_rng([options.seed, _SHUFFLE]).shuffle(rows)
            shards += _cut(split, table["size"].to_numpy(), rows, options.samples_per_shard)
            _save(folder, {f"classes-{split}": classes, f"rows-{split}": rows})
    if not shards:
        check_classes(0, None, options.min_samples)
    _save(folder, {"codes": codes, "labels": labels})
    names = ("source", "content", "shape", "attributes", "drop_duplicates", "threads", "passed_over")
    file = PlanFile(
        digest=digest.hexdigest(),
        total=total,
        small=int((~kept).sum()),
        shards=shards,
        provenance=provenance,
        **{name: getattr(listing, name) for name in names},
    )
    write_file(folder / PLAN_FILE, file.model_dump_json())


def check_classes(found: int, split: str | None, min_samples: int) -> None:
    """A split of one identity teaches and measures nothing.

    Raises:
        UserError: the split has fewer than two; None as `split`: no split has any.
    """
    if found < 2:
        what = "none at all" if split is None else f"{found} in the {split} split"
        raise UserError(
            f"the import needs at least 2 identities with {min_samples} or more readable samples in every split and "
            f"found {what}; give more identities, or hold out a different number"
        )


def _detector(listing: Listing, options: ImportOptions) -> str | None:
    """What the detector is told apart by, once it has been tried."""
    if options.detector is None:
        return None
    if listing.content != "image":
        raise UserError(f"--detector finds faces in images, and the source holds {listing.content}s; leave it out")
    from trainer.detection.detector import Detector

    return Detector.open(options.detector).detector_id


def _digest(kind: str, listing: Listing, options: ImportOptions, detector: str | None) -> "_Hash":
    chosen = {key: value for key, value in dataclasses.asdict(options).items() if key not in _UNLIKE}
    chosen["detector"] = detector  # what it does counts, not where it lies
    settings = [kind, listing.content, listing.shape, listing.drop_duplicates, PIL.__version__, chosen]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode())


def _write_entries(path: Path, listing: Listing, digest: "_Hash", show: Progress) -> int:
    """The listing as an Arrow file, batch by batch; all of it, with its stamps, goes into the digest."""
    types = (pa.string(), pa.string(), pa.binary(), pa.string(), pa.int32())
    further = [(f"attribute {key}", pa.type_for_alias(alias)) for key, alias in listing.attributes.items()]
    schema = pa.schema([*zip(COLUMNS, types, strict=True), *further])
    entries = iter(listing.entries)
    total = 0
    with path.open("wb") as file, pa.ipc.new_file(file, schema) as writer:
        while batch := list(islice(entries, BATCH)):
            columns = _columns(batch, list(listing.attributes), digest)
            arrays = [_typed(column, field, total) for column, field in zip(columns, schema, strict=True)]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
            total += len(batch)
            show("list", total, 0)
    if not total:
        raise UserError(f"SOURCE '{shown(listing.source)}' holds no samples; give one that does")
    return total


def _typed(column: Any, field: pa.Field, before: int) -> pa.Array:
    try:
        return pa.array(column, field.type)
    except (OverflowError, UnicodeError, pa.ArrowInvalid) as error:
        raise UserError(
            f"the {field.name} of one of the samples {before + 1} to {before + len(column)} is no {field.type} "
            f"({error}); write it as text, or leave the column out"
        ) from error


def _columns(batch: list[Entry], attributes: list[str], digest: "_Hash") -> list[Any]:
    identities, names, places, splits, values, sizes, stamps = zip(*batch, strict=True)
    coded = [place.encode("utf-8", "surrogateescape") for place in places]  # names of files may be any bytes
    further = [[(found or {}).get(key) for found in values] for key in attributes]
    columns = [identities, names, coded, splits, [min(size or 0, MAX_SHARD_BYTES) for size in sizes], *further]
    for column in (*columns, stamps):
        digest.update(repr(column).encode())
    return columns


def _number(column: pa.ChunkedArray, path: Path) -> NDArray[np.int32]:
    """The number of each entry's identity among the sorted identities, which are written as an Arrow file."""
    order = pc.sort_indices(column)  # a table of hashes would take four times the memory where each is another's
    names = column.cast(pa.large_string()).combine_chunks().take(order)
    first = np.ones(len(names), bool)
    first[1:] = pc.not_equal(names[1:], names[:-1]).to_numpy(zero_copy_only=False)
    codes = np.empty(len(names), np.int32)
    codes[order.to_numpy()] = np.cumsum(first, dtype=np.int32) - np.int32(1)
    table = pa.table({"name": names.filter(pa.array(first))})
    with path.open("wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=len(table))
    del order, names, table
    pa.default_memory_pool().release_unused()
    return codes


def _splits(
    column: pa.ChunkedArray, codes: NDArray[np.int32], identities: Names, held_out: HeldOut
) -> tuple[list[str], NDArray[np.int8]]:
    """The names of the splits, and the number of each identity's split among them."""
    others = {name for name in pc.unique(column).to_pylist() if name is not None} - {"train", "val"}
    names = ["train", "val", *sorted(others)]
    if wrong := [name for name in names if not SPLIT_NAME.fullmatch(name)]:
        raise UserError(f"the split {wrong[0]!r} cannot name a file; use letters, digits, '-' and '_', 32 at most")
    if len(names) > _MAX_SPLITS:
        raise UserError(f"the source names {len(names)} splits; at most {_MAX_SPLITS} are allowed: 'train' and 'val'")
    numbers = pc.fill_null(pc.index_in(column, pa.array(names)), _NO_SPLIT).to_numpy().astype(np.int8)
    split_of = np.empty(len(identities), np.int8)
    split_of[codes] = numbers
    if (unlike := np.flatnonzero(split_of[codes] != numbers)).size:
        row = int(unlike[0])
        both = sorted("none" if i == _NO_SPLIT else names[i] for i in (int(numbers[row]), int(split_of[codes[row]])))
        raise UserError(
            f"the identity '{identities[int(codes[row])]}' has samples in the splits {' and '.join(both)}; "
            "put all samples of an identity into one split"
        )
    free = np.flatnonzero(split_of == _NO_SPLIT)
    split_of[free] = names.index("train")
    chosen = list(held_out(Names(identities.array.take(pa.array(free)))))
    split_of[free[chosen]] = names.index("val")
    return names, split_of


def _cut(split: str, sizes: NDArray[np.int32], rows: NDArray[np.int64], samples_per_shard: int) -> list[PlannedShard]:
    """Shards of so many samples, or of fewer where these would have more than `MAX_SHARD_BYTES`."""
    shards: list[PlannedShard] = []
    first = 0
    while first < len(rows):
        ends = np.cumsum(sizes[rows[first : first + samples_per_shard]] + np.int64(_TAR_BYTES))
        samples = max(1, int(np.searchsorted(ends, MAX_SHARD_BYTES, side="right")))
        shards.append(PlannedShard(name=f"{split}-{len(shards):06d}.tar", split=split, first=first, samples=samples))
        first += samples
    return shards


def _save(folder: Path, arrays: dict[str, NDArray[Any]]) -> None:
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
