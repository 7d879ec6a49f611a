"""A tiny real Embedder, and the real server in a process of its own."""

import io
import json
import os
import queue
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from trainer.data.image import Preprocessing
from trainer.embedder import EmbedderManifest, model_id, write_manifest
from trainer.evaluation.report import Calibration, Threshold

SIDE, DIMENSION = 16, 32
SERVE = (
    "import json, sys; from serving.server.process import run; from serving.settings import from_values; "
    "run(from_values(json.loads(sys.argv[1])), '127.0.0.1', 0)"
)


def onnx_model(seed: int = 0, normalise: bool = True) -> onnx.ModelProto:
    """uint8 [B, 1, 16, 16] to [B, 32]: each image less its mean, a fixed random projection, length 1."""
    weights = np.random.default_rng(seed).normal(size=(SIDE * SIDE, DIMENSION)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["floats"], ["flat"], axis=1),
        helper.make_node("ReduceMean", ["flat", "axes"], ["mean"], keepdims=1),
        helper.make_node("Sub", ["flat", "mean"], ["centred"]),
        helper.make_node("MatMul", ["centred", "weights"], ["projected"]),
        helper.make_node("LpNormalization", ["projected"], ["embeddings"], axis=1, p=2)
        if normalise
        else helper.make_node("Identity", ["projected"], ["embeddings"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", 1, SIDE, SIDE])],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["B", DIMENSION])],
        [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(np.array([1], np.int64), "axes")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def write_embedder(folder: Path, model: onnx.ModelProto, calibrated: bool = True) -> Path:
    folder.mkdir(parents=True)
    content = model.SerializeToString()
    (folder / "model.onnx").write_bytes(content)
    form = Preprocessing(mode="L", height=SIDE, width=SIDE)
    identity = model_id(content, form)
    common = {"rate": 0.01, "low": 0.005, "high": 0.02, "probes": 900, "subjects": 300, "model_id": identity}
    verify = Threshold(value=0.6, target="FMR", source="a test", **common)
    identify = Threshold(value=0.7, target="FPIR", gallery_size=4, source="a test", **common)
    calibration = Calibration(verify=verify, identify=identify) if calibrated else None
    write_manifest(
        folder,
        EmbedderManifest(model_id=identity, dimension=DIMENSION, preprocessing=form, calibration=calibration),
    )
    return folder


def png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def photo(identity: int, sample: int = 0) -> bytes:
    """A picture of an identity; pictures of one are alike, pictures of two are not."""
    face = np.random.default_rng(identity).integers(0, 256, (SIDE, SIDE)).astype(float)
    face += np.random.default_rng((identity, sample)).normal(scale=15, size=face.shape)
    return png(face.clip(0, 255).astype(np.uint8))


def unit_vectors(count: int, seed: int = 0, dimension: int = DIMENSION) -> NDArray[np.float32]:
    x_BD = np.random.default_rng(seed).normal(size=(count, dimension))
    return (x_BD / np.linalg.norm(x_BD, axis=1, keepdims=True)).astype(np.float32)


class Server:
    """`serving.server.process.run` in a process; `http` speaks to it."""

    def __init__(self, **settings: object) -> None:
        self.store = settings["store"]
        values = json.dumps({name: str(v) if isinstance(v, Path) else v for name, v in settings.items()})
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, values],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.output: list[str] = []
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self._wait_for_url()
        cert = settings.get("tls_cert")
        self.trust: ssl.SSLContext | bool = ssl.create_default_context(cafile=str(cert)) if cert else True
        self.http = self.client()
        self._wait_until_loaded()

    def _wait_until_loaded(self) -> None:
        end = time.monotonic() + 60
        while self.http.get("/readyz").status_code == 503 and time.monotonic() < end:
            time.sleep(0.01)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line)
            self._lines.put(line)

    def _wait_for_url(self) -> str:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                line = self._lines.get(timeout=0.2)
            except queue.Empty:
                if self.process.poll() is not None:
                    break
                continue
            if line.startswith("Serving on "):
                return line.split()[2].rstrip(";")
        self.http = httpx.Client()
        self.kill()
        raise AssertionError(f"the server did not start:\n{''.join(self.output)}")

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, verify=self.trust)

    def kill(self) -> None:
        """As a power cut would: no chance to tidy up."""
        self.end(signal.SIGKILL)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(timeout=60)
        self._reader.join(timeout=10)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.http.close()
        return code


@pytest.fixture(scope="session")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated Embedder folder: verify at 0.6, identify at 0.7 in a gallery of 4."""
    return write_embedder(tmp_path_factory.mktemp("embedder") / "tiny", onnx_model())


@pytest.fixture(scope="session")
def make_embedder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def make(seed: int = 0, calibrated: bool = True, normalise: bool = True) -> Path:
        return write_embedder(tmp_path_factory.mktemp("embedder") / "tiny", onnx_model(seed, normalise), calibrated)

    return make


@pytest.fixture(scope="session")
def photos() -> Callable[..., bytes]:
    return photo


@pytest.fixture(scope="session")
def vectors() -> Callable[..., NDArray[np.float32]]:
    return unit_vectors


@pytest.fixture(scope="module")
def server(embedder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the tests of a file that do not mind each other's subjects."""
    running = Server(embedder=embedder, store=tmp_path_factory.mktemp("store") / "gallery.db")
    yield running
    code = running.end()
    assert code == 0, "".join(running.output)


@pytest.fixture(scope="module")
def strict(embedder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with narrow limits."""
    store = tmp_path_factory.mktemp("store") / "gallery.db"
    limits = {"max_body_bytes": 100_000, "body_timeout_s": 0.5, "max_images": 3, "max_samples": 4}
    running = Server(embedder=embedder, store=store, **limits)
    yield running
    running.kill()


@pytest.fixture
def serve(embedder: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers; what is still running at the end of the test is killed."""
    started: list[Server] = []

    def start(**settings: object) -> Server:
        started.append(Server(**{"embedder": embedder, "store": tmp_path / "gallery.db", **settings}))
        return started[-1]

    yield start
    for server in started:
        if server.process.stdout is not None and not server.process.stdout.closed:
            server.kill()
