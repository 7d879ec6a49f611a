"""How fast the service answers one client who keeps its connection, beside another checkout in the same run.

    python benchmarks/serving.py [--against PATH] [--gallery 10000] [--requests 400] [--rounds 5] [--json FILE]

Identify by an embedding of 512 numbers: in an empty gallery, and among --gallery vectors. The servers of both checkouts
are up at the same time and are asked in turn, a round each, so that a busy machine slows both alike. The Embedder is
made up and never computes. With --against the other checkout runs with this one's libraries.
"""

import argparse
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from trainer.data.image import Preprocessing  # noqa: E402
from trainer.embedder import EmbedderManifest, model_id, write_manifest  # noqa: E402

DIMENSION, SIDE = 512, 8
PER_REQUEST, PER_SUBJECT = 32, 96  # vectors; the service's defaults allow 32 and 100
START_S = 120
COLUMNS = ["checkout", "vectors enrolled", "p50 ms", "p95 ms", "p99 ms", "requests/s", "p50 of the rounds"]


def main() -> None:
    options = _options()
    checkouts = {"here": ROOT} | ({"against": options.against.resolve()} if options.against else {})
    rows = []
    for vectors in (0, options.gallery):
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            embedder = write_embedder(Path(folder) / "embedder")
            addresses = {
                name: stack.enter_context(served(path, embedder, Path(folder) / f"{name}.sqlite"))
                for name, path in checkouts.items()
            }
            clients: dict[str, socket.socket] = {}
            for name, address in addresses.items():
                clients[name] = stack.enter_context(connected(address))
                fill(clients[name], vectors)
                ask(clients[name], options.requests // 4)  # warm
            seconds: dict[str, list[list[float]]] = {name: [] for name in clients}
            for _ in range(options.rounds):
                for name, client in clients.items():
                    seconds[name].append(ask(client, options.requests))
        rows += [figures(name, vectors, rounds) for name, rounds in seconds.items()]
    for row in (COLUMNS, ["---"] * len(COLUMNS), *rows):
        print("| " + " | ".join(row) + " |")
    if options.json:
        options.json.write_text(json.dumps([dict(zip(COLUMNS, row, strict=True)) for row in rows], indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--against", type=Path, help="another checkout of the project")
    parser.add_argument("--gallery", type=int, default=10_000, help="vectors in the full gallery")
    parser.add_argument("--requests", type=int, default=400, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def write_embedder(folder: Path) -> Path:
    """An Embedder of DIMENSION numbers, with weights that mean nothing."""
    folder.mkdir()
    weights = unit_vectors(SIDE * SIDE, seed=1)
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["floats"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "weights"], ["projected"]),
        helper.make_node("LpNormalization", ["projected"], ["embeddings"], axis=1, p=2),
    ]
    graph = helper.make_graph(
        nodes,
        "made up",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", 1, SIDE, SIDE])],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["B", DIMENSION])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    content = model.SerializeToString()
    (folder / "model.onnx").write_bytes(content)
    form = Preprocessing(mode="L", height=SIDE, width=SIDE)
    manifest = EmbedderManifest(model_id=model_id(content, form), dimension=DIMENSION, preprocessing=form)
    write_manifest(folder, manifest)
    return folder


@contextmanager
def served(checkout: Path, embedder: Path, store: Path) -> Iterator[tuple[str, int]]:
    """The address of the service of a checkout, started by its command line."""
    command = [sys.executable, "-m", "serving.cli", "serve", "--embedder", str(embedder), "--store", str(store)]
    command += ["--port", "0", "--verify-threshold", "0.5", "--identify-threshold", "0.5"]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield _address(process)
        finally:
            process.terminate()


def _address(process: subprocess.Popen[str]) -> tuple[str, int]:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Serving on http://"):
            host, port = line.removeprefix("Serving on http://").split(";")[0].split(":")
            return host, int(port)
    raise SystemExit("the service did not start")


def connected(address: tuple[str, int]) -> socket.socket:
    wire = socket.create_connection(address, timeout=START_S)
    wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return wire


def unit_vectors(count: int, seed: int) -> NDArray[np.float32]:
    x_BD = np.random.default_rng(seed).normal(size=(count, DIMENSION)).astype(np.float32)
    unit_BD: NDArray[np.float32] = x_BD / np.linalg.norm(x_BD, axis=1, keepdims=True)
    return unit_BD


def fill(wire: socket.socket, vectors: int) -> None:
    """Enrol so many vectors, PER_SUBJECT a subject."""
    x_ND = unit_vectors(vectors, seed=2)
    for start in range(0, vectors, PER_REQUEST):
        body = {"embeddings": x_ND[start : start + PER_REQUEST].tolist()}
        target = f"/v1/subjects/s{start // PER_SUBJECT}/samples"
        for method in ("POST", "PUT"):  # PUT: of checkouts before POST
            status = _status(wire, method, target, json.dumps(body).encode())
            if status != 405:
                break
        if status != 201:
            raise SystemExit(f"an enrolment was answered {status}")


def ask(wire: socket.socket, requests: int) -> list[float]:
    """Seconds of each answer."""
    bodies = [json.dumps({"embedding": row.tolist()}).encode() for row in unit_vectors(50, seed=3)]
    seconds = []
    for number in range(requests):
        start = time.perf_counter()
        status = _status(wire, "POST", "/v1/identify", bodies[number % len(bodies)])
        seconds.append(time.perf_counter() - start)
        if status != 200:
            raise SystemExit(f"a search was answered {status}")
    return seconds


def _status(wire: socket.socket, method: str, target: str, body: bytes) -> int:
    """Head and body in one write, as most clients send them."""
    head = f"{method} {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    wire.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    answer = http.client.HTTPResponse(wire, method=method)
    answer.begin()
    answer.read()
    return answer.status


def figures(name: str, vectors: int, rounds: Sequence[Sequence[float]]) -> list[str]:
    """A row of the table: quantiles of all rounds, and the medians of the rounds, which show how steady they were."""
    milliseconds = np.concatenate([np.asarray(seconds) for seconds in rounds]) * 1000
    quantiles = [f"{quantile:.2f}" for quantile in np.percentile(milliseconds, [50, 95, 99])]
    medians = " ".join(f"{statistics.median(seconds) * 1000:.2f}" for seconds in rounds)
    return [name, str(vectors), *quantiles, f"{1000 / milliseconds.mean():.0f}", medians]


if __name__ == "__main__":
    main()
