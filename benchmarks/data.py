"""How fast data comes: the stream beside WebDataset, torch's DataLoader and MosaicML Streaming, one decoder for all.

    python benchmarks/data.py --images 5000 --processes 0 1 2 --repeats 3 --streaming /tmp/mds --json data.json

Each contender is a process of its own, one after the other, all of them again in each repeat, so that a busy machine
slows all of them alike. Figures are of the third batch to four fifths of the epoch; the first batch is timed apart. CPU
and memory are those of the process and its children; CPU a sample is what a loaded machine changes least.
`--streaming` names a folder with mosaicml-streaming and what it needs; without it that contender is left out.

    python benchmarks/data.py --wait      # what a training step waits for data
    python benchmarks/data.py --memory    # an epoch of a million tiny samples
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import psutil
import torch
from PIL import Image

from benchmarks.data_contenders import BATCH, CONTENDERS, stream, write_mosaic
from trainer.backbones import build
from trainer.config import BackboneConfig
from trainer.data.augment import to_float
from trainer.data.importers.run import ImportOptions, run_import
from trainer.data.index import make_index, write_index
from trainer.data.manifest import Manifest
from trainer.data.split import write_split

SIDE = 112
_STEPS, _WARMUP = 24, 4  # of --wait


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--side", type=int, default=SIDE, help="pixels of the stored JPEGs; they are read at 112 x 112")
    parser.add_argument("--processes", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--streaming", type=Path, help="folder with mosaicml-streaming")
    parser.add_argument("--wait", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--tiny", type=int, default=1_000_000, help="samples for --memory")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=3, metavar=("CONTENDER", "PROCESSES", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args()


def make_set(folder: Path, images: int, side: int) -> Path:
    """JPEGs with the spectrum of photographs (amplitude 1 / frequency), 10 an identity, imported."""
    random = np.random.default_rng(0)
    large = 8 * side
    frequency = np.hypot(np.fft.fftfreq(large)[:, None], np.fft.fftfreq(large))
    frequency[0, 0] = 1
    planes = [np.fft.ifft2(np.fft.fft2(random.normal(size=(large, large))) / frequency).real for _ in range(3)]
    planes = [0.8 * planes[0] + 0.2 * plane for plane in planes]  # the channels of photographs are alike
    field = np.stack([128 + 50 * (plane - plane.mean()) / plane.std() for plane in planes], -1)
    pixels = field.clip(0, 255).astype(np.uint8)
    for i in range(images):
        top, left = random.integers(0, large - side, 2)
        path = folder / "images" / f"{i // 10:05d}" / f"{i % 10}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[top : top + side, left : left + side]).save(path, quality=90)
    run_import("folder", folder / "images", folder / "set", ImportOptions(holdout_share=0, samples_per_shard=1000))
    return folder / "set"


def measure_one(name: str, processes: int, folder: Path) -> dict[str, float]:
    """Time, CPU and memory of an epoch, in this process."""
    total, began = Manifest.read(folder).splits["train"].samples, time.perf_counter()
    marks: list[tuple[float, float, int]] = []
    samples, first = 0, 0.0
    for count in CONTENDERS[name](folder, processes):
        samples += count
        first = first or time.perf_counter() - began
        if samples >= (3 * BATCH, 0.8 * total, math.inf)[len(marks)]:
            marks.append((time.perf_counter(), cpu_of_tree(), samples))
            memory = memory_of_tree()
    seconds, cpu, count = (end - start for start, end in zip(*marks, strict=True))
    return {"samples_s": count / seconds, "cpu_us": 1e6 * cpu / count, "first_s": first, "memory_mb": memory}


def cpu_of_tree() -> float:
    """CPU seconds of this process and of its children's, while they live."""
    here = psutil.Process()
    used = [process.cpu_times() for process in [here, *here.children(recursive=True)]]
    return float(sum(times.user + times.system for times in used))


def memory_of_tree() -> float:
    """Proportional set size in MB: shared pages count once."""
    here = psutil.Process()
    tree = [here, *here.children(recursive=True)]
    return float(sum(process.memory_full_info().pss for process in tree)) / 2**20


