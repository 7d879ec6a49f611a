"""How many classes fit: a few full-softmax training steps with the centres stepped inside the backward.

    python benchmarks/head_scale.py --classes 4000000 --batch 64 --weights fp32 --state fp32
    python benchmarks/head_scale.py --device cuda --classes 10000000 --batch 1024 --dtype bf16 --algorithm store

Without --algorithm store nothing of size [B, C] and no gradient [C, D] is stored, so that memory is the centres and the
optimizer's state: 4 + 4 bytes a number in fp32, 2 + 1 with bf16 centres and int8 momentum. Every step has the same
batch, so that its loss must fall. Prints seconds a step and the highest memory; fails if the loss does not fall. With
--graph on a GPU a step (forward and backward) is also captured in a CUDA graph; the time of its replay is printed, and
by how much its gradient differs.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from trainer.head import Head, HeadOptimizer
from trainer.head.matmul import free_memory
from trainer.head.settings import HeadConfig, HeadOptimizerConfig
from trainer.losses import ArcFace

BYTES = {"fp32": 4, "bf16": 2, "int8": 1}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--algorithm", choices=["recompute", "store"], default="recompute")
    parser.add_argument("--unfused", action="store_true", help="step the centres after the backward")
    parser.add_argument("--graph", action="store_true")
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
    check_memory(options)
    torch.set_num_threads(options.threads)
    config = HeadConfig(
        algorithm=options.algorithm,
        fused=not options.unfused,
        param_dtype=options.weights,
        compute_dtype=options.dtype,
        sample_rate=options.sample_rate,
        optimizer=HeadOptimizerConfig(state_dtype=options.state),
    )
    start = time.perf_counter()
    head = Head(ArcFace(), options.classes, options.dim, config, device=options.device)
    optimizer = HeadOptimizer(head)
    wait(options)
    print(f"made in {time.perf_counter() - start:.1f} s")
    generator = torch.Generator().manual_seed(0)
    x_BD = torch.randn(options.batch, options.dim, generator=generator).to(options.device).requires_grad_()
    labels_B = torch.randint(0, options.classes, (options.batch,), generator=generator).to(options.device)
    losses: list[float] = []
    for step in range(options.steps):
        head.set_progress(step)
        start = time.perf_counter()
        optimizer.prepare(options.lr)
        loss = head(x_BD, labels_B)
        loss.backward()
        optimizer.step(options.lr)
        optimizer.zero_grad()
        wait(options)
        taken = time.perf_counter() - start
        losses.append(float(loss.detach()))
        print(f"step {step}: loss {losses[-1]:.4f}, {taken:.4g} s", flush=True)
    peak = torch.cuda.max_memory_allocated() if options.device == "cuda" else resident()
    print(f"highest memory {peak / 1e9:.2f} GB, {peak / options.classes:.0f} bytes a class")
    del loss  # with it the graph of the last step, which belongs to another stream
    if options.graph:
        replay(head, x_BD, labels_B)
    if len(losses) > 1 and losses[0] <= losses[-1]:
        sys.exit("the loss did not fall")


def check_memory(options: argparse.Namespace) -> None:
    size = BYTES[options.weights] + BYTES[options.state] + options.unfused * BYTES[options.weights]
    needed = options.classes * options.dim * size + 5e8
    if options.algorithm == "store":
        needed += options.classes * options.batch * BYTES[options.dtype]
    available = free_memory(torch.device(options.device))
    if needed > available:
        sys.exit(f"{needed / 1e9:.1f} GB are needed and {available / 1e9:.1f} GB are available: choose fewer classes")


def replay(head: Head, x_BD: torch.Tensor, labels_B: torch.Tensor) -> None:
    """A step captured whole: it asks nothing of the host."""
    if head.config.fused:
        sys.exit("--graph captures a forward and backward: add --unfused")

    def step() -> None:
        head.weight.grad = x_BD.grad = None
        head(x_BD, labels_B).backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x_BD = x_BD.detach().clone().requires_grad_()
        for _ in range(3):
            step()
        assert x_BD.grad is not None
        wanted = x_BD.grad.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            step()
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    assert x_BD.grad is not None
    difference = float((x_BD.grad - wanted).norm() / wanted.norm())
    print(f"replay of a graph: {statistics.median(times):.4g} s; its gradient differs by {difference:.1e} (relative)")


def wait(options: argparse.Namespace) -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()


def resident() -> int:
    """The highest memory of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
