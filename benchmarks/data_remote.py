"""Reading a data set from a web server 20 ms away, at 200 Mbit/s a connection, against the same set in a folder.

Each round reads an epoch from the folder and from the server, with an empty cache, in turn; samples are decoded. The
table says when the first batch was there, the rate from then on, and what was fetched. For shuffled windows and for
P x K batches both ways are measured: whole shards, and the blocks in which samples lie. A second table has the rate and
the CPU time of requests by their size.
"""

import argparse
import json
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.web import Web, serving
from trainer.data.importers.run import ImportOptions, run_import
from trainer.data.manifest import Manifest
from trainer.data.remote import fetch
from trainer.data.stream import DataConfig, Stream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--shard", type=int, default=1000, help="samples of a shard")
    parser.add_argument("--window", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="of P x K, measured on a small part of the epoch")
    parser.add_argument("--latency", type=float, default=0.02, help="seconds")
    parser.add_argument("--rate", type=float, default=25e6, help="bytes a second of each connection")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # What is being fetched ahead when the last epoch ends may still arrive: hence the errors.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        rows = measure(options, make_set(Path(name), options), Path(name) / "cache")
    for table in rows:
        for row in [{name: name for name in table[0]}, *table]:
            print(" | ".join(f"{value:>12}" for value in row.values()))
        print()
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def make_set(root: Path, options: argparse.Namespace) -> Path:
    """JPEGs of 112 x 112 pixels and about 4 kB, ten of each identity."""
    random = np.random.default_rng(0)
    for i in range(options.samples):
        folder = root / "images" / f"{i // 10:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (20, 20, 3), dtype=np.uint8))
        buffer = BytesIO()
        coarse.resize((112, 112), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        (folder / f"{i % 10}.jpg").write_bytes(buffer.getvalue())
    run_import("folder", root / "images", root / "set", ImportOptions(holdout_share=0, samples_per_shard=options.shard))
    return root / "set"


def measure(options: argparse.Namespace, folder: Path, cache: Path) -> list[list[dict[str, str]]]:
    """The two tables."""
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("fork").Process(target=serve, args=(folder, options, there), daemon=True)
    server.start()
    address = here.recv()
    tables = [ways_of_reading(options, folder, address, cache, here), sizes_of_requests(folder, address)]
    here.send("end")
    server.join()
    return tables


def ways_of_reading(
    options: argparse.Namespace, folder: Path, address: str, cache: Path, server: Connection
) -> list[dict[str, str]]:
    """One row for each order and each way."""
    rows = []
    for order in ("shuffled", "P x K"):
        ways = [("folder", folder, None), ("whole shards", address, False), ("blocks", address, True)]
        runs: dict[str, list[tuple[float, float, int, int]]] = {way: [] for way, *_ in ways}
        for _ in range(options.rounds):
            for way, path, blocks in ways:
                shutil.rmtree(cache, ignore_errors=True)
                ask(server, "reset")
                first, rate = read(options, path, cache, order == "P x K", blocks)
                runs[way].append((first, rate, *ask(server, "count")))
                settle(server)
        for way, found in runs.items():
            first, rate, requests, sent = (statistics.median(column) for column in zip(*found, strict=True))
            against = statistics.median(a[1] / b[1] for a, b in zip(found, runs["folder"], strict=True))
            rows.append(
                {
                    "order": order,
                    "read as": way,
                    "first batch s": f"{first:.2f}",
                    "samples/s": f"{rate:.0f}",
                    "of folder": f"{against:.3f}",
                    "requests": f"{requests:.0f}",
                    "MB": f"{sent / 1e6:.1f}",
                }
            )
    return rows


def ask(server: Connection, word: str) -> tuple[int, int]:
    """Requests and bytes since the last reset."""
    server.send(word)
    found: tuple[int, int] = server.recv()
    return found


def settle(server: Connection) -> None:
    """Wait until what was being fetched ahead has arrived."""
    before = None
    while before != (before := ask(server, "count")):
        time.sleep(0.5)


def sizes_of_requests(folder: Path, address: str) -> list[dict[str, str]]:
    """Ranges of one shard, by 32 threads."""
    shard = next(folder.glob("*.tar"))
    rows = []
    for size in [size for size in (2**16, 2**18, 2**20, 2**21) if size < shard.stat().st_size]:
        starts = np.random.default_rng(0).integers(0, shard.stat().st_size - size, 2**26 // size // 2 + 32).tolist()
        cpu, begun = time.process_time(), time.perf_counter()
        with ThreadPoolExecutor(32) as pool:
            list(pool.map(lambda start, size=size: fetch(f"{address}/{shard.name}", start, start + size), starts))
        wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
        rows.append(
            {
                "KiB": str(size // 1024),
                "requests/s": f"{len(starts) / wall:.0f}",
                "MB/s": f"{len(starts) * size / wall / 1e6:.0f}",
                "CPU ms each": f"{cpu / len(starts) * 1e3:.2f}",
            }
        )
    return rows


def read(
    options: argparse.Namespace, path: Path | str, cache: Path, pxk: bool, blocks: bool | None
) -> tuple[float, float]:
    """Seconds until the first batch, and samples a second from then on."""
    begun = time.perf_counter()
    config = DataConfig(
        path=path,
        cache_dir=cache,
        cache="none",
        batch_size=options.batch,
        shuffle_window=options.window,
        identities_per_batch=options.batch // 4 if pxk else None,
    )
    stream = Stream(Manifest.read(path, config.remote_cache), "train", config)
    if blocks is not None:
        stream._reader._scattered = blocks  # type: ignore[union-attr]  # the way that is not taken is measured too
    batches = stream.batches(0)
    next(batches)
    ready = time.perf_counter()
    steps = min(options.steps if pxk else stream.steps_per_epoch, stream.steps_per_epoch)
    for _ in range(steps - 1):
        next(batches)
    done = time.perf_counter()
    batches.close()
    return ready - begun, (steps - 1) * options.batch / (done - ready)


def serve(folder: Path, options: argparse.Namespace, pipe: Connection) -> None:
    """The server's process: answers what was asked of it."""
    with serving(Web(folder, latency=options.latency, rate=options.rate)) as web:
        pipe.send(web.address)
        while (word := pipe.recv()) != "end":
            if word == "reset":
                web.requests, web.sent = Counter(), Counter()
            pipe.send((web.requests.total(), web.sent.total()))


if __name__ == "__main__":
    main()