def compare(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The best over the repeats: what else runs on the machine only ever takes away."""
    environment = dict(os.environ)
    if options.streaming:
        environment["PYTHONPATH"] = os.pathsep.join([str(options.streaming), environment.get("PYTHONPATH", "")])
        command = [sys.executable, __file__, "--one", "write_mosaic", "0", str(folder)]
        subprocess.run(command, env=environment, check=True, capture_output=True)
    pairs = [(name, processes) for name in options.only for processes in options.processes]
    pairs = [pair for pair in pairs if not pair[1] or pair[0] not in ("tars", "undecoded", "two_threads")]
    pairs = [pair for pair in pairs if options.streaming or pair[0] != "streaming"]
    found: dict[tuple[str, int], list[dict[str, float]]] = {pair: [] for pair in pairs}
    for _ in range(options.repeats):
        for name, processes in pairs:
            command = [sys.executable, __file__, "--one", name, str(processes), str(folder)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name} with {processes} processes failed:\n{done.stderr}")
            found[name, processes].append(json.loads(done.stdout.splitlines()[-1]))
            print(name, processes, found[name, processes][-1], file=sys.stderr, flush=True)
    return [
        {"contender": name, "processes": processes}
        | {key: (max if key == "samples_s" else min)(run[key] for run in runs) for key in runs[0]}
        for (name, processes), runs in found.items()
    ]


def print_table(rows: list[dict[str, Any]]) -> None:
    print("| | processes | samples/s | CPU µs a sample | first batch (s) | memory (MB) |")
    print("|---|---:|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['contender']} | {row['processes']} | {row['samples_s']:.0f} | {row['cpu_us']:.0f} "
            f"| {row['first_s']:.2f} | {row['memory_mb']:.0f} |"
        )


def wait(folder: Path) -> None:
    """Training steps, every image decoded anew: what share of the time they wait for data.

    On a GPU IResNet-50 at 112 x 112; on a CPU, one thread, the demo's network at 28 x 28.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.set_num_threads(1)
    name, side, size = ("iresnet50", 112, 128) if cuda else ("convnet", 28, 128)
    backbone = build(BackboneConfig(name=name, dimension=128), 3, side, side).to(device)
    for threads, processes in ((2, 0), (1, 1), (1, 4)) if cuda else ((2, 0), (1, 1)):
        changes = {"batch_size": size, "decode_threads": threads, "height": side, "width": side}
        batches = stream(folder, processes, **changes).batches(0)
        waited = worked = 0.0
        for step in range(_STEPS):
            begin = time.perf_counter()
            batch = next(batches).to(device)
            middle = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
                backbone(to_float(batch.images_BCHW)).square().mean().backward()
            if cuda:
                torch.cuda.synchronize()
            if step >= _WARMUP:
                waited, worked = waited + middle - begin, worked + time.perf_counter() - middle
        how = f"{processes} processes" if processes else f"{threads} threads"
        share, step_ms = waited / (waited + worked), 1000 * worked / (_STEPS - _WARMUP)
        print(f"{name}, batch {size}, {how}: step {step_ms:.0f} ms, waiting {100 * share:.2f} %", flush=True)


def memory(folder: Path, samples: int) -> None:
    """Memory through an epoch of tiny samples: one shard, whose index lists its 20 images again and again."""
    source = Manifest.read(make_set(folder, 20, 16))
    split = source.split("train")
    records = np.resize(split.index(0).records, samples)
    tiny = folder / "tiny"
    tiny.mkdir()
    size = max(split.shards[0].bytes, 1024 * samples)  # a header and a block each: else it is refused
    shutil.copy(split.path(0), tiny / "train-000000.tar")
    os.truncate(tiny / "train-000000.tar", size)
    digest = write_index(tiny / "train-000000.idx", make_index(records, 0, size))
    shard = split.shards[0].model_copy(update={"samples": samples, "bytes": size, "index_sha256": digest})
    counts = np.bincount(records["label"], minlength=split.identities)
    entry = write_split(tiny, "train", split.classes.names(), counts, [shard])
    source.model_copy(update={"splits": {"train": entry}}).write(tiny)
    here, seen, mark = psutil.Process(), 0, 1
    for batch in stream(tiny, 0, height=8, width=8).batches(0):
        seen += int((batch.labels_B >= 0).sum())
        if seen >= mark * samples // 10:
            found = here.memory_info()  # the index is mapped: its pages are the system's, which may drop them
            own, mapped = (found.rss - found.shared) / 2**20, found.shared / 2**20
            print(f"{seen} samples: {own:.0f} MB, and {mapped:.0f} MB of files", flush=True)
            mark += 1


def main() -> None:
    options = parse()
    if options.one:
        name, processes, folder = options.one
        if name == "write_mosaic":
            write_mosaic(Path(folder))
            return
        print(json.dumps(measure_one(name, int(processes), Path(folder))))
        return
    with tempfile.TemporaryDirectory() as name:
        if options.memory:
            memory(Path(name), options.tiny)
            return
        side = options.side if not options.wait or torch.cuda.is_available() else 28
        folder = make_set(Path(name), options.images, side)
        if options.wait:
            wait(folder)
            return
        rows = compare(options, folder)
        print_table(rows)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
