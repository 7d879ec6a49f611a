"""The end of an import: tables beside the shards, and the manifest."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL
import pyarrow as pa

from trainer.atomic import fresh_file
from trainer.data.importers import ImportOptions
from trainer.data.importers.decide import DUPLICATES_FILE, Decision
from trainer.data.importers.plan import Plan
from trainer.data.importers.work import Result, Task, put_in_place, read_result, relabel_file
from trainer.data.index import open_index
from trainer.data.manifest import BadSample, Manifest
from trainer.data.split import ShardEntry, SplitEntry, write_split
from trainer.data.tables import TableFile


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
