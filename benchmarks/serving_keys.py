"""What keys and the audit log cost the service: CPU of a request with them and without.

    python benchmarks/serving_keys.py [--keys 1000] [--requests 200] [--rounds 15]

The first table is the check of a key on the CPU clock of its thread: again and again, and within requests, where the
processor's caches are cold. The second is of whole requests, identify by an embedding and enrolment of one, handed to
the app without a socket: three services in this process are asked in turn,
some requests each, on the same clock, which counts their threads, too. What is told is the median over the rounds of
the difference to the service without either, and the quarter and three quarters of it.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.serving import unit_vectors, write_embedder  # noqa: E402
from serving.access.keyring import Keyring  # noqa: E402
from serving.access.keys import keys_path, opened  # noqa: E402
from serving.access.scopes import Scope  # noqa: E402
from serving.api import create_app  # noqa: E402
from serving.settings import from_values  # noqa: E402

SERVERS = {"without": (False, False), "keys": (True, False), "keys and audit log": (True, True)}
App = Callable[[Any, Any, Any], Awaitable[None]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--keys", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone(folder / "store", make_keys(keys_path(folder / "store"), options.keys))
        asyncio.run(whole(folder, options))


def make_keys(path: Path, count: int) -> str:
    """The last one made."""
    with opened(path, make=True) as file:
        for _ in range(count):
            token = file.create("a benchmark", [Scope.READ, Scope.ENROL], rate=1e6, burst=10**6)
    return token


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


async def whole(folder: Path, options: argparse.Namespace) -> None:
    embedder, tokens, apps = write_embedder(folder / "embedder"), {"without": "none"}, {}
    async with AsyncExitStack() as stack:
        for server, (keys, audit) in SERVERS.items():
            if keys:
                tokens[server] = make_keys(keys_path(folder / server), options.keys)
            values = {"embedder": embedder, "store": folder / server, "audit": folder / "log" if audit else None}
            thresholds = {"verify_threshold": 0.5, "identify_threshold": 0.5}
            app = create_app(from_values({**values, **thresholds}))
            await stack.enter_async_context(app.router.lifespan_context(app))
            while await ask(app, "GET", "/readyz", b"", "") != 200:
                await asyncio.sleep(0.05)
            apps[server] = app
        await within(apps["keys"], tokens["keys"], options.requests * 3)
        print("\n| request | service | ms of CPU | more than without, ms |\n|---|---|---:|---:|")
        for kind in ("identify", "enrol"):
            await compared(kind, apps, tokens, options)


async def within(app: App, token: str, count: int) -> None:
    """The check of a key between everything else that a request needs."""
    spent, check = list[int](), Keyring.check

    def timed(*given: Any) -> Any:
        start = time.thread_time_ns()
        caller = check(*given)
        spent.append(time.thread_time_ns() - start)
        return caller

    body = json.dumps({"embedding": unit_vectors(1, seed=3)[0].tolist()}).encode()
    with mock.patch.object(Keyring, "check", timed):
        for _ in range(count):
            assert await ask(app, "POST", "/v1/identify", body, token) == 200
    print(f"| of the file, within a request | {statistics.median(spent) / 1e3:.1f} |")


async def compared(kind: str, apps: dict[str, App], tokens: dict[str, str], options: argparse.Namespace) -> None:
    vectors = unit_vectors(options.requests, seed=3).tolist()
    cpu = {name: list[float]() for name in apps}
    for turn in range(options.rounds + 1):
        for name, app in random.sample(list(apps.items()), len(apps)):  # none always comes first
            start = time.process_time()
            for number, vector in enumerate(vectors):
                target = "/v1/identify" if kind == "identify" else f"/v1/subjects/s{turn}-{number}/samples"
                body = {"embedding": vector} if kind == "identify" else {"embeddings": [vector]}
                status = await ask(app, "POST", target, json.dumps(body).encode(), tokens[name])
                assert status in (200, 201), status
            if turn:  # the first warms up
                cpu[name].append((time.process_time() - start) / len(vectors) * 1e3)
    for name, spent in cpu.items():
        more = [one - base for one, base in zip(spent, cpu["without"], strict=True)]
        low, middle, high = statistics.quantiles(more, n=4)
        told = "" if name == "without" else f"{middle:+.3f} ({low:+.3f} to {high:+.3f})"
        print(f"| {kind} | {name} | {statistics.median(spent):.3f} | {told} |")


async def ask(app: App, method: str, path: str, body: bytes, key: str) -> int:
    """The status of the answer to one request."""
    headers = [(b"host", b"x"), (b"content-type", b"application/json"), (b"x-api-key", key.encode())]
    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": headers, "client": ("127.0.0.1", 1), "server": ("x", 80), "scheme": "http", "root_path": ""}
    status = 0

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)

    await app(scope | {"http_version": "1.1", "state": {}}, receive, send)
    return status


if __name__ == "__main__":
    main()
