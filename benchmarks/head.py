"""How fast, how lean and how exact the sharded head is, beside the bare matrix products and the heads in common use.

    python benchmarks/head.py --classes 200000 --batch 256 --dim 512 --ranks 1 --device cpu --dtype fp32 --json F

All contenders run in one process (a rank), one step of each in turn, so that a busy machine slows all of them alike.
A CUDA device's memory is kept by torch's allocator from step to step. So that those who allocate theirs anew in every
step are not charged with the system's page faults on the CPU either, `--memory kept` (the default) tells the C library
to keep what is freed; `--memory fresh` shows what that is worth, with huge pages, which spare a third of it.
Needs torch and numpy alone.
"""

import argparse
import ctypes
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from benchmarks.head_contenders import MARGIN, SCALE, Contender, Floor, Ours, Problem
from benchmarks.head_peers import MAKERS, contenders
from trainer.distributed import Group
from trainer.head.matmul import free_memory

NAMES = {  # what is compared unless --only says otherwise
    "cpu": ["floor", "store", "recompute", "dense", "pml", "insightface_ops"],
    "cuda": [name for name in MAKERS if name != "insightface"],
}
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)
CHUNK = 16384  # classes of the float64 reference at once


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--classes", type=int, default=200_000)
    parser.add_argument("--batch", type=int, default=256, help="samples of all ranks together")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=2, help="of all ranks together, on the CPU")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps, after one for warmup")
    parser.add_argument("--only", nargs="+", choices=MAKERS, help="default: what suits the device")
    parser.add_argument("--memory", choices=["kept", "fresh"], default="kept", help="of freed blocks, on the CPU")
    parser.add_argument("--insightface", type=Path, help="folder of its partial_fc_v2.py and losses.py; needs CUDA")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.only = options.only or NAMES[options.device] + ["insightface"] * (options.insightface is not None)
    if options.classes % options.ranks or options.batch % options.ranks:
        parser.error(f"--ranks {options.ranks} must divide --classes {options.classes} and --batch {options.batch}")
    return options


def make_problem(options: argparse.Namespace, group: Group) -> Problem:
    """The same embeddings, labels and rows on any number of ranks."""
    device = torch.device(options.device, group.rank) if options.device == "cuda" else torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    x_BD = torch.randn(options.batch, options.dim, generator=generator)
    labels_B = torch.randint(0, options.classes, (options.batch,), generator=generator)
    b, share = options.batch // group.size, options.classes // group.size
    mine = slice(group.rank * b, (group.rank + 1) * b)
    rows_RD = torch.empty(share, options.dim, device=device)
    generator = torch.Generator(device)
    for start in range(0, share, CHUNK):
        generator.manual_seed(1 + group.rank * share + start)
        part = rows_RD[start : start + CHUNK]
        part.normal_(generator=generator)
        part.div_(part.norm(dim=1, keepdim=True))
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    x_bD, labels_b = x_BD[mine].to(device), labels_B[mine].to(device)
    return Problem(x_bD, labels_b, rows_RD, options.classes, dtype, group, options.insightface)


