"""What each loss makes of Omniglot: same network, same steps, several seeds; characters of alphabets never seen.

    python benchmarks/margins.py                     # the ten margins of the ablation
    python benchmarks/margins.py --table losses      # every loss of the project
    python benchmarks/margins.py --table state       # the head's number formats, under ArcFace

Every run is the training loop of `hypersphere train` on one worker with one thread; what differs from run to run is
the loss, its constants and its learning rate, all of them in this file. The held-out alphabets are evaluated at the
end: rank-1 with one image enrolled per character in one gallery, and FNIR at FPIR 1 % with half of the characters not
enrolled. Reported is the mean of the seeds with half its 95 % interval (t distribution). A loss whose mean rank-1 is
below the one stated for it here fails the command.

Omniglot comes from --source or OMNIGLOT_ZIP (the official images_background.zip), or is downloaded.
"""

import argparse
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from benchmarks.intervals import interval
from serving.cli.terminal import progress
from trainer.config import Config, load
from trainer.data.importers import ImportOptions
from trainer.data.importers.run import run_import
from trainer.errors import UserError
from trainer.losses import by_name
from trainer.losses.base import LossSpec

HELD_OUT_ALPHABETS = 6
EPOCHS = 6
STEPS = 600  # about as many as a run has
MEASURES = {"val/rank1": "rank-1", "val/fnir_at_fpir_1pct": "FNIR at FPIR 1 %"}

COMMON = (
    *("data.height=28", "data.width=28", "data.batch_size=256"),
    *("augment.rotate_degrees=10", "augment.scale=0.1", "augment.shear_degrees=8", "augment.translate=0.06"),
    *("backbone.name=convnet", "backbone.dimension=128", "backbone.width=32"),
    *("optimizer.lr=0.15", "optimizer.weight_decay=5e-4", "head.optimizer.weight_decay=5e-4"),
    *("schedule.warmup_steps=60", "schedule.margin_warmup_steps=150", "engine.bf16=true", "scaling.workers=1"),
    *("run.eval_every=1000", "run.checkpoint_every=0", "run.log_every=100", "tracking.enabled=false"),
)
UNIT_ROWS = ("head.optimizer.lr=2.0",)  # each centre is the target of few samples: it wants a far larger step
FREE_ROWS = ("head.optimizer.lr=0.3",)  # centres with a length
PAIRS = ("data.identities_per_batch=32",)  # 32 identities x 8 samples
EASED = ("loss.lambda_start=100", "loss.lambda_gamma=0.0133", "loss.lambda_power=4")  # L-Softmax and A-Softmax
ADAMW = ("head.optimizer.name=adamw", "head.optimizer.lr=0.01")


@dataclass(frozen=True)
class Recipe:
    """How a loss is trained, and what it must reach.

    Attributes:
        name: of the row.
        loss: as `hypersphere losses` names it.
        overrides: of the config, beyond `COMMON`.
        floor: rank-1 that the mean of the seeds must be above, in a run of the default length.
    """

    name: str
    loss: str
    overrides: tuple[str, ...]
    floor: float

    def config(self, data: Path, out: Path, epochs: int, seed: int) -> Config:
        run = (f"data.path={data}", f"run.out={out}", f"run.epochs={epochs}", f"run.seed={seed}")
        return load(None, [f"loss={self.loss}", *COMMON, *self.overrides, *run])


def recipe(loss: str, floor: float, *overrides: str, name: str | None = None) -> Recipe:
    return Recipe(name or loss, loss, overrides, floor)


def beside_softmax(name: str, floor: float, weight: float, *overrides: str) -> Recipe:
    """An auxiliary loss, which alone trains no network, or a projection of what softmax learns."""
    return Recipe(name, "softmax", (*FREE_ROWS, f"auxiliary=[{{name: {name}, weight: {weight}}}]", *overrides), floor)


