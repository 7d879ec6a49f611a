"""How many clients the service bears: searches and enrolments at once, beside FAISS alone and another checkout.

    python benchmarks/serving_load.py [--gallery 10000 200000] [--clients 1 32] [--seconds 5] [--against PATH]

Identify by an embedding of 512 numbers, over kept connections. In each round every server is asked in turn, and then
FAISS alone, so that a busy machine slows all alike. *per s* is what so many clients get who ask again as soon as they
are answered; *CPU ms* what the server's process spends on a request, and *FAISS* what one core gets from a flat index
in batches of so many queries. The quantiles are of an open loop: requests come at random moments, at 0.7 of that rate,
whether or not earlier ones are answered, and are counted from the moment at which they should have been sent.
*enrol* is a client who enrols one subject after the other meanwhile (in a closed loop).
"""

import argparse
import asyncio
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.serving import DIMENSION, served, unit_vectors, write_embedder  # noqa: E402
from serving.storage.store import Store  # noqa: E402
from trainer.embedder import Embedder  # noqa: E402

A_CHANGE = 1000  # subjects
LOAD = 0.7  # of what was reached
HEAD = "{} {} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {}\r\nContent-Length: {}\r\n\r\n"
COLUMNS = ["", "enrolled", "clients", "per s", "CPU ms", "FAISS per s", "/ FAISS", "p50 ms", "p95 ms", "p99 ms"]


@dataclass
class Figures:
    """Of one server, gallery and number of clients; one entry a round."""

    per_s: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    faiss_per_s: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    enrolments: list[float] = field(default_factory=list)


