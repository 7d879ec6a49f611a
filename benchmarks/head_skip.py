"""What leaving learned samples out of the backward spares, from the start of a training to its end.

    python benchmarks/head_skip.py --classes 50000 --batch 256 --dim 512

A small network learns made-up identities: each is a point in 64 dimensions, its samples lie around it, some near and
some far, and 64 more dimensions have nothing to do with who it is. After so many steps one new batch is taken, and a
step of each of these is timed in turn: the three matrix products alone (the floor), *store*, and *store* with
`head.skip_tolerance`. Printed are medians, the share of the samples that product 3 took, and the true errors of the
embeddings' gradient and of the rows' (without the part along the row), targets included, beside the exact step's.

So that this takes minutes, the network is trained on the first 2,000 identities, and all centres are then put where it
puts their identities' points; training takes them there too, and cannot do much better. Before the first step they are
random, as a head's are.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.head_contenders import Floor, Ours, Problem
from trainer.distributed import Group
from trainer.head import Head, HeadOptimizer, tiles
from trainer.head.settings import HeadConfig
from trainer.losses import ArcFace

LATENT = 64  # dimensions in which the identities differ, and as many in which they do not
LEARNED = 2000  # identities that the network is trained on
STAGES = (0, 20, 35, 50, 100, 200)  # steps after which a batch is measured


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--classes", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of what is timed")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument(
        "--spread", type=float, default=0.5, help="of an identity's farthest samples, beside that of all"
    )
    parser.add_argument("--stages", type=int, nargs="+", default=STAGES, help="steps after which a batch is measured")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="one: others' work on the machine counts least")
    return parser.parse_args()


class Identities:
    """Points of a normal distribution, and samples around them, as far as chance has it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.points_CL = self._normal(options.classes)

    def batch(self, classes: int) -> tuple[Tensor, Tensor]:
        """Samples of the first so many classes, and their labels."""
        size = self.options.batch
        labels_B = torch.randint(0, classes, (size,), generator=self.generator, device=self.device)
        away_B1 = torch.rand(size, 1, generator=self.generator, device=self.device) * self.options.spread
        return torch.cat([self.points_CL[labels_B] + away_B1 * self._normal(size), self._normal(size)], 1), labels_B

    def _normal(self, count: int) -> Tensor:
        return torch.randn(count, LATENT, generator=self.generator, device=self.device)


class Training:
    """A network, the head that it is trained with, and centres for all classes."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.options, self.identities = options, Identities(options)
        D, device = options.dim, options.device
        layers = (nn.Linear(2 * LATENT, D), nn.BatchNorm1d(D), nn.PReLU(D), nn.Linear(D, D), nn.BatchNorm1d(D))
        self.network = nn.Sequential(*layers).to(device)
        self.stepping = torch.optim.SGD(self.network.parameters(), 0.02, momentum=0.9)
        self.head = Head(ArcFace(), min(LEARNED, options.classes), D, HeadConfig(), device=device)
        self.optimizer = HeadOptimizer(self.head)
        self.rows_CD = functional.normalize(torch.randn(options.classes, D, device=device))

    @torch.no_grad()
    def place_centres(self) -> None:
        self.network.eval()
        for start in range(0, self.options.classes, 8192):
            points_nL = self.identities.points_CL[start : start + 8192]
            centres_nD = self.network(torch.cat([points_nL, torch.zeros_like(points_nL)], 1))
            self.rows_CD[start : start + 8192] = functional.normalize(centres_nD)
        self.network.train()

    def step(self) -> None:
        x_BL, labels_B = self.identities.batch(self.head.classes)
        self.head(self.network(x_BL), labels_B).backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
        self.stepping.step()
        self.optimizer.step(0.3)
        self.stepping.zero_grad()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def problem(self) -> Problem:
        x_BL, labels_B = self.identities.batch(self.options.classes)
        x_BD = self.network.eval()(x_BL)
        self.network.train()
        dtype = torch.bfloat16 if self.options.dtype == "bf16" else torch.float32
        return Problem(x_BD, labels_B, self.rows_CD, self.options.classes, dtype, Group())


class Skipping(Ours):
    """*store* that leaves out samples; counts those that it keeps."""

    def __init__(self, problem: Problem, tolerance: float) -> None:
        super().__init__(problem, "store")
        self.name = "skipping"
        self.head.config = replace(self.head.config, skip_tolerance=tolerance)


def kept_share(contender: Skipping) -> float:
    """Of the samples that product 3 takes."""
    found: list[float] = []
    choose = tiles.Tiles._kept

    def watched(self: tiles.Tiles, dcentres_BKD: Tensor) -> tiles.Kept | None:
        kept = choose(self, dcentres_BKD)
        found.append(1.0 if kept is None else len(kept.samples_n) / len(self.e_BD))
        return kept

    tiles.Tiles._kept = watched  # type: ignore[method-assign]
    try:
        contender.step()
    finally:
        tiles.Tiles._kept = choose  # type: ignore[method-assign]
    contender.clear()
    return found[0]


def seconds(contender: Floor | Ours) -> float:
    """On a CPU the processor's, which other work on the machine does not count in."""
    cuda = contender.problem.x_bD.is_cuda
    clock = time.perf_counter if cuda else time.process_time
    if cuda:
        torch.cuda.synchronize()
    start = clock()
    contender.step()
    if cuda:
        torch.cuda.synchronize()
    return clock() - start


def error(near: Ours, exact: Ours) -> tuple[float, float]:
    """Relative, of dx and of dW."""
    found = []
    for contender in (near, exact):
        contender.step()
        rows_RD = contender.rows_gradient()
        assert contender.dx_bD is not None
        assert rows_RD is not None
        found.append((contender.dx_bD.clone(), rows_RD))
        contender.clear()
    (dx_bD, dw_RD), (exact_bD, exact_RD) = found
    return float((dx_bD - exact_bD).norm() / exact_bD.norm()), float((dw_RD - exact_RD).norm() / exact_RD.norm())


def measure(options: argparse.Namespace, training: Training, stage: str) -> None:
    problem = training.problem()
    exact, near = Ours(problem, "store"), Skipping(problem, options.tolerance)
    found: list[Floor | Ours] = [Floor(problem), exact, near]
    loss = float(exact.head(exact.x_bD, problem.labels_b).detach())
    share, (error_dx, error_dw) = kept_share(near), error(near, exact)
    times: dict[str, list[float]] = {contender.name: [] for contender in found}
    for repeat in range(options.repeats + 1):
        for contender in found:
            contender.clear()
            taken = seconds(contender)
            if repeat:
                times[contender.name].append(taken)
    floor, store, skipping = (statistics.median(times[contender.name]) for contender in found)
    print(f"{stage:18}{loss:9.3f}{share:8.2f}{floor:10.4f}{store / floor:9.2f}{skipping / floor:9.2f}", end="")
    print(f"{error_dx:11.1e}{error_dw:11.1e}", flush=True)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    training = Training(options)
    print(f"{'':18}{'loss':>9}{'kept':>8}{'floor s':>10}{'store':>9}{'skipping':>9}{'error dx':>11}{'error dW':>11}")
    done = 0
    for steps in sorted(options.stages):
        for _ in range(steps - done):
            training.step()
        done = steps
        if steps:
            training.place_centres()
        measure(options, training, f"after {steps} steps")


if __name__ == "__main__":
    main()
