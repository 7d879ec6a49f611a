"""After all shards are written: what has to be left out of them, and then the tables and the manifest."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import PIL
import pyarrow as pa
from numpy.typing import NDArray

from trainer.atomic import fresh_file, write_file
from trainer.data.importers import ImportOptions
from trainer.data.importers.plan import Plan
from trainer.data.importers.planning import check_classes
from trainer.data.importers.work import WORK_FOLDER, Result, Task, put_in_place, read_result, relabel_file
from trainer.data.index import ShardIndex, open_index
from trainer.data.manifest import BadSample, Manifest
from trainer.data.split import ShardEntry, SplitEntry, write_split
from trainer.data.tables import TableFile
from trainer.strict import Strict

DUPLICATES_FILE = "duplicates.jsonl"
_DECISION = "decision.json"
_AT_A_TIME = 2**22  # samples that are compared at a time: 100 MB


class Decision(Strict):
    """What is left out of the written shards.

    Attributes:
        tasks: shards that are written anew.
        duplicates: samples that are an earlier one of their identity.
        shared: images that several identities have.
        left_out: identities that have too few samples now.
    """

    tasks: list[Task]
    duplicates: int
    shared: int
    left_out: int


def decided(folder: Path) -> bool:
    """Whether `decide` was done, after which the shards stay as they are but for its tasks."""
    return (folder / WORK_FOLDER / _DECISION).exists()


class _Sample(NamedTuple):
    """Where a sample is: its shard (number in the plan), its row there, its label, and its number in the split."""

    shard: int
    row: int
    label: int
    number: int


def decide(folder: Path, plan: Plan, min_samples: int) -> Decision:
    """Find duplicates and identities with too few samples; also, writes the new labels of each split and the list of
    images that several identities have. A decision that was written before is taken.

    Raises:
        UserError: a split has fewer than two identities left.
    """
    file = folder / WORK_FOLDER / _DECISION
    if decided(folder):
        return Decision.model_validate_json(file.read_bytes())
    written = _Written(folder, plan)
    drops: dict[int, list[int]] = {}
    shared = 0
    with fresh_file(folder / DUPLICATES_FILE) as listed:
        for alike in written.alike():
            first: dict[tuple[str, int], _Sample] = {}
            for sample in alike:
                owner = plan.shards[sample.shard].split, sample.label
                if owner not in first:
                    first[owner] = sample
                elif plan.file.drop_duplicates:
                    drops.setdefault(sample.shard, []).append(sample.number)
            if len(first) > 1:
                listed.write(_line(plan, list(first.values())))
                shared += 1
    if not shared:
        (folder / DUPLICATES_FILE).unlink()
    left_out, changed = _relabel(folder, plan, written, drops, min_samples)
    redo = sorted(changed | drops.keys())
    decision = Decision(
        tasks=[Task(what="redo", shard=plan.shards[i], drop=sorted(drops.get(i, []))) for i in redo],
        duplicates=sum(map(len, drops.values())),
        shared=shared,
        left_out=left_out,
    )
    write_file(file, decision.model_dump_json())
    return decision


class _Written:
    """The shards as they were written first."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self._folder, self._plan = folder, plan
        self.indexes: dict[int, ShardIndex] = {}
        for i, shard in enumerate(plan.shards):
            entry = read_result(folder, Task(what="write", shard=shard)).entry
            if entry is not None:
                self.indexes[i] = open_index(folder / entry.index_file)

    def alike(self) -> Iterator[list[_Sample]]:
        """The samples of each payload that there is more than once, in the order of the shards.

        Size and CRC-32 are in the indexes already, and tell nearly all that differ; SHA-256 tells the rest. Memory is
        bounded: only samples whose CRC falls into one part of the range are compared at a time.
        """
        total = sum(index.samples for index in self.indexes.values())
        parts = 1 + total // _AT_A_TIME
        for part in range(parts):
            keys, places = self._part(part, parts)
            order = np.argsort(keys, kind="stable")
            same = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
            if not len(same):
                continue
            for run in np.split(same, np.flatnonzero(np.diff(same) > 1) + 1):
                found: dict[bytes, list[_Sample]] = {}
                for shard, row in places[order[run[0] : run[-1] + 2]].tolist():
                    found.setdefault(self._digest(shard, row), []).append(self._sample(shard, row))
                yield from (samples for samples in found.values() if len(samples) > 1)

    def _part(self, part: int, parts: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        keys: list[NDArray[np.uint64]] = [np.empty(0, np.uint64)]
        places: list[NDArray[np.int64]] = [np.empty((0, 2), np.int64)]
        for shard, index in self.indexes.items():
            crcs = index.records["crc"]
            rows = np.flatnonzero(crcs % parts == part)
            keys.append(index.records["size"][rows].astype(np.uint64) << np.uint64(32) | crcs[rows])
            places.append(np.stack([np.full(len(rows), shard), rows], axis=1))
        return np.concatenate(keys), np.concatenate(places)

    def _digest(self, shard: int, row: int) -> bytes:
        record = self.indexes[shard].records[row]
        with (self._folder / self._plan.shards[shard].name).open("rb") as file:
            payload = os.pread(file.fileno(), int(record["size"]), int(record["offset"]))
        return hashlib.sha256(payload).digest()

    def _sample(self, shard: int, row: int) -> _Sample:
        index = self.indexes[shard]
        return _Sample(shard, row, int(index.labels[row]), int(index.key(row)))


def _line(plan: Plan, samples: list[_Sample]) -> bytes:
    images = []
    for sample in samples:
        row = int(plan.rows(plan.shards[sample.shard].split)[sample.number])
        images.append({"identity": plan.identities[int(plan.codes[row])], "name": plan.entry(row)[0]})
    return json.dumps({"images": images}, ensure_ascii=False).encode() + b"\n"


def _relabel(
    folder: Path, plan: Plan, written: _Written, drops: dict[int, list[int]], min_samples: int
) -> tuple[int, set[int]]:
    """Write the new label of each old one (-1: left out); how many are left out, and the shards that this changes."""
    left_out, left, changed = 0, 0, set[int]()
    for split in plan.splits():
        shards = {i: index for i, index in written.indexes.items() if plan.shards[i].split == split}
        counts = np.zeros(len(plan.classes(split)), np.int64)
        for i, index in shards.items():
            counts += np.bincount(index.labels, minlength=len(counts))
            for number in drops.get(i, []):
                row = int(plan.rows(split)[number])
                counts[plan.labels[plan.codes[row]]] -= 1
        kept = counts >= min_samples
        left_out += int((~kept).sum())
        left += int(kept.sum())
        if kept.any():
            check_classes(int(kept.sum()), split, min_samples)
        relabel = np.where(kept, np.cumsum(kept) - 1, -1).astype(np.int32)
        with fresh_file(relabel_file(folder, split)) as file:
            np.save(file, relabel, allow_pickle=False)
        if left_out:
            changed |= {i for i, index in shards.items() if (relabel[index.labels] != index.labels).any()}
    check_classes(left, None, min_samples)
    return left_out, changed


def finish(folder: Path, kind: str, plan: Plan, decision: Decision, options: ImportOptions) -> None:
    """Write tables and manifest. May be done again after a kill."""
    redone = {task.shard.name: task for task in decision.tasks}
    results = []
    for shard in plan.shards:
        results.append(read_result(folder, redone.get(shard.name) or Task(what="write", shard=shard)))
        if shard.name in redone:
            put_in_place(folder, redone[shard.name], results[-1])  # where a kill came between
    splits = {}
    for name in plan.splits():
        entries = [
            r.entry for s, r in zip(plan.shards, results, strict=True) if s.split == name and r.entry is not None
        ]
        if entries:
            splits[name] = _write_split(folder, plan, name, entries)
    image = plan.file.content == "image"
    Manifest(
        kind=kind,
        image_mode=("L" if all(result.grey for result in results) else "RGB") if image else None,
        content=plan.file.content,
        shape=list(plan.file.shape or ()),
        splits=splits,
        bad=_left_out(plan, results),
        provenance=_provenance(plan, decision, options),
    ).write(folder)


def _write_split(folder: Path, plan: Plan, name: str, entries: list[ShardEntry]) -> SplitEntry:
    relabel = np.load(relabel_file(folder, name), allow_pickle=False)
    names = plan.identities.array.take(pa.array(plan.classes(name)[relabel >= 0]))
    counts = np.zeros(len(names), np.int64)
    for entry in entries:
        counts += np.bincount(open_index(folder / entry.index_file).labels, minlength=len(counts))
    split = write_split(folder, name, names, counts, entries)
    if not plan.file.attributes:
        return split
    path = folder / f"{name}.attributes.arrow"
    with fresh_file(path) as file:
        _write_attributes(file, folder, plan, name, entries)
    return split.model_copy(update={"attributes": TableFile.of(path)})


def _write_attributes(file: BinaryIO, folder: Path, plan: Plan, split: str, entries: list[ShardEntry]) -> None:
    """A row a sample, in order of position: its key, and its attributes."""
    kinds = {name: pa.type_for_alias(alias) for name, alias in plan.file.attributes.items()}
    schema = pa.schema([("key", pa.string()), *kinds.items()])
    rows = plan.rows(split)
    with pa.ipc.new_file(file, schema) as writer:
        for entry in entries:
            index = open_index(folder / entry.index_file)
            keys = [index.key(row) for row in range(index.samples)]
            values = [plan.entry(int(rows[int(key)]))[2] for key in keys]
            columns = [pa.array([value[name] for value in values], kind) for name, kind in kinds.items()]
            writer.write_batch(pa.RecordBatch.from_arrays([pa.array(keys), *columns], schema=schema))


def _left_out(plan: Plan, results: list[Result]) -> list[BadSample]:
    """Unreadable samples in the order of the listing; then what the listing passed over."""
    bad = sorted(bad for result in results for bad in result.bad)
    named = [(one.name, one.reason) for one in bad] + [(one.name, one.reason) for one in plan.file.passed_over]
    return [BadSample(name=name, reason=reason) for name, reason in named]


def _provenance(plan: Plan, decision: Decision, options: ImportOptions) -> dict[str, str]:
    small = plan.file.small + decision.left_out
    readable = "readable images" if plan.file.content == "image" else "readable samples"
    found = {
        **plan.file.provenance,
        "seed": str(options.seed),
        "pillow": PIL.__version__,
        "duplicates_left_out": str(decision.duplicates),
        "identities_left_out": f"{small} with fewer than {options.min_samples} {readable}",
    }
    if decision.shared:
        found["images_of_several_identities"] = f"{decision.shared}, all in {DUPLICATES_FILE}"
    return found
