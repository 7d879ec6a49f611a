"""What is gained by computing the rows' gradient beside the backbone's backward, and by stepping the rows there.

    python benchmarks/head_overlap.py --classes 100000 --batch 256 --dim 512
    unshare --net python benchmarks/head_overlap.py --rate 1gbit          # as root: ranks with a slow link between them

The backbone waits for the gradient of its embeddings alone (product 2), so product 3 and the rows' step may come later:
beside its backward, whose gradients travel between the ranks. *after* is what the training loop does, all of the head
and then the backbone; *beside* is the same step with product 3 and the rows' step in a thread of their own (on a GPU:
in a stream of their own) that begins with the backbone's backward. *alone* is a step without them, which no overlap can
beat. The backbone is a perceptron under torch's data-parallel wrapper, which sends its gradients as they come.

Printed are medians of interleaved steps, and whether both ways gave the same rows to the last bit.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.distributed import Group, sum_not_mean
from trainer.head import Head, HeadOptimizer, tiles
from trainer.head.settings import HeadConfig
from trainer.losses import ArcFace

WAYS = ("after", "beside", "alone")
RATE = 1e-3


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--classes", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=256, help="samples of all ranks together")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=4096, help="units of the backbone's two hidden layers")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rate", help="limit the loopback to it, such as 1gbit; in a network of one's own only")
    parser.add_argument("--repeats", type=int, default=7)
    return parser.parse_args()


class Later(tiles.Tiles):
    """Tiles that give the embeddings' gradient back first and leave product 3 to `rest`."""

    rest: Callable[[], None] | None = None

    def backward(self, dresult_B: Tensor, dcentres_BKD: Tensor, down_B: Tensor) -> tuple[Tensor, None, None]:
        self.finite_B, self.dresult_B = self.result_B, dresult_B
        de_BD = self._embeddings_of(torch.arange(len(self.e_BD), device=self.e_BD.device))
        type(self).rest = lambda: self._rows(dcentres_BKD)
        return de_BD, None, None

    @torch.no_grad()
    def _rows(self, dcentres_BKD: Tensor) -> None:
        K, add = self.plan.centres, self.sink.begin(self.rows)
        re_BD = (self.e_BD * self.dresult_B[:, None]).to(self.plan.dtype)
        for start, stop in self.plan.tiles():
            tile = self._tile(start, stop)
            self._row_gradient(self.sink.tile(start * K, stop * K), self._factors(tile), re_BD, add, tile)
        self._add_own(self.sink.tile(0, self.plan.classes * K), dcentres_BKD, 0, self.plan.classes)
        self.sink.end(self.rows)
        assert self.kept_RB is not None
        self.memory.give_back("P", self.kept_RB)


class Way:
    """One of `WAYS`, with a backbone and a head of its own, equal at the start."""

    def __init__(self, name: str, options: argparse.Namespace, device: torch.device, group: Group) -> None:
        self.name, self.group, self.device = name, group, device
        torch.manual_seed(0)
        H, D = options.hidden, options.dim
        layers = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, H), nn.ReLU(), nn.Linear(H, D)).to(device)
        self.backbone: nn.Module = DistributedDataParallel(layers) if group.size > 1 else layers
        self.head = Head(ArcFace(), options.classes, D, HeadConfig(algorithm="store"), device=device, group=group)
        self.optimizer = HeadOptimizer(self.head)
        generator = torch.Generator().manual_seed(group.rank)
        b = options.batch // group.size
        self.images_bD = torch.randn(b, D, generator=generator).to(device)
        self.labels_b = torch.randint(0, options.classes, (b,), generator=generator).to(device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def step(self) -> None:
        tiles.Tiles = tiles.Tiles if self.name == "after" else Later  # type: ignore[misc]
        x_bD = sum_not_mean(self.backbone(self.images_bD), self.group)
        border_bD = x_bD.detach().requires_grad_()
        self.head.set_progress(0)
        self.head(border_bD, self.labels_b).backward()
        assert border_bD.grad is not None
        thread = self._begin() if self.name == "beside" else None
        x_bD.backward(border_bD.grad)
        if thread is not None:
            thread.join()
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        if self.name == "after":
            self.optimizer.step(RATE)
        self.optimizer.zero_grad()
        self.backbone.zero_grad()

    def _begin(self) -> threading.Thread:
        def work() -> None:
            assert Later.rest is not None
            with torch.cuda.stream(self.stream):
                Later.rest()
                self.optimizer.step(RATE)

        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
        thread = threading.Thread(target=work)
        thread.start()
        return thread


def seconds(way: Way, original: type[tiles.Tiles]) -> float:
    if way.group.size > 1:
        dist.barrier()
    if way.stream is not None:
        torch.cuda.synchronize()
    start = time.perf_counter()
    try:
        way.step()
    finally:
        tiles.Tiles = original  # type: ignore[misc]
    if way.stream is not None:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def run(rank: int, options: argparse.Namespace) -> None:
    device = torch.device(options.device, rank) if options.device == "cuda" else torch.device("cpu")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.ranks))
    if options.ranks > 1:
        backend = "cpu:gloo,cuda:nccl" if options.device == "cuda" else "gloo"
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29517", GLOO_SOCKET_IFNAME="lo")
        dist.init_process_group(backend, rank=rank, world_size=options.ranks)
    group = Group.current()
    ways = [Way(name, options, device, group) for name in WAYS]
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for repeat in range(options.repeats + 1):
        for way in ways:
            taken = seconds(way, tiles.Tiles)
            if repeat:
                times[way.name].append(taken)
    if rank == 0:
        after, beside, alone = (statistics.median(times[name]) for name in WAYS)
        print(f"{'after':>10}{'beside':>10}{'alone':>10}{'beside / after':>16}{'of what could be gained':>26}")
        gained = (after - beside) / (after - alone)
        print(f"{after:10.3f}{beside:10.3f}{alone:10.3f}{beside / after:16.2f}{gained:26.0%}")
        print("the same rows:", torch.equal(ways[0].head.weight, ways[1].head.weight))
    if options.ranks > 1:
        dist.destroy_process_group()


def slow_down(rate: str) -> None:
    """Limit this network's loopback; refused where it is also the machine's, that is, where there are other links."""
    ip, tc = shutil.which("ip"), shutil.which("tc")
    if ip is None or tc is None:
        raise SystemExit("--rate needs the programs ip and tc; install iproute2")
    links = subprocess.run([ip, "-o", "link", "show", "up"], capture_output=True, text=True, check=True).stdout
    if others := [line.split()[1] for line in links.splitlines() if "LOOPBACK" not in line]:
        raise SystemExit(f"--rate would slow this machine's network ({' '.join(others)}); start it by unshare --net")
    subprocess.run([ip, "link", "set", "lo", "up"], check=True)
    limit = [tc, "qdisc", "add", "dev", "lo", "root", "tbf", "rate", rate, "burst", "1mb", "latency", "100ms"]
    subprocess.run(limit, check=True)


def main() -> None:
    options = parse()
    if options.rate:
        slow_down(options.rate)
    if options.ranks == 1:
        run(0, options)
    else:
        multiprocessing.spawn(run, (options,), nprocs=options.ranks)


if __name__ == "__main__":
    main()