def main() -> None:
    options = _options()
    checkouts = {"here": ROOT} | ({"against": options.against.resolve()} if options.against else {})
    rows = []
    for size in options.gallery:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            embedder, stores = write_embedder(Path(folder) / "embedder"), {}
            x_ND = fill(Path(folder) / "filled", embedder, size)
            processes = {}
            for name, path in checkouts.items():
                stores[name] = Path(folder) / name
                shutil.copytree(Path(folder) / "filled", stores[name])
                before = children()
                address = stack.enter_context(served(path, embedder, stores[name] / "gallery.db"))
                processes[name] = (address, next(iter(children() - before)))
                wait_until_ready(address)
            for clients in options.clients:
                figures = {name: Figures() for name in checkouts}
                for _ in range(options.rounds):
                    for name, (address, pid) in processes.items():
                        asyncio.run(one_round(address, pid, clients, options, figures[name]))
                        figures[name].faiss_per_s.append(faiss_alone(x_ND, clients))
                rows += [line(name, size, clients, found) for name, found in figures.items()]
    for row in (COLUMNS, ["---"] * len(COLUMNS), *rows):
        print("| " + " | ".join(row) + " |")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--against", type=Path, help="another checkout of the project")
    parser.add_argument(
        "--gallery", type=int, nargs="+", default=[10_000, 200_000], help="subjects, of one vector each"
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--seconds", type=float, default=5, help="of each part of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--enrol", action="store_true", help="enrol meanwhile")
    return parser.parse_args()


def fill(folder: Path, embedder: Path, size: int) -> NDArray[np.float32]:
    folder.mkdir()
    x_ND = unit_vectors(size, seed=2)
    store = Store(folder / "gallery.db", Embedder.open(embedder).model_id, DIMENSION)
    for start in range(0, size, A_CHANGE):
        part = range(start, min(size, start + A_CHANGE))
        store.enrol_many([(f"s{number}", x_ND[number : number + 1]) for number in part])
    store.close()
    return x_ND


def children() -> set[int]:
    found = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
    return set(map(int, found.split()))


def wait_until_ready(address: tuple[str, int]) -> None:
    while asyncio.run(_status_of(address)) != 200:
        time.sleep(0.1)


async def _status_of(address: tuple[str, int]) -> int:
    client = await Client.open(address)
    try:
        return await client.send(b"GET /readyz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    finally:
        client.close()


class Client:
    """A kept connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, address: tuple[str, int]) -> "Client":
        return cls(*await asyncio.open_connection(*address))

    async def send(self, request: bytes) -> int:
        """The status of the answer."""
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = next(int(row[15:]) for row in head.lower().split(b"\r\n") if row.startswith(b"content-length:"))
        await self._reader.readexactly(length)
        return int(head[9:12])

    def close(self) -> None:
        self._writer.close()


def requests(method: str, target: str, bodies: Sequence[object]) -> list[bytes]:
    texts = [json.dumps(body).encode() for body in bodies]
    return [HEAD.format(method, target, "application/json", len(text)).encode() + text for text in texts]


async def one_round(
    address: tuple[str, int], pid: int, clients: int, options: argparse.Namespace, figures: Figures
) -> None:
    searches = requests("POST", "/v1/identify", [{"embedding": row.tolist()} for row in unit_vectors(200, seed=3)])
    connections = [await Client.open(address) for _ in range(clients)]
    enrolling = asyncio.create_task(enrol(address, figures)) if options.enrol else None
    await closed_loop(connections, searches, options.seconds / 5)  # warm
    cpu = cpu_seconds(pid)
    count = await closed_loop(connections, searches, options.seconds)
    figures.cpu_ms.append((cpu_seconds(pid) - cpu) / count * 1000)
    figures.per_s.append(count / options.seconds)
    figures.latencies += await open_loop(connections, searches, options.seconds, LOAD * count / options.seconds)
    if enrolling is not None:
        enrolling.cancel()
    for connection in connections:
        connection.close()


async def closed_loop(connections: Sequence[Client], searches: Sequence[bytes], seconds: float) -> int:
    """Answers that came within the time."""
    until, count = time.perf_counter() + seconds, 0

    async def work(client: Client, first: int) -> None:
        nonlocal count
        number = first
        while time.perf_counter() < until:
            if await client.send(searches[number % len(searches)]) != 200:
                raise SystemExit("a search was refused")
            number += 1
            count += 1

    await asyncio.gather(*(work(client, 7 * number) for number, client in enumerate(connections)))
    return count


async def open_loop(
    connections: Sequence[Client], searches: Sequence[bytes], seconds: float, rate: float
) -> list[float]:
    """Seconds from the moment at which each request should have been sent to its answer."""
    free: asyncio.Queue[Client] = asyncio.Queue()
    for connection in connections:
        free.put_nowait(connection)
    found: list[float] = []

    async def ask(number: int, due: float) -> None:
        client = await free.get()
        await client.send(searches[number % len(searches)])
        found.append(time.perf_counter() - due)
        free.put_nowait(client)

    moments = np.cumsum(np.random.default_rng(4).exponential(1 / rate, max(1, int(rate * seconds))))
    start, tasks = time.perf_counter(), []
    for number, moment in enumerate(moments):
        await asyncio.sleep(max(0.0, start + float(moment) - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(number, start + float(moment))))
    await asyncio.gather(*tasks)
    return found


async def enrol(address: tuple[str, int], figures: Figures) -> None:
    client, vectors = await Client.open(address), unit_vectors(100, seed=5)
    while True:
        name = f"new{time.monotonic_ns()}"
        (request,) = requests("POST", f"/v1/subjects/{name}/samples", [{"embeddings": [vectors[0].tolist()]}])
        start = time.perf_counter()
        await client.send(request)
        figures.enrolments.append(time.perf_counter() - start)


def cpu_seconds(pid: int) -> float:
    values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")


def faiss_alone(x_ND: NDArray[np.float32], batch: int, repeats: int = 5) -> float:
    """Queries a second of one core."""
    faiss.cvar.distance_compute_blas_threshold = 2048
    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatIP(DIMENSION)
    index.add(x_ND)
    queries, times = unit_vectors(batch, seed=3), []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        index.search(queries, 37)
        times.append(time.perf_counter() - start)
    return batch / statistics.median(times[1:])


def line(name: str, size: int, clients: int, figures: Figures) -> list[str]:
    per_s, alone = statistics.median(figures.per_s), statistics.median(figures.faiss_per_s)
    quantiles = np.percentile(np.asarray(figures.latencies) * 1000, [50, 95, 99])
    numbers = [f"{per_s:.0f}", f"{statistics.median(figures.cpu_ms):.2f}", f"{alone:.0f}", f"{per_s / alone:.2f}"]
    if figures.enrolments:
        told = np.percentile(np.asarray(figures.enrolments) * 1000, [50, 99])
        print(f"{name}: {len(figures.enrolments)} enrolments meanwhile, p50 {told[0]:.1f} ms, p99 {told[1]:.1f} ms")
    return [name, str(size), str(clients), *numbers, *(f"{value:.1f}" for value in quantiles)]


if __name__ == "__main__":
    main()
