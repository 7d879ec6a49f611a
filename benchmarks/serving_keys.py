"""What keys and the audit log cost the service: CPU of a request with them and without.

    python benchmarks/serving_keys.py [--keys 1000] [--requests 1000] [--rounds 9]

The first table is the check of a key alone, in this process, on its CPU clock. The second is of whole requests,
identify by an embedding and enrolment of one, on one kept connection: CPU time of the service's process, and the median
time to the answer. Every round asks all servers in turn; what is told is the median over the rounds of the difference
to the server without either, and the quarter and three quarters of it.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.serving import served, unit_vectors, write_embedder  # noqa: E402
from benchmarks.serving_load import Client, children, cpu_seconds, wait_until_ready  # noqa: E402
from serving.keyring import Keyring  # noqa: E402
from serving.keys import keys_path, opened  # noqa: E402
from serving.scopes import Scope  # noqa: E402
from serving.settings import from_values  # noqa: E402

HEAD = (
    "POST {} HTTP/1.1\r\nHost: 127.0.0.1\r\nX-API-Key: {}\r\n"
    "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n"
)
SERVERS = {"without": (False, False), "keys": (True, False), "keys and audit log": (True, True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--keys", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        token = make_keys(keys_path(folder / "store"), options.keys)
        alone(folder / "store", token)
        tokens = {"without": "none"}
        embedder, processes = write_embedder(folder / "embedder"), {}
        for server, (keys, audit) in SERVERS.items():
            before, store = children(), folder / server
            if keys:
                tokens[server] = make_keys(keys_path(store), options.keys)
            with variables(HYPERSPHERE_AUDIT=str(folder / "log") if audit else None):
                address = stack.enter_context(served(ROOT, embedder, store))
            processes[server] = (address, next(iter(children() - before)))
            wait_until_ready(address)
        whole(processes, options, tokens)


def make_keys(path: Path, count: int) -> str:
    """The last one made."""
    with opened(path, make=True) as file:
        for _ in range(count):
            token = file.create("a benchmark", [Scope.READ, Scope.ENROL], rate=1e6, burst=10**6)
    return token


@contextmanager
def variables(**values: str | None) -> Iterator[None]:
    os.environ.update({name: value for name, value in values.items() if value})
    try:
        yield
    finally:
        for name in values:
            os.environ.pop(name, None)


def alone(store: Path, token: str, repeats: int = 20_000) -> None:
    operator = "a-key-of-the-operator"
    ring = Keyring(from_values({"embedder": "e", "store": store, "api_key": operator, "wrong_keys_a_minute": 10**9}))
    print("| key | µs of CPU a check |\n|---|---:|")
    for name, key in (("the operator's", operator), ("of the file, with a rate", token)):
        headers = {b"authorization": f"Bearer {key}".encode()}
        rounds = []
        for _ in range(9):
            start = time.process_time()
            for _ in range(repeats):
                ring._looked = time.monotonic()  # nothing watches the file here
                ring.check(headers, "127.0.0.1")
            rounds.append((time.process_time() - start) / repeats * 1e6)
        print(f"| {name} | {statistics.median(rounds):.1f} |")


def whole(processes: dict[str, tuple[tuple[str, int], int]], options: argparse.Namespace, keys: dict[str, str]) -> None:
    print("\n| request | server | ms of CPU | more than without, ms | ms to the answer |\n|---|---|---:|---:|---:|")
    vectors = unit_vectors(options.requests, seed=3).tolist()
    for number, kind in enumerate(("identify", "enrol")):
        cpu = {name: list[float]() for name in processes}
        taken = {name: list[float]() for name in processes}
        for turn in range(options.rounds + 1):
            for name, (address, pid) in processes.items():
                texts = requests(kind, vectors, keys[name], number * 100 + turn)
                spent, times = asyncio.run(one_round(address, pid, texts))
                if turn:  # the first warms up
                    cpu[name].append(spent)
                    taken[name] += times
        for name in processes:
            more = [one - base for one, base in zip(cpu[name], cpu["without"], strict=True)]
            low, middle, high = statistics.quantiles(more, n=4) if name != "without" else (0.0, 0.0, 0.0)
            figures = f"{statistics.median(cpu[name]):.3f} | {middle:+.3f} ({low:+.3f} to {high:+.3f})"
            print(f"| {kind} | {name} | {figures} | {statistics.median(taken[name]) * 1e3:.2f} |")


def requests(kind: str, vectors: list[list[float]], key: str, turn: int) -> list[bytes]:
    texts = []
    for number, vector in enumerate(vectors):
        if kind == "identify":
            target, body = "/v1/identify", json.dumps({"embedding": vector})
        else:
            target, body = f"/v1/subjects/s{turn}-{number}/samples", json.dumps({"embeddings": [vector]})
        texts.append((HEAD.format(target, key, len(body)) + body).encode())
    return texts


async def one_round(address: tuple[str, int], pid: int, texts: list[bytes]) -> tuple[float, list[float]]:
    client, times, start = await Client.open(address), [], cpu_seconds(pid)
    for text in texts:
        sent = time.perf_counter()
        status = await client.send(text)
        times.append(time.perf_counter() - sent)
        assert status in (200, 201), status
    spent = (cpu_seconds(pid) - start) / len(texts) * 1e3
    client.close()
    return spent, times


if __name__ == "__main__":
    main()
