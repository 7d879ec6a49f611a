"""How many images a second the service embeds, beside ONNX Runtime alone on the same cores.

    python benchmarks/serving_images.py [--backbone mobilefacenet] [--clients 1 16] [--seconds 5] [--rounds 3]

Clients on kept connections send a JPEG of 112 x 112 to /v1/embed and ask again as soon as they are answered. *alone* is
a loop that calls the same model on pixels that are decoded already, with as many threads as the service gives it, for
one image at a time or sixteen: whichever is faster. Service and loop take turns, so that a busy machine slows both
alike; figures are medians of the rounds, and the share is the median of the rounds' shares.
"""

import argparse
import asyncio
import io
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.serving import served  # noqa: E402
from benchmarks.serving_load import Client, closed_loop, wait_until_ready  # noqa: E402
from trainer.backbones import build  # noqa: E402
from trainer.config import BackboneConfig  # noqa: E402
from trainer.data.image import Preprocessing  # noqa: E402
from trainer.embedder import MODEL_FILE  # noqa: E402
from trainer.export import export  # noqa: E402
from trainer.onnx import open_session  # noqa: E402

SIDE, BATCH, PICTURES = 112, 16, 64
COLUMNS = ["clients", "images/s", "alone", "share", "decode ms", "embed ms", "batch"]


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        embedder = Path(folder) / "embedder"
        form = Preprocessing(mode="RGB", height=SIDE, width=SIDE)
        backbone = build(BackboneConfig(name=options.backbone, dimension=512), *form.shape_CHW)
        export(backbone, form, embedder, torch.zeros(2, *form.shape_CHW, dtype=torch.uint8).random_(256), {})
        requests = [request(picture(seed)) for seed in range(PICTURES)]
        with served(ROOT, embedder, Path(folder) / "gallery.db") as address:
            wait_until_ready(address)
            rows = [measure(address, embedder, requests, clients, options) for clients in options.clients]
    for row in (COLUMNS, ["---"] * len(COLUMNS), *rows):
        print("| " + " | ".join(row) + " |")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--backbone", default="mobilefacenet")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--seconds", type=float, default=5, help="of each part of a round")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def picture(seed: int) -> bytes:
    """A JPEG with as much in it as a photograph has: smooth, with fine structure."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (9, 9, 3), np.uint8)).resize(
        (SIDE, SIDE), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(coarse, float) + generator.normal(scale=8, size=(SIDE, SIDE, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=92)
    return file.getvalue()


def request(image: bytes) -> bytes:
    start = b'--edge\r\nContent-Disposition: form-data; name="images"; filename="a.jpg"\r\n\r\n'
    body = start + image + b"\r\n--edge--\r\n"
    head = "POST /v1/embed HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=edge\r\n"
    accept = "Accept: application/octet-stream\r\n"
    return f"{head}{accept}Content-Length: {len(body)}\r\n\r\n".encode() + body


def measure(
    address: tuple[str, int], embedder: Path, requests: list[bytes], clients: int, options: argparse.Namespace
) -> list[str]:
    session = open_session((embedder / MODEL_FILE).read_bytes(), len(os.sched_getaffinity(0)))
    pixels_BCHW = np.random.default_rng(0).integers(0, 256, (BATCH, 3, SIDE, SIDE), np.uint8)
    per_s, alone = list[float](), list[float]()
    asyncio.run(ask(address, requests, clients, options.seconds / 2))  # warm
    before = asyncio.run(stages(address))
    for _ in range(options.rounds):
        per_s.append(asyncio.run(ask(address, requests, clients, options.seconds)) / options.seconds)
        alone.append(max(loop(session, pixels_BCHW[:size], options.seconds / 2) for size in (1, BATCH)))
    after = asyncio.run(stages(address))
    share = statistics.median(one / other for one, other in zip(per_s, alone, strict=True))
    mean = {name: (after[name][0] - before[name][0]) / (after[name][1] - before[name][1]) for name in after}
    numbers = [f"{statistics.median(per_s):.1f}", f"{statistics.median(alone):.1f}", f"{share:.2f}"]
    return [str(clients), *numbers, f"{mean['decode'] * 1e3:.1f}", f"{mean['embed'] * 1e3:.1f}", f"{mean['size']:.1f}"]


async def ask(address: tuple[str, int], requests: list[bytes], clients: int, seconds: float) -> int:
    connections = [await Client.open(address) for _ in range(clients)]
    count = await closed_loop(connections, requests, seconds)
    for connection in connections:
        connection.close()
    return count


def loop(session: object, pixels_BCHW: np.ndarray, seconds: float) -> float:
    """Images a second."""
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        session.run(["embeddings"], {"images": pixels_BCHW})  # type: ignore[attr-defined]
        count += len(pixels_BCHW)
    return count / (time.perf_counter() - start)


async def stages(address: tuple[str, int]) -> dict[str, tuple[float, float]]:
    """Sum and count of what the service timed: seconds of a stage, and crops of a call."""
    await asyncio.sleep(0.2)  # the text is written ten times a second
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()

    def value(name: str, label: str) -> float:
        found = re.search(rf'^hypersphere_{name}{{stage="{label}"}} (\S+)$', text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    names = {
        "decode": ("stage_seconds", "decode"),
        "embed": ("stage_seconds", "embed"),
        "size": ("batch_size", "embed"),
    }
    return {key: (value(f"{name}_sum", label), value(f"{name}_count", label)) for key, (name, label) in names.items()}


if __name__ == "__main__":
    main()