S16 = (*UNIT_ROWS, "loss.scale=16")
ARCFACE = (*S16, "loss.margin=0.2")
_RECIPES = [
    recipe("softmax", 0.65, *FREE_ROWS),
    recipe("weighted_softmax", 0.65, *FREE_ROWS),
    recipe("focal", 0.65, *FREE_ROWS),
    recipe("modified_softmax", 0.68, *UNIT_ROWS),
    recipe("l_softmax", 0.68, *FREE_ROWS, *EASED, "loss.margin=2"),
    recipe("a_softmax", 0.69, *UNIT_ROWS, *EASED, "loss.margin=3"),
    recipe("l2_softmax", 0.66, *FREE_ROWS, "loss.alpha=16"),
    recipe("normface", 0.66, *S16),
    recipe("coco", 0.62, *PAIRS),
    recipe("cosface", 0.68, *S16, "loss.margin=0.15"),
    recipe("arcface", 0.68, *ARCFACE),
    recipe("combined", 0.68, *S16, "loss.m2=0.1", "loss.m3=0.1"),
    recipe("sub_center_arcface", 0.68, *ARCFACE, "loss.centres=2"),
    recipe("adaface", 0.67, *S16, "loss.margin=0.15"),
    recipe(
        *("magface", 0.68, *S16, "loss.lower_norm=5", "loss.upper_norm=50", "loss.weight_g=5"),
        *("loss.lower_margin=0.15", "loss.upper_margin=0.3"),
    ),
    recipe("elasticface", 0.67, *ARCFACE),
    recipe("dynamic", 0.68, *S16, "loss.greatest=0.2"),
    recipe("curricularface", 0.65, *ARCFACE),
    recipe("mv_softmax", 0.64, *S16, "loss.margin=0.15"),
    recipe("contrastive", 0.5, *PAIRS, "optimizer.lr=1.0", "loss.margin=1.3", "loss.balanced=false"),
    recipe("marginal", 0.58, *PAIRS, "optimizer.lr=2.0"),
    recipe("triplet", 0.62, *PAIRS, "optimizer.lr=0.5"),
    beside_softmax("tse", 0.5, 1, *PAIRS, "auxiliary.0.frozen=true"),
    beside_softmax("tpe", 0.5, 1, *PAIRS, "auxiliary.0.frozen=true"),
    beside_softmax("center", 0.67, 0.003),
    beside_softmax("center_invariant", 0.67, 0.003),
    beside_softmax("range", 0.55, 0.1, *PAIRS),
]


def from_class(spec: type[LossSpec]) -> Recipe:
    """A loss without a recipe above trains with the constants that its class gives for few classes."""
    name, where = spec().name, "loss" if spec.beside_softmax is None else "auxiliary.0"
    constants = tuple(f"{where}.{key}={value}" for key, value in spec.demo_constants(128, STEPS).items())
    if spec.beside_softmax is not None:
        return beside_softmax(name, 0.5, spec.beside_softmax, *PAIRS, *constants)
    rows = {"pair": PAIRS}.get(spec.family, UNIT_ROWS if spec.unit_rows else FREE_ROWS)
    return recipe(name, 0.5, *rows, *constants)


_KNOWN = {one.name: one for one in _RECIPES}
LOSSES = [_KNOWN.get(name) or from_class(spec) for name, spec in by_name().items()]
ABLATION = (
    *("softmax", "normface", "a_softmax", "l_softmax", "cosface", "arcface", "combined", "curricularface", "adaface"),
    "sub_center_arcface",
)
_FLOOR = 0.68
STATE = [
    recipe("arcface", _FLOOR, *ARCFACE, "head.optimizer.state_dtype=fp32", name="SGD, fp32 state"),
    recipe("arcface", _FLOOR, *ARCFACE, "head.optimizer.state_dtype=bf16", name="SGD, bf16 state"),
    recipe("arcface", _FLOOR, *ARCFACE, "head.optimizer.state_dtype=int8", name="SGD, int8 state"),
    recipe(
        *(
            "arcface",
            _FLOOR,
            *ARCFACE,
            "head.optimizer.state_dtype=int8",
            "head.param_dtype=bf16",
            "head.compute_dtype=bf16",
        ),
        name="SGD, int8 state, bf16 centres and products",
    ),
    recipe("arcface", _FLOOR, *ARCFACE, *ADAMW, "head.optimizer.state_dtype=fp32", name="AdamW, fp32 state"),
    recipe("arcface", _FLOOR, *ARCFACE, *ADAMW, "head.optimizer.state_dtype=bf16", name="AdamW, bf16 state"),
    recipe("arcface", _FLOOR, *ARCFACE, *ADAMW, "head.optimizer.state_dtype=int8", name="AdamW, int8 state"),
]
TABLES = {
    "ablation": [one for name in ABLATION for one in LOSSES if one.name == name],
    "losses": LOSSES,
    "state": STATE,
}


def omniglot(source: Path | None, folder: Path, console: Console) -> Path:
    """A folder of shards; imported unless it is there."""
    data = folder / "omniglot"
    if not (data / "manifest.json").is_file():
        with progress(console) as show:
            run_import("omniglot", source, data, ImportOptions(holdout_alphabets=HELD_OUT_ALPHABETS), show)
    return data