class Reference:
    """The gradients in float64, a chunk of classes at a time."""

    def __init__(self, problem: Problem) -> None:
        self.problem, group = problem, problem.group
        self.x_BD = group.all_gather(problem.x_bD).double()
        self.labels_B = group.all_gather(problem.labels_b) - problem.start
        self.norms_B1 = self.x_BD.norm(dim=1, keepdim=True)
        self.unit_BD = self.x_BD / self.norms_B1
        stats_B2 = torch.zeros(self.x_BD.shape[0], 2, dtype=torch.float64, device=self.x_BD.device)
        for _, cos_BT, own, label in self._chunks():
            stats_B2[own, 1] = cos_BT[own, label]
            stats_B2[:, 0] += self._others(cos_BT, own, label).sum(1)
        stats_B2 = group.all_reduce(stats_B2)
        theta_B = stats_B2[:, 1].acos()
        target_B = SCALE * torch.cos(theta_B + MARGIN)
        total_B = stats_B2[:, 0] + (target_B - SCALE).exp()
        self.share_B = 1 / total_B / len(theta_B)
        p_B = (target_B - SCALE).exp() / total_B
        self.slope_B = (p_B - 1) / len(theta_B) * SCALE * torch.sin(theta_B + MARGIN) / torch.sin(theta_B)
        dunit_BD = torch.zeros_like(self.x_BD)
        for w_TD, cos_BT, own, label in self._chunks():
            dunit_BD += self._dcos(cos_BT, own, label) @ w_TD
        dunit_BD = group.all_reduce(dunit_BD)
        along_B1 = (dunit_BD * self.unit_BD).sum(1, keepdim=True)
        b = problem.x_bD.shape[0]
        dx_BD = (dunit_BD - along_B1 * self.unit_BD) / self.norms_B1
        self.dx_bD = dx_BD[group.rank * b : (group.rank + 1) * b]

    def _chunks(self) -> Any:
        for start in range(0, self.problem.rows_RD.shape[0], CHUNK):
            w_TD = self.problem.rows_RD[start : start + CHUNK].double()
            w_TD /= w_TD.norm(dim=1, keepdim=True)
            label_B = self.labels_B - start
            own = ((label_B >= 0) & (label_B < w_TD.shape[0])).nonzero()[:, 0]
            yield w_TD, self.unit_BD @ w_TD.t(), own, label_B[own]

    def _others(self, cos_BT: Tensor, own: Tensor, label: Tensor) -> Tensor:
        others_BT = (SCALE * cos_BT - SCALE).exp_()
        others_BT[own, label] = 0
        return others_BT

    def _dcos(self, cos_BT: Tensor, own: Tensor, label: Tensor) -> Tensor:
        dcos_BT = self._others(cos_BT, own, label) * (SCALE * self.share_B[:, None])
        dcos_BT[own, label] = self.slope_B[own]
        return dcos_BT

    def error_of_rows(self, found_RD: Tensor) -> float:
        difference = total = 0.0
        for number, (w_TD, cos_BT, own, label) in enumerate(self._chunks()):
            exact_TD = self._dcos(cos_BT, own, label).t() @ self.unit_BD
            exact_TD -= w_TD * (exact_TD * w_TD).sum(1, keepdim=True)
            found_TD = found_RD[number * CHUNK : number * CHUNK + len(exact_TD)].double()
            difference += float((found_TD - exact_TD).square().sum())
            total += float(exact_TD.square().sum())
        return (difference / total) ** 0.5


def extra_memory(work: Callable[[], None], device: torch.device) -> float:
    """MB by which the memory in use grew, at its highest, while `work` ran."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far becomes the current one
    before = _status("VmRSS")
    work()
    return (_status("VmHWM") - before) / 1e6


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def seconds(work: Callable[[], None], problem: Problem) -> float:
    if problem.group.size > 1:
        dist.barrier()
    if problem.x_bD.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if problem.x_bD.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(options: argparse.Namespace, group: Group) -> tuple[list[dict[str, Any]], list[str], float | None]:
    """A row for each contender, the names of those that are not installed, and beside bf16 the seconds of fp32's floor.

    That floor takes its turn among the contenders, since bf16 is chosen to be faster than fp32.
    """
    problem = make_problem(options, group)
    found, missing = contenders(problem, options.only)
    reference = Reference(problem)
    rows = [first_look(contender, reference) for contender in found]
    beside = [Floor(replace(problem, dtype=torch.float32), "floor_fp32")] if options.dtype == "bf16" else []
    times: dict[str, list[float]] = {contender.name: [] for contender in (*found, *beside)}
    for repeat in range(options.repeats + 1):
        for contender in (*found, *beside):
            contender.clear()
            taken = seconds(contender.step, problem)
            if repeat:
                times[contender.name].append(taken)
            if not isinstance(contender, Ours):
                contender.clear()
    for row, contender in zip(rows, found, strict=True):
        row["step_s"] = statistics.median(times[row["contender"]])
        row |= {"bytes": contender.bytes, "collectives": contender.messages}
    floor_fp32 = statistics.median(times["floor_fp32"]) if beside else None
    del beside
    with_optimizer(options, problem, rows)
    if problem.group.size > 1:
        for row in rows:
            agree(row)
    return rows, missing, floor_fp32


def first_look(contender: Contender, reference: Reference) -> dict[str, Any]:
    """The first step: what memory it takes, and how exact it is."""
    problem = reference.problem
    contender.clear()
    peak = extra_memory(contender.step, problem.x_bD.device)
    row: dict[str, Any] = {
        "contender": contender.name,
        "step_s": None,
        "step_with_optimizer_s": None,
        "peak_extra_mb": peak,
        "peak_extra_without_dw_mb": peak - problem.rows_RD.numel() * 4 / 1e6,
        "bytes": None,
        "collectives": None,
        "rel_error_dx": None,
        "rel_error_dw": None,
    }
    gradient = contender.rows_gradient()
    if gradient is not None and contender.dx_bD is not None:
        error = (contender.dx_bD.double() - reference.dx_bD).norm() / reference.dx_bD.norm()
        row |= {"rel_error_dx": float(error), "rel_error_dw": reference.error_of_rows(gradient)}
    contender.clear()
    return row


def with_optimizer(options: argparse.Namespace, problem: Problem, rows: list[dict[str, Any]]) -> None:
    """Step and update, in turn again: recompute steps inside its tiles. Each contender needs a momentum and a gradient
    of the rows' size; where the memory does not hold all of them, one contender after another."""
    names = [row["contender"] for row in rows]
    needed = 3 * len(names) * problem.rows_RD.numel() * 4
    together = needed < 0.8 * free_memory(problem.x_bD.device) / (1 if options.device == "cuda" else options.ranks)
    times: dict[str, list[float]] = {name: [] for name in names}
    for group in [names] if together else [[name] for name in names]:
        found = [
            Ours(problem, name, fused=True) if name == "recompute" else contenders(problem, [name])[0][0]
            for name in group
        ]
        for repeat in range(options.repeats + 1):
            for contender in found:
                contender.clear()
                taken = seconds(lambda one=contender: (one.step(), one.optimize()), problem)  # type: ignore[misc]
                if repeat:
                    times[contender.name].append(taken)
                if not isinstance(contender, Ours):
                    contender.clear()
        del found, contender
    for row in rows:
        row["step_with_optimizer_s"] = statistics.median(times[row["contender"]])


