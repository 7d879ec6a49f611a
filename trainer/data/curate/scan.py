"""Every sample of a data set read, decoded and hashed, by several processes. Runs without torch."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data.arrays import as_array
from trainer.data.curate.duplicates import HASH_BYTES, digest, perceptual_hash
from trainer.data.image import decode
from trainer.data.manifest import Manifest
from trainer.data.reader import Progress, places_in, read_bytes
from trainer.errors import UserError

_CHUNK = 1024  # samples of one task


class _Task(NamedTuple):
    """Rows of a shard's index, and where their samples stand among all of the set."""

    split: str
    shard: int
    rows: slice
    position: int


class _Found(NamedTuple):
    labels: NDArray[np.int64]
    digests: NDArray[np.uint64]
    hashes: NDArray[np.uint8]
    good: NDArray[np.bool_]
    faults: list[str]


@dataclass
class Findings:
    """What was found, by position among all samples, split after split.

    Attributes:
        starts: position of the first sample of each split.
        labels: in its split; -1 where the shard or its index cannot be read.
        digests, hashes: see `trainer.data.curate.duplicates`; of vectors the hashes are 0.
        good: the sample can be read and decoded.
        faults: a sentence for each sample that cannot be, though its shard can.
    """

    starts: dict[str, int]
    labels: NDArray[np.int64]
    digests: NDArray[np.uint64]
    hashes: NDArray[np.uint8]
    good: NDArray[np.bool_]
    faults: list[str] = field(default_factory=list)

    def split_of(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The number of the split that each sample is in."""
        return np.searchsorted(np.fromiter(self.starts.values(), np.int64), positions, side="right") - 1

    def place(self, position: int) -> tuple[str, int]:
        """The name of the sample's split, and its position in that one."""
        name = list(self.starts)[int(self.split_of(np.array([position]))[0])]
        return name, position - self.starts[name]


def scan(address: str, manifest: Manifest, jobs: int, progress: Progress | None = None) -> Findings:
    """Read and decode every sample. Memory: 50 bytes a sample.

    Args:
        address: of the data set, which each process opens for itself.
        jobs: processes; with 1 the work is done in this one.
        progress: called with the stage "decode".

    Raises:
        UserError: a process was killed.
    """
    starts, tasks, total = {}, [], 0
    for name, entry in manifest.splits.items():
        starts[name] = total
        for shard, one in enumerate(entry.shards):
            chunks = (slice(first, min(first + _CHUNK, one.samples)) for first in range(0, one.samples, _CHUNK))
            tasks += [_Task(name, shard, rows, total + rows.start) for rows in chunks]
            total += one.samples
    whole = Findings(
        starts, np.full(total, -1), np.zeros(total, np.uint64), np.zeros((total, HASH_BYTES), np.uint8),
        np.zeros(total, bool),
    )  # fmt: skip
    done = 0
    for task, found in zip(tasks, _run(address, tasks, min(jobs, len(tasks))), strict=True):
        place = slice(task.position, task.position + len(found.good))
        whole.labels[place], whole.digests[place] = found.labels, found.digests
        whole.hashes[place], whole.good[place] = found.hashes, found.good
        whole.faults.extend(found.faults)
        done += len(found.good)
        if progress is not None:
            progress("decode", done, total)
    return whole


def _run(address: str, tasks: list[_Task], jobs: int) -> Iterator[_Found]:
    if jobs == 1:
        yield from map(Examiner(Manifest.read(address)).scan, tasks)
        return
    # New processes, not copies of this one, whose threads they would not have.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, _start, (address,)) as pool:
        try:
            yield from pool.map(_scan, tasks)
        except BrokenProcessPool as error:
            raise UserError(
                f"one of the {jobs} processes that decode was killed, perhaps for want of memory; give fewer --jobs"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


class Examiner:
    """Reads the tasks of one process."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._splits = {name: manifest.split(name) for name in manifest.splits}

    def scan(self, task: _Task) -> _Found:
        samples = task.rows.stop - task.rows.start
        found = _Found(
            np.full(samples, -1), np.zeros(samples, np.uint64), np.zeros((samples, HASH_BYTES), np.uint8),
            np.zeros(samples, bool), [],
        )  # fmt: skip
        split = self._splits[task.split]
        shard = split.shards[task.shard].file
        try:
            index = split.index(task.shard)
        except UserError:
            return found  # the verification says what is wrong with the file; so below
        places = places_in(Path(shard.name), index, np.arange(task.rows.start, task.rows.stop))
        ranges = [(place.offset, place.size) for place in places]
        with split.store.open({shard: ranges}, whole=True) as files:
            if isinstance(files[shard], UserError):
                return found
            for row, place in enumerate(places):
                found.labels[row] = place.label
                try:
                    payload = read_bytes(files[shard], place)
                    found.hashes[row] = self.decode(payload, f"{shard.name}: {place.key}")
                except UserError as error:
                    found.faults.append(str(error))
                    continue
                found.digests[row], found.good[row] = digest(payload), True
        return found

    def decode(self, payload: bytes, name: str) -> NDArray[np.uint8] | int:
        """The perceptual hash of an image; 0 for an array.

        Raises:
            UserError: the payload is not what the manifest says that the set holds.
        """
        if self._manifest.content == "image":
            return np.frombuffer(perceptual_hash(decode(payload, name).image), np.uint8)
        as_array(payload, tuple(self._manifest.shape), name)
        return 0


_worker: Examiner | None = None  # of a process of the pool


def _start(address: str) -> None:
    global _worker
    _worker = Examiner(Manifest.read(address))


def _scan(task: _Task) -> _Found:
    assert _worker is not None
    return _worker.scan(task)
