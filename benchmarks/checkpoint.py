"""How long training waits for a checkpoint, against how long it takes to write, and reading at other numbers of ranks.

    python benchmarks/checkpoint.py --gigabytes 2 --ranks 2 --out /tmp/checkpoints

A head's rows with their momentum, and a backbone of a tenth of that, on gloo ranks of one thread each. A step is a
matrix product and an all-reduce. Each checkpoint is written twice: with nothing else to do (*alone*), and behind the
steps. *Waits* is what `save` and `look` take of the training's time, *steps slower* how much longer the steps
take that are done meanwhile than those before: the writing thread wants a core, too.
"""

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from trainer.checkpoint import CheckpointManifest, Saver, in_rows, latest
from trainer.distributed import Group, RowRange
from trainer.storage import Folder

DIMENSION = 512


def of_rows(key: str) -> bool:
    return True


class Training:
    """The state of one rank, and steps that take time."""

    def __init__(self, gigabytes: float, group: Group) -> None:
        self.classes = int(gigabytes * 0.9e9 / (DIMENSION * 8))
        self.rows = RowRange.of(self.classes, group.rank, group.size)
        self.head = {name: torch.randn(len(self.rows), DIMENSION) for name in ("weight", "momentum")}
        count = int(gigabytes * 0.1e9 / 4) // 20
        self.backbone = [(f"weight.{number}", torch.randn(count)) for number in range(20)]
        self.group, self._a = group, torch.randn(700, 700)

    def step(self) -> float:
        begun = time.perf_counter()
        self._a @ self._a
        self.group.all_reduce(torch.ones(1000))
        return time.perf_counter() - begun

    def manifest(self, step: int) -> CheckpointManifest:
        return CheckpointManifest(
            step=step, world_size=self.group.size, classes=self.classes, class_digest="", config={}, files={}
        )


def begin(saver: Saver, training: Training, step: int) -> float:
    """Seconds until `save` returns."""
    begun = time.perf_counter()
    files = in_rows("head", training.rows, training.head, of_rows)
    saver.save(training.manifest(step), files, iter(training.backbone))
    return time.perf_counter() - begun


def writing(rank: int, options: argparse.Namespace, port: int) -> None:
    """Rank 0 prints the table's rows."""
    group = start(rank, options.ranks, port)
    training, folder = Training(options.gigabytes, group), Folder.at(options.out)
    saver = Saver(folder, 1, group)
    for number in range(options.repeats):
        before = [training.step() for _ in range(100)]
        group.barrier()
        begun = time.perf_counter()
        begin(saver, training, 2 * number + 1)
        saver.finish()
        alone = time.perf_counter() - begun
        waited, steps = begin(saver, training, 2 * number + 2), []
        first, begun = waited, time.perf_counter()
        while group.all_reduce(torch.tensor(int(saver._job is not None))):
            steps.append(training.step())
            looked = time.perf_counter()
            saver.look()
            waited += time.perf_counter() - looked
        behind = time.perf_counter() - begun + first
        slower = statistics.mean(steps) / statistics.mean(before) - 1
        if rank == 0:
            print(
                f"| {number + 1} | {alone:.2f} | {behind:.2f} | {first:.2f} | {waited:.2f} | {waited / behind:.1%} | "
                f"{slower:.0%} |",
                flush=True,
            )


def reading(rank: int, options: argparse.Namespace, port: int, ranks: int) -> None:
    """Rank 0 prints how long it takes all of them to read their rows and the backbone, and what they read."""
    group = start(rank, ranks, port)
    found = latest(Folder.at(options.out))
    assert found is not None
    whole, read = Folder.read, [0]

    def counted(folder: Folder, name: str) -> bytes:
        data = whole(folder, name)
        read[0] += len(data)
        return data

    Folder.read = counted  # type: ignore[method-assign]
    group.barrier()
    begun = time.perf_counter()
    state = found.rows("head", RowRange.of(found.manifest.classes, rank, ranks), of_rows)
    backbone = found.parts("backbone")
    own = sum(tensor.nbytes for tensor in (*state.values(), *backbone.values()))
    group.barrier()
    told = [json.loads(text) for text in group.gather_text(json.dumps([own, read[0]]))]
    if rank == 0:
        most, needed = max(one[1] for one in told), max(one[0] for one in told)
        print(f"| {ranks} | {time.perf_counter() - begun:.2f} | {most / 1e9:.2f} | {needed / 1e9:.2f} |", flush=True)


def start(rank: int, ranks: int, port: int) -> Group:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    return Group.current()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="new folder, removed at the end")
    parser.add_argument("--port", type=int, default=29511)
    options = parser.parse_args()
    print("| | alone (s) | behind the steps (s) | copy (s) | waits (s) | share | steps slower |", flush=True)
    multiprocessing.spawn(writing, (options, options.port), options.ranks)
    print("| ranks that read | s | GB read by one at most | of its own |", flush=True)
    for number, ranks in enumerate(dict.fromkeys((options.ranks, 1, options.ranks + 1))):
        multiprocessing.spawn(reading, (options, options.port + 1 + number, ranks), ranks)
    shutil.rmtree(options.out)


if __name__ == "__main__":
    main()
