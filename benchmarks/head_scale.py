"""How many classes fit: a few full-softmax training steps with the centres stepped inside the backward.

    python benchmarks/head_scale.py --classes 4000000 --batch 64 --weights fp32 --state fp32

Nothing of size [B, C] and no gradient [C, D] is stored, so that memory is the centres and the optimizer's state:
4 + 4 bytes a number in fp32, 2 + 1 with bf16 centres and int8 momentum. Every step has the same batch, so that its loss
must fall. Prints seconds a step and the highest memory; fails if the loss does not fall.
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from trainer.head import Head, HeadOptimizer
from trainer.head.settings import HeadConfig, HeadOptimizerConfig
from trainer.losses import ArcFace

BYTES = {"fp32": 4, "bf16": 2, "int8": 1}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--classes", type=int, default=4_000_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--weights", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--state", choices=list(BYTES), default="fp32")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the products")
    parser.add_argument("--sample-rate", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    options = parse()
    needed = options.classes * options.dim * (BYTES[options.weights] + BYTES[options.state]) + 5e8
    available = _kilobytes("/proc/meminfo", "MemAvailable") * 1024
    if needed > available:
        sys.exit(f"{needed / 1e9:.1f} GB are needed and {available / 1e9:.1f} GB are available: choose fewer classes")
    torch.set_num_threads(options.threads)
    config = HeadConfig(
        algorithm="recompute",
        fused=True,
        param_dtype=options.weights,
        compute_dtype=options.dtype,
        sample_rate=options.sample_rate,
        optimizer=HeadOptimizerConfig(state_dtype=options.state),
    )
    start = time.perf_counter()
    head = Head(ArcFace(), options.classes, options.dim, config)
    optimizer = HeadOptimizer(head)
    print(f"made in {time.perf_counter() - start:.1f} s")
    generator = torch.Generator().manual_seed(0)
    x_BD = torch.randn(options.batch, options.dim, generator=generator, requires_grad=True)
    labels_B = torch.randint(0, options.classes, (options.batch,), generator=generator)
    losses: list[float] = []
    for step in range(options.steps):
        head.set_progress(step)
        start = time.perf_counter()
        optimizer.prepare(options.lr)
        loss = head(x_BD, labels_B)
        loss.backward()
        optimizer.step(options.lr)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        print(f"step {step}: loss {losses[-1]:.4f}, {time.perf_counter() - start:.1f} s", flush=True)
    peak = _kilobytes(f"/proc/{os.getpid()}/status", "VmHWM") * 1024
    print(f"highest memory {peak / 1e9:.2f} GB, {peak / options.classes:.0f} bytes a class")
    if sorted(losses, reverse=True) != losses:
        sys.exit("the loss did not fall at every step")


def _kilobytes(path: str, key: str) -> int:
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])


if __name__ == "__main__":
    main()
