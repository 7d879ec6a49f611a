"""What the store costs the processor, as it is and encrypted, in turns.

    python benchmarks/store.py [--vectors 20000] [--rounds 3]

Vectors of 512 dimensions, one a subject, 1,000 subjects in one change. Times are the processor's, without the disk.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from serving.storage.store import Store  # noqa: E402

DIMENSION, A_CHANGE = 512, 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--vectors", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3, help="of reading")
    options = parser.parse_args()
    x_BD = np.random.default_rng(0).normal(size=(A_CHANGE, DIMENSION)).astype(np.float32)
    x_BD /= np.linalg.norm(x_BD, axis=1, keepdims=True)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stores = {
            name: stack.enter_context(closing(Store(Path(folder) / name, "a" * 32, DIMENSION, key=key)))
            for name, key in (("plain", None), ("encrypted", b"k" * 32))
        }
        seconds: dict[tuple[str, str], list[float]] = {}
        for start in range(0, options.vectors, A_CHANGE):
            items = [(f"s{start + place}", row[None]) for place, row in enumerate(x_BD)]
            for name, store in stores.items():
                took = processor(lambda store=store, items=items: store.enrol_many(items))
                seconds.setdefault((name, "enrol"), []).append(took / A_CHANGE)
        for _ in range(options.rounds):
            for name, store in stores.items():
                for what, act in (("load", lambda store=store: list(store.samples(True))), ("verify", store.verify)):
                    seconds.setdefault((name, what), []).append(processor(act) / options.vectors)
    print("| store | step | µs a vector |\n|---|---|---|")
    for (name, what), each in seconds.items():
        print(f"| {name} | {what} | {statistics.median(each) * 1e6:.1f} |")


def processor(act: Callable[[], object]) -> float:
    start = time.process_time()
    act()
    return time.process_time() - start


if __name__ == "__main__":
    main()
