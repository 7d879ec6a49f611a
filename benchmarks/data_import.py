"""How fast a folder of JPEGs is imported, beside the least that it must take, in the same run.

    python benchmarks/data_import.py [--images 20000] [--side 112] [--rounds 3] [--jobs N] [--json FILE]
    python benchmarks/data_import.py --memory 1000000

Checked: against processes that read, decode and write the images and do nothing else. Unchecked: against
`cp -r SOURCE COPY; sync`. The contenders take turns, so that a busy machine slows all alike; seconds of CPU are told
beside those of the clock, since other work on the machine does not change them much.

With --memory: by how much the memory of one process that does everything grows, over that of an import of a fiftieth of
so many made-up samples.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PER_IDENTITY = 20
GOAL = 0.8
FLOOR = """
import os, sys
from pathlib import Path
from trainer.data.image import decode

part, parts, source, out = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
with Path(out, f"{part}.bin").open("wb") as file:
    for path in sorted(f"{folder}/{name}" for folder, _, names in os.walk(source) for name in names)[part::parts]:
        data = Path(path).read_bytes()
        decode(data)
        file.write(data)
    os.fsync(file.fileno())
"""
MADE_UP = """
import sys, tempfile, threading
from pathlib import Path
from trainer.data.importers import Entry, ImportOptions, Importer, Listing, share_held_out
from trainer.data.importers import KINDS
from trainer.data.importers.run import run_import

JPEG = bytes.fromhex("ffd8ffc0000b080008000801000000")

def listed(source, options, progress):
    samples, each = map(int, sys.argv[1:])
    entries = (Entry(f"person {i // each:07d}", f"{i:08d}.jpg", str(i), size=20) for i in range(samples))
    return Listing(entries, "", share_held_out(0.1, 0))

def watch():
    global peak
    while not done.wait(0.005):
        found = Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]
        peak = max(peak, 1024 * int(found))

IMPORTER = Importer(listed, lambda source, options: lambda place: JPEG + place.encode())
KINDS["made up"] = "__main__"
peak, done = 0, threading.Event()
threading.Thread(target=watch, daemon=True).start()
with tempfile.TemporaryDirectory() as folder:
    run_import("made up", None, Path(folder, "set"), ImportOptions(check=False, jobs=1))
done.set()
print(peak)
"""
PAIRS = (("import", "decode and write"), ("import --no-check", "cp -r; sync"))


def main() -> None:
    options = _options()
    if options.memory:
        for each in (PER_IDENTITY, 1):
            found = memory(options.memory, each)
            print(f"{options.memory:,} samples, {each} an identity: {found:.0f} bytes of memory a sample")
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        draw(folder / "faces", options.images, options.side)
        out = folder / "out"
        contenders: dict[str, Callable[[], None]] = {
            "decode and write": lambda: floor(folder / "faces", out, options.jobs),
            "import": lambda: import_(folder / "faces", out, options.jobs),
            "cp -r; sync": lambda: copy(folder / "faces", out),
            "import --no-check": lambda: import_(folder / "faces", out, options.jobs, "--no-check"),
        }
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        for _ in range(options.rounds):
            for name, work in contenders.items():
                taken[name].append(timed(work))
                shutil.rmtree(out)
    report(taken, options)


def draw(folder: Path, images: int, side: int) -> None:
    """Smooth random images: as a JPEG of 112 pixels a side about as large as a face."""
    random = np.random.default_rng(0)
    for i in range(images):
        path = folder / f"{i // PER_IDENTITY:06d}" / f"{i:08d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = random.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
        buffer = BytesIO()
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
        path.write_bytes(buffer.getvalue())
    subprocess.run(["sync"], check=True)


def floor(source: Path, out: Path, jobs: int) -> None:
    out.mkdir()
    command = [sys.executable, "-c", FLOOR]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen([*command, str(part), str(jobs), str(source), str(out)], env=environment)
        for part in range(jobs)
    ]
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit("a process that decodes and writes has failed")


def import_(source: Path, out: Path, jobs: int, *further: str) -> None:
    program = "from serving.cli import main; main()"
    words = ["data", "import", str(source), "--kind", "folder", "--out", str(out), "--jobs", str(jobs), *further]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program, *words], env=environment, check=True, stdout=subprocess.DEVNULL)


def copy(source: Path, out: Path) -> None:
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    subprocess.run(["sync"], check=True)


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds by the clock, and of CPU."""

    def cpu() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    clock, used = time.perf_counter(), cpu()
    work()
    return time.perf_counter() - clock, cpu() - used


def memory(samples: int, each: int) -> float:
    """Bytes of anonymous memory a sample, at the peak."""
    smaller, whole = (int(_python(MADE_UP, str(count), str(each))) for count in (samples // 50, samples))
    return (whole - smaller) / (samples - samples // 50)


def _python(program: str, *words: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, *words]
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def report(taken: dict[str, list[tuple[float, float]]], options: argparse.Namespace) -> None:
    pixels = f"{options.side} x {options.side}"
    print(f"{options.images} JPEGs of {pixels}, {options.jobs} processes, {options.rounds} rounds\n")
    print("| what | images/s | seconds | CPU seconds |\n|---|---|---|---|")
    seconds = {
        name: [statistics.median(column) for column in zip(*rounds, strict=True)] for name, rounds in taken.items()
    }
    for name, (clock, cpu) in seconds.items():
        print(f"| {name} | {options.images / clock:,.0f} | {clock:.1f} | {cpu:.1f} |")
    print()
    for ours, least in PAIRS:
        ratio = statistics.median(b[0] / a[0] for a, b in zip(taken[ours], taken[least], strict=True))
        print(f"{ours}: {ratio:.2f} x {least} (goal: {GOAL} or more)")
    if options.json is not None:
        options.json.write_text(
            json.dumps({"options": vars(options) | {"json": None}, "seconds": taken}, indent=1, default=str)
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--side", type=int, default=112, help="pixels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="on the disk that is measured; by default that of temporary files")
    parser.add_argument("--memory", type=int, help="samples")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