def agree(row: dict[str, Any]) -> None:
    """The slowest, largest and least exact rank speaks for all."""
    for key, value in row.items():
        if isinstance(value, float):
            greatest = torch.tensor(value, dtype=torch.float64)
            dist.all_reduce(greatest, dist.ReduceOp.MAX)
            row[key] = float(greatest)


def run(rank: int, options: argparse.Namespace, port: int) -> None:
    if options.memory == "kept" and options.device == "cpu":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    torch.set_num_threads(max(1, options.threads // options.ranks))
    if options.ranks > 1:
        backend = "cpu:gloo,cuda:nccl" if options.device == "cuda" else "gloo"
        dist.init_process_group(backend, f"tcp://127.0.0.1:{port}", rank=rank, world_size=options.ranks)
    if options.device == "cuda":
        torch.cuda.set_device(rank)
    rows, missing, floor_fp32 = measure(options, Group.current())
    if rank == 0:
        report(options, rows, missing, floor_fp32)
    if options.ranks > 1:
        dist.barrier()  # who leaves while another still speaks to it is aborted
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # gloo's threads may abort the interpreter at its end, when all is measured


def report(
    options: argparse.Namespace, rows: list[dict[str, Any]], missing: list[str], floor_fp32: float | None
) -> None:
    for name in missing:
        print(f"{name} is not installed: left out")
    floor = next((row["step_s"] for row in rows if row["contender"] == "floor"), None)
    print(f"{'contender':24}{'step s':>9}{'x floor':>9}{'+opt. s':>9}{'extra MB':>10}{'KB sent':>9}{'msgs':>6}", end="")
    print(f"{'error dx':>11}{'error dW':>11}")
    for row in rows:
        times = "" if floor is None else f"{row['step_s'] / floor:.2f}"
        print(f"{row['contender']:24}{row['step_s']:9.4f}{times:>9}{row['step_with_optimizer_s']:9.4f}", end="")
        print(f"{row['peak_extra_mb']:10.0f}{row['bytes'] / 1e3:9.0f}{row['collectives']:6}", end="")
        print(
            "".join(
                f"{row[key]:11.1e}" if row[key] is not None else f"{'':11}" for key in ("rel_error_dx", "rel_error_dw")
            )
        )
    if floor_fp32 is not None:
        shares = ", ".join(f"{row['contender']} {row['step_s'] / floor_fp32:.2f}" for row in rows)
        print(f"times the floor in fp32, {floor_fp32:.4f} s: {shares}")
    if options.json:
        config = {key: value for key, value in vars(options).items() if key not in ("json", "insightface")} | {
            "torch": torch.__version__
        }
        options.json.write_text(
            json.dumps({"config": config, "rows": rows, "floor_fp32_s": floor_fp32}, indent=2) + "\n"
        )


def device_name(kind: str) -> str:
    return torch.cuda.get_device_name() if kind == "cuda" else f"{os.cpu_count()} CPUs"


def main() -> None:
    options = parse()
    if options.ranks == 1:
        run(0, options, 0)
        return
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(run, (options, port), nprocs=options.ranks)


if __name__ == "__main__":
    main()
