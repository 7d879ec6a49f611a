"""What opening a data set costs each rank at 100M samples of 10M identities: tables alone, made up, no image.

Opened is what training opens: manifest, reader (which compares every shard's size), sampler and the positions of the
first batch; then the indexes of the shards in which the rank's own samples of it lie. The shards are files with a size
and no content, and their indexes are empty.

    python benchmarks/data_scale.py                         # 1.5 GB of disk under runs/, some minutes
    python benchmarks/data_scale.py --identities 100000     # a quick look
"""

import argparse
import multiprocessing
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from trainer.data.image import Preprocessing
from trainer.data.index import RECORD, make_index, write_index
from trainer.data.manifest import Manifest
from trainer.data.reader import Reader
from trainer.data.samplers import PKSampler, ShuffledSampler
from trainer.data.split import ShardEntry, SplitEntry
from trainer.data.tables import TableFile, write_classes

PER_IDENTITY, PER_SHARD = 10, 10_000  # samples
SHARD_BYTES = 120_000_000
BATCH, P, WINDOW = 1024, 256, 50_000


class Opened(NamedTuple):
    """Seconds and MB of one rank after its imports; `before` is their memory, `rss` and `pss` are of the process."""

    order: str
    open_s: float
    open_cpu_s: float
    indexes_s: float
    before: float
    rss: float
    pss: float
    private: float


def make(folder: Path, identities: int) -> None:
    """Write the tables of a set, unless they are there."""
    if (folder / "manifest.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    counts = PER_IDENTITY + np.random.default_rng(0).integers(0, 7, identities // 2)
    counts = np.concatenate([counts, 2 * PER_IDENTITY - counts])  # 4 to 16, PER_IDENTITY on average
    names = pa.concat_arrays(
        [
            pa.array([f"identity/{label:09d}" for label in range(start, min(start + 10**6, identities))])
            for start in range(0, identities, 10**6)
        ]
    )
    classes = write_classes(folder / "train.classes.arrow", names, counts)
    samples = int(counts.sum())
    positions = np.lib.format.open_memmap(folder / "train.by_class.npy", "w+", "<i8", (samples,))
    for start in range(0, samples, 10**7):  # a fixed mixture of all samples: enough to stand for one
        positions[start : start + 10**7] = np.arange(start, min(start + 10**7, samples)) * 61_803_399 % samples
    positions.flush()
    shards = [_shard(folder, number) for number in range(samples // PER_SHARD)]
    by_class = TableFile.of(folder / "train.by_class.npy")
    split = SplitEntry(samples=samples, identities=identities, classes=classes, by_class=by_class, shards=shards)
    Manifest(kind="made up", image_mode="RGB", splits={"train": split}).write(folder)


def _shard(folder: Path, number: int) -> ShardEntry:
    entry = ShardEntry(name=f"train-{number:06d}.tar", samples=PER_SHARD, bytes=SHARD_BYTES, sha256="0" * 64)
    with (folder / entry.name).open("wb") as file:
        file.truncate(SHARD_BYTES)
    # 20 GB of indexes would tell no more than one that all shards share
    index = folder / entry.index_file
    first = folder / "train-000000.idx"
    if number == 0:
        write_index(first, make_index(np.zeros(PER_SHARD, RECORD), 0, SHARD_BYTES))
    else:
        index.unlink(missing_ok=True)
        index.hardlink_to(first)
    return entry.model_copy(update={"index_sha256": TableFile.of(first).sha256})


def memory() -> dict[str, float]:
    """MB of this process by kind."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    values = {name.rstrip(":"): int(value) / 1024 for name, value, *_ in map(str.split, lines)}
    return {**values, "Private": values["Private_Clean"] + values["Private_Dirty"]}


def open_set(folder: Path, order: str, rank: int, ranks: int) -> Opened:
    """Open the set as a rank does, and find its own samples of the first batch."""
    before, start, cpu = memory()["Rss"], time.perf_counter(), time.process_time()
    split = Manifest.read(folder).split("train")
    Reader(split, Preprocessing())
    if order == "P x K":
        sampler = PKSampler(split.classes, split.by_class, P, BATCH, 0)
    else:
        sampler = ShuffledSampler([shard.samples for shard in split.shards], BATCH, WINDOW, 0)
    positions = sampler.positions(0, 0)
    opened, cpu = time.perf_counter(), time.process_time() - cpu
    own = positions[rank * BATCH // ranks : (rank + 1) * BATCH // ranks]
    for shard in np.unique(np.searchsorted(split.ends, own, side="right")).tolist():
        split.index(shard)
    done, now = time.perf_counter(), memory()
    return Opened(order, opened - start, cpu, done - opened, before, now["Rss"], now["Pss"], now["Private"])


def run(folder: Path, order: str, rank: int, together: Barrier, results: "multiprocessing.SimpleQueue[Opened]") -> None:
    """Open the set; measure the memory again when all ranks have done so."""
    found = open_set(folder, order, rank, together.parties)
    together.wait()
    now = memory()
    results.put(found._replace(rss=now["Rss"], pss=now["Pss"], private=now["Private"]))
    together.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--identities", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, default=Path("runs/data_scale"))
    options = parser.parse_args()
    folder = options.folder / str(options.identities)
    make(folder, options.identities)
    print(f"{options.identities:,} identities, {options.identities * PER_IDENTITY:,} samples; times in s, memory in MB")
    print("order     ranks  open  CPU  indexes  before  RSS  PSS  private")
    context = multiprocessing.get_context("spawn")
    for order in ("shuffled", "P x K"):
        for ranks in (1, 8):
            together, results = context.Barrier(ranks), context.SimpleQueue()
            started = [context.Process(target=run, args=(folder, order, i, together, results)) for i in range(ranks)]
            for process in started:
                process.start()
            found = max((results.get() for _ in started), key=lambda opened: opened.rss)
            for process in started:
                process.join()
            print(
                f"{order:9} {ranks:5} {found.open_s:5.2f} {found.open_cpu_s:4.2f} {found.indexes_s:8.2f} "
                f"{found.before:7.0f} {found.rss:4.0f} {found.pss:4.0f} {found.private:8.0f}"
            )


if __name__ == "__main__":
    main()
