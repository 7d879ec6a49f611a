"""What is done for one shard, in whichever process: write it from the source, or write it anew with other labels."""

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field

from trainer.atomic import write_file
from trainer.data.importers import ImportOptions, Read, importer_of
from trainer.data.importers.payload import Stored, store_of
from trainer.data.importers.plan import PLAN_FOLDER, Plan, PlannedSample, PlannedShard
from trainer.data.importers.shards import Sample, read_shard, write_shard
from trainer.data.split import ShardEntry
from trainer.errors import UserError
from trainer.strict import Strict

WORK_FOLDER = ".work"  # in the folder of the unfinished data set
RESULTS, REDONE = "results", "redone"
_TELL_EVERY = 64  # samples


class Bad(NamedTuple):
    """A sample that could not be used; `row` is its place in the listing."""

    row: int
    name: str
    reason: str


Tell = Callable[[int, list[Bad]], None]  # samples done since the last call, and the bad ones among them


class Result(Strict):
    """What became of a shard; None as `entry`: it has no samples. Written when all else of it is on the disk."""

    entry: ShardEntry | None
    grey: bool
    bad: list[Bad]


class Task(Strict):
    """`write`: a shard of the plan. `redo`: write it anew, without the samples `drop` (their numbers) and with the
    labels of `relabel_file`."""

    what: Literal["write", "redo"]
    shard: PlannedShard
    drop: list[int] = Field(default_factory=list)


class Worker:
    """Does tasks, one after the other.

    Args:
        folder: of the unfinished data set; the plan is inside.
        threads: that read and check payloads.
    """

    def __init__(self, folder: Path, kind: str, options: ImportOptions, threads: int) -> None:
        self._folder = folder
        self._plan = Plan(folder / PLAN_FOLDER)
        self._kind, self._options = kind, options
        self._threads = max(threads, self._plan.file.threads)
        self._store = store_of(self._plan.file.content, self._plan.file.shape, options)

    @cached_property
    def _read(self) -> Read:
        return importer_of(self._kind).read(self._plan.file.source, self._options)

    def do(self, task: Task, tell: Tell) -> None:
        """Do a task.

        Raises:
            UserError: what `tell` raises, or the source.
            OSError: a file of the result cannot be written.
        """
        if task.what == "write":
            self._write(task, tell)
        else:
            self._redo(task, tell)

    def _write(self, task: Task, tell: Tell) -> None:
        shard = task.shard
        bad: list[Bad] = []
        grey = True

        def good() -> Iterator[Sample]:
            nonlocal grey
            told = 0
            for done, (sample, stored) in enumerate(self._stored(self._plan.samples(shard)), 1):
                if isinstance(stored, str):
                    bad.append(Bad(sample.row, sample.name, stored))
                else:
                    grey &= stored.grey
                    about = sample.number, sample.label, sample.identity, sample.name, sample.attributes
                    yield Sample(*about, stored.suffix, stored.data)
                if done % _TELL_EVERY == 0 or done == shard.samples:
                    tell(done % _TELL_EVERY or _TELL_EVERY, bad[told:])
                    told = len(bad)

        entry = write_shard(self._folder, shard.name, good())
        self._finish(task, Result(entry=entry, grey=grey, bad=bad))

    def _stored(self, samples: Iterable[PlannedSample]) -> Iterator[tuple[PlannedSample, Stored | str]]:
        read = self._read

        def check(sample: PlannedSample) -> tuple[PlannedSample, Stored | str]:
            """What is stored of a sample, or why it cannot be used."""
            try:
                return sample, self._store(read(sample.place), sample.name)
            except UserError as error:
                return sample, str(error)

        if self._threads == 1:
            return map(check, samples)
        from trainer.data.reader import ahead  # brings much that is not needed where there are no threads

        return ahead(check, samples, threads=self._threads, most=8 * self._threads)

    def _redo(self, task: Task, tell: Tell) -> None:
        shard = task.shard
        before = read_result(self._folder, Task(what="write", shard=shard))
        entry = before.entry
        assert entry is not None
        relabel = np.load(relabel_file(self._folder, shard.split), allow_pickle=False)
        dropped, rows = set(task.drop), self._plan.rows(shard.split)

        def kept() -> Iterator[Sample]:
            for number, label, suffix, payload in read_shard(self._folder, entry):
                if relabel[label] >= 0 and number not in dropped:
                    row = int(rows[number])
                    name, _, attributes = self._plan.entry(row)
                    identity = self._plan.identities[int(self._plan.codes[row])]
                    yield Sample(number, int(relabel[label]), identity, name, attributes, suffix, payload)

        redone = write_shard(self._folder / WORK_FOLDER / REDONE, shard.name, kept())
        result = before.model_copy(update={"entry": redone})
        self._finish(task, result)
        put_in_place(self._folder, task, result)  # at once, so that the disk need not hold the whole set twice
        tell(entry.samples, [])

    def _finish(self, task: Task, result: Result) -> None:
        write_file(result_file(self._folder, task), result.model_dump_json())


def result_file(folder: Path, task: Task) -> Path:
    return folder / WORK_FOLDER / (RESULTS if task.what == "write" else REDONE) / f"{task.shard.name}.json"


def read_result(folder: Path, task: Task) -> Result:
    return Result.model_validate_json(result_file(folder, task).read_bytes())


def put_in_place(folder: Path, task: Task, result: Result) -> None:
    """Replace a shard and its index by what was written anew; may be done again after a kill."""
    name = task.shard.name
    for file in (name, name.removesuffix(".tar") + ".idx"):
        new = folder / WORK_FOLDER / REDONE / file
        if result.entry is None:
            (folder / file).unlink(missing_ok=True)
        elif new.exists():
            new.replace(folder / file)


def relabel_file(folder: Path, split: str) -> Path:
    """By label of the plan: the label that is left, or -1."""
    return folder / WORK_FOLDER / f"relabel-{split}.npy"
