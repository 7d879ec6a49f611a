"""How long the service's gallery takes to be ready, from its store and from a snapshot of its index, and what it holds.

    python benchmarks/serving_start.py [--subjects 200000] [--forms exact fp16 int8] [--folder FOLDER]

Subjects of one vector of 512 numbers. Each start has a process of its own. *cold*: the system has been asked to forget
the files. *CPU s* are of all threads, which a busy machine leaves alone; *ready s* is the clock. *memory* is what the
process holds when it is ready, mapped pages of the snapshot among it, less what Python and its libraries hold, as a
share of the vectors' bytes in fp32.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from serving.gallery import Gallery  # noqa: E402
from serving.search import keeping  # noqa: E402
from serving.search.codes import Form  # noqa: E402
from serving.storage.store import Store  # noqa: E402
from serving.threshold import Rule  # noqa: E402

DIMENSION, MODEL, A_CHANGE = 512, "a" * 32, 5000
COLUMNS = ["form", "start", "ready s", "CPU s", "memory"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--subjects", type=int, default=200_000)
    parser.add_argument("--forms", nargs="+", default=["exact", "fp16", "int8"])
    parser.add_argument("--folder", type=Path, help="where the store is made; a temporary one if left out")
    parser.add_argument("--one-start", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_start:
        print(json.dumps(one_start(options.folder, options.one_start)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        fill(Path(folder), options.subjects)
        print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
        for form in options.forms:
            shutil.rmtree(Path(folder) / "gallery.db-index", ignore_errors=True)
            for start in ("from the store", "snapshot, warm", "snapshot, cold"):
                if start.endswith("cold"):
                    forget(Path(folder))
                found = started(Path(folder), form)
                share = found["memory"] / (4 * DIMENSION * options.subjects)
                print(f"| {form} | {start} | {found['ready']:.1f} | {found['cpu']:.1f} | {share:.2f} |", flush=True)


def fill(folder: Path, subjects: int) -> None:
    store, rng = Store(folder / "gallery.db", MODEL, DIMENSION), np.random.default_rng(0)
    for first in range(0, subjects, A_CHANGE):
        x_BD = rng.normal(size=(min(A_CHANGE, subjects - first), DIMENSION)).astype(np.float32)
        x_BD /= np.linalg.norm(x_BD, axis=1, keepdims=True)
        store.enrol_many([(f"s{first + number}", x_BD[number : number + 1]) for number in range(len(x_BD))])
    store.close()


def forget(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def started(folder: Path, form: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--folder", str(folder), "--one-start", form]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def one_start(folder: Path, form: Form) -> dict[str, float]:
    """A start, a search, and a clean stop, which takes a snapshot."""
    keeping.STOP_S = 600.0  # however slow the disk
    x_D, before = np.random.default_rng(1).normal(size=DIMENSION).astype(np.float32), resident()
    x_D /= np.linalg.norm(x_D)
    start, cpu = time.perf_counter(), time.process_time()
    gallery = Gallery(Store(folder / "gallery.db", MODEL, DIMENSION), Rule(0.5, ""), Rule(0.5, ""), 2, form=form)
    gallery.load()
    gallery.identify(x_D, 5)
    found = {"ready": time.perf_counter() - start, "cpu": time.process_time() - cpu, "memory": resident() - before}
    gallery.close()
    return found


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