def _start_worker() -> None:
    """A process that trains one run after another, on one thread, in a process group of its own."""
    import logging

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=0, world_size=1)


def train(one: Recipe, data: Path, epochs: int, seed: int) -> dict[str, float]:
    """The held-out figures of one run."""
    from trainer.train import Record, run

    found: dict[str, float] = {}

    def report(record: Record) -> None:
        if record.kind == "metrics":
            found.update(record.values)

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        run(one.config(data, Path(out), epochs, seed), resume=False, report=report)
    return {key: found[key] for key in MEASURES} | {"seconds": time.perf_counter() - started}


Done = Callable[[str, int, int], None]


def measure(recipes: Sequence[Recipe], data: Path, options: argparse.Namespace, done: Done) -> list[dict[str, Any]]:
    """Every recipe under every seed, `options.jobs` at a time; seed by seed, so that all rows grow alike."""
    # glibc gives large blocks back to the system and faults them in again in every step.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**30))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**31 - 1))
    values: dict[str, dict[int, dict[str, float]]] = {one.name: {} for one in recipes}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, context, _start_worker) as pool:
        runs = {
            pool.submit(train, one, data, options.epochs, seed): (one.name, seed)
            for seed in range(options.seeds)
            for one in recipes
        }
        for count, future in enumerate(as_completed(runs), 1):
            name, seed = runs[future]
            values[name][seed] = found = future.result()
            told = ", ".join(f"{MEASURES[key]} {found[key]:.4f}" for key in MEASURES)
            done(f"{name}, seed {seed}: {told}", count, len(runs))
    return [row(one, [values[one.name][seed] for seed in range(options.seeds)]) for one in recipes]


def row(one: Recipe, runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """A row of the table, for the JSON."""
    found: dict[str, Any] = {"name": one.name, "loss": one.loss, "overrides": list(one.overrides), "floor": one.floor}
    for key in MEASURES:
        mean, half = interval([values[key] for values in runs])
        found[key] = {"mean": mean, "half_interval_95": half, "seeds": [values[key] for values in runs]}
    found["seconds"] = sum(values["seconds"] for values in runs) / len(runs)
    return found


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| | rank-1 (%) | above | FNIR at FPIR 1 % (%) | s a run |", "|---|---:|---:|---:|---:|"]
    for one in rows:
        cells = [f"{100 * one[key]['mean']:.1f} ± {100 * one[key]['half_interval_95']:.1f}" for key in MEASURES]
        lines.append(f"| {one['name']} | {cells[0]} | {100 * one['floor']:.0f} | {cells[1]} | {one['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python benchmarks/margins.py"
    )
    parser.add_argument("--table", choices=list(TABLES), default="ablation")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these rows of the table alone")
    parser.add_argument("--seeds", type=int, default=3, choices=range(2, 11), metavar="2..10")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="the stated rank-1 are for the default")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, of one thread each")
    parser.add_argument("--source", type=Path, help="the official images_background.zip, or its folder")
    parser.add_argument("--folder", type=Path, default=Path("runs/margins"), help="where the shards are kept")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    names = [one.name for one in TABLES[options.table]]
    if unknown := sorted(set(options.only or []) - set(names)):
        parser.error(f"--only {' '.join(unknown)}: the table '{options.table}' has the rows {', '.join(names)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    console = Console(stderr=True)
    try:
        data = omniglot(options.source, options.folder, console).resolve()
    except UserError as error:
        console.print(str(error), style="red", highlight=False)
        return 2
    recipes = [one for one in TABLES[options.table] if not options.only or one.name in options.only]
    with progress(console) as show:

        def done(told: str, count: int, total: int) -> None:
            console.print(f"{count}/{total}  {told}", highlight=False)
            show("runs", count, total)

        rows = measure(recipes, data, options, done)
    sys.stdout.write(markdown(rows))
    if options.json:
        settings = {name: getattr(options, name) for name in ("table", "seeds", "epochs")}
        content = {"config": settings | {"common": list(COMMON)}, "rows": rows}
        options.json.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    below = [one for one in rows if options.epochs == EPOCHS and one["val/rank1"]["mean"] <= one["floor"]]
    for one in below:
        console.print(f"{one['name']}: rank-1 {one['val/rank1']['mean']:.4f}, stated above {one['floor']}", style="red")
    return 1 if below else 0


if __name__ == "__main__":
    sys.exit(main())
