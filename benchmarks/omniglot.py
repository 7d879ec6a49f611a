"""Recognition of characters that were never seen: what helps, a peer's ArcFace, and the trained Embedder.

    python benchmarks/omniglot.py ablation --source images_background.zip
    python benchmarks/omniglot.py peer --source images_background.zip
    python benchmarks/omniglot.py final --embedder runs/omniglot/embedder --data data/characters

The test are the six alphabets that `data import --kind omniglot --holdout-alphabets 6` holds out. Whatever is chosen is
chosen on five of the other 24, on which the first two commands measure; only `final` looks at the test.

Error: of 20-way one-shot identification within an alphabet, as in Omniglot's official runs. One drawer's drawings of
20 characters are enrolled (of all, where there are fewer), another's are recognised, for 40 pairs of drawers of each
alphabet. Rank-1 and FNIR at FPIR 1 % are those of `hypersphere evaluate`: all characters in one gallery by one sample,
and half of the characters not enrolled. Intervals are of 95 % and by character.

Every training is one worker of one thread. `peer` trains the same network on the same batches, by the same schedule,
with pytorch-metric-learning's ArcFaceLoss in place of the head; seeds are paired.
"""

import argparse
import math
import multiprocessing
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.intervals import interval
from benchmarks.margins import ARCFACE, COMMON, _start_worker
from trainer.assess import embed_split
from trainer.config import Config, load
from trainer.data.importers import ImportOptions, choose
from trainer.data.importers.run import run_import
from trainer.data.manifest import Manifest
from trainer.embedder import Embedder, write_with_views
from trainer.evaluation.identification import closed_set, open_set
from trainer.evaluation.intervals import DEVIATE, of_mean
from trainer.evaluation.protocols import UNENROLLED, enrolled_rows, one_shot_searches, open_set_searches
from trainer.losses.margins.cosine import ArcFace

TEST_ALPHABETS, VALIDATION_ALPHABETS = 6, 5
WAYS, DRAWS, DRAWERS = 20, 40, 20
DEMO = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"
TURNS = ("same", "turn90", "turn180", "turn-90")
VIEWS = {
    "as it is": (),
    "4 turns": TURNS,
    "4 turns, mirrored or not": (*TURNS, "flip", *(f"flip+{turn}" for turn in TURNS[1:])),
}
HEAD = "| | views | error (%) | less than as it is (points) | rank-1 (%) | FNIR at FPIR 1 % (%) |"
FIXED = ("scaling.workers=1", "tracking.enabled=false", "run.eval_every=0", "run.collapse=false", "run.epochs=10000")
EMA, MIRRORS = "engine.ema_decay=0.995", "augment.mirrors=true"
WIDER = (
    *("augment.rotate_degrees=15", "augment.scale=0.2", "augment.shear_degrees=12", "augment.translate=0.1"),
    *("augment.elastic=0.06", "augment.stroke=0.5"),
)
RESNET = (EMA, MIRRORS, *WIDER, "backbone.name=resnet14", "backbone.channels_last=true")


@dataclass(frozen=True)
class Row:
    """A row of the ablation: overrides of the demo's config."""

    name: str
    steps: int
    overrides: tuple[str, ...] = ()


# The last three take about as long as each other: the larger a step, the fewer.
ROWS = (
    Row("the demo's network and augmentation", 1704),
    Row("mirror images as classes, too", 1721, (EMA, MIRRORS)),
    Row("wider augmentation, elastic, strokes", 1548, (EMA, *WIDER)),
    Row("both, resnet14 of 32 channels", 1311, (*RESNET, "backbone.width=32")),
    Row("both, resnet14 of 48 channels", 841, (*RESNET, "backbone.width=48")),
    Row("both, 32 channels, 36 x 36 pixels", 816, (*RESNET, "backbone.width=32", "data.height=36", "data.width=36")),
)


class Rate(NamedTuple):
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} ({100 * self.low:.1f} to {100 * self.high:.1f})"


def one_shot(
    x_ND: NDArray[np.float32], labels_N: NDArray[np.int64], names: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """1 for each trial that went wrong, and whose it was; drawings of a character lie in the order of their drawers."""
    random, wrong, whose = np.random.default_rng(1), [], []
    rows_CD = np.argsort(labels_N, kind="stable").reshape(len(names), DRAWERS)
    alphabets = np.array([name.split("/")[0] for name in names])
    for alphabet in np.unique(alphabets):
        own = np.flatnonzero(alphabets == alphabet)
        for _ in range(DRAWS):
            enrolled, searched = random.choice(DRAWERS, 2, replace=False)
            chosen = own[random.permutation(len(own))[:WAYS]]
            scores = x_ND[rows_CD[chosen, searched]] @ x_ND[rows_CD[chosen, enrolled]].T
            wrong.append(scores.argmax(1) != np.arange(len(chosen)))
            whose.append(chosen)
    return np.concatenate(wrong).astype(np.float64), np.concatenate(whose)


def figures(x_ND: NDArray[np.float32], labels_N: NDArray[np.int64], names: Sequence[str]) -> dict[str, Rate]:
    wrong_P, whose_P = one_shot(x_ND, labels_N, names)
    closed = closed_set(one_shot_searches(x_ND, labels_N, enrolled_rows(labels_N)), len(names), [], names)
    half = len(names) // 2
    point = open_set(open_set_searches(x_ND, labels_N, UNENROLLED, 0), half, half, UNENROLLED, 0).points[1]
    assert point.fnir is not None
    assert point.low is not None
    assert point.high is not None
    return {
        "error": Rate(float(wrong_P.mean()), *of_mean(wrong_P, whose_P)),
        "rank-1": Rate(closed.rank1, closed.low, closed.high),
        "FNIR": Rate(point.fnir, point.low, point.high),
    }


def paired(before_P: NDArray[np.float64], after_P: NDArray[np.float64], whose_P: NDArray[np.int64]) -> str:
    """How much less often the same trials go wrong, with half its 95 % interval by character."""
    less_P = before_P - after_P
    deviation = math.sqrt(np.square(np.bincount(whose_P, weights=less_P - less_P.mean())).sum()) / len(less_P)
    return f"{100 * less_P.mean():.1f} ± {100 * DEVIATE * deviation:.1f}"


def measured(embedder: Path, data: Path, name: str, more: str = "") -> str:
    """Lines of a table: the figures on the val split, by the views that an embedding holds one behind the other."""
    split, lines, trials = Manifest.read(data).split("val"), [], []
    for told, views in VIEWS.items():
        seen = embedder.with_name(f"{embedder.name}-{len(views)}")
        write_with_views(embedder, seen, views, overwrite=True, join="concatenate")
        x_ND, labels_N = embed_split(Embedder.open(seen), split)
        error, *rates = figures(x_ND, labels_N, list(split.classes)).values()
        trials.append(one_shot(x_ND, labels_N, list(split.classes)))
        less = paired(trials[0][0], *trials[-1]) if views else ""
        lines.append(f"| {name} | {told} | {error} | {less} | {' | '.join(map(str, rates))} |{more}")
    return "\n".join(lines)


def choosing(source: Path, folder: Path) -> Path:
    """A data set without the test's alphabets, of which five are held out; imported unless it is there."""
    data, images = folder / "choosing", folder / "images"
    if not (data / "manifest.json").is_file():
        shutil.rmtree(images, ignore_errors=True)
        with zipfile.ZipFile(source) as archive:
            members = [name for name in archive.namelist() if name.endswith(".png") and name.count("/") == 3]
            test = choose(sorted({name.split("/")[1] for name in members}), TEST_ALPHABETS, 0)
            archive.extractall(images, [name for name in members if name.split("/")[1] not in test])
        run_import("omniglot", images, data, ImportOptions(holdout_alphabets=VALIDATION_ALPHABETS), lambda *_: None)
    return data


def train(base: Path | None, overrides: Sequence[str], data: Path, out: Path, steps: int, seed: int) -> float:
    """Train, and export to OUT/embedder; the seconds of CPU that the training took."""
    from trainer.export import export_run
    from trainer.train import run

    shutil.rmtree(out, ignore_errors=True)
    own = (
        f"data.path={data}",
        f"run.out={out}",
        f"run.max_steps={steps}",
        f"run.seed={seed}",
        "run.checkpoint_every=0",
    )
    config = load(base, [*overrides, *FIXED, *own])
    started = time.process_time()
    run(config, resume=False, report=lambda _: None)
    seconds = time.process_time() - started
    which = "ema" if config.engine.ema_decay else "trained"
    export_run(out, out / "embedder", data=None, overwrite=True, register=False, on_trouble=print, which=which)  # type: ignore[arg-type]
    return seconds


def of_row(row: Row, data: Path, folder: Path) -> str:
    out = folder / f"row{ROWS.index(row)}"
    seconds = train(DEMO, row.overrides, data, out, row.steps, 0)
    return measured(out / "embedder", data, row.name, f" {row.steps} | {seconds:.0f} |")


class Peer:
    """pytorch-metric-learning's ArcFaceLoss in the place of `Objective`. Its centres begin at length 1, as the head's
    do, so that the head's learning rate is theirs; afterwards they may grow."""

    def __init__(self, config: Config, classes: int, counts: Tensor, device: torch.device) -> None:
        from pytorch_metric_learning.losses import ArcFaceLoss

        assert isinstance(config.loss, ArcFace)
        self._margin = config.loss.margin
        self._loss = ArcFaceLoss(classes, config.backbone.dimension, math.degrees(self._margin), config.loss.scale)
        self._loss.W.data = torch.nn.functional.normalize(self._loss.W.data, dim=0)
        self._sgd = torch.optim.SGD([self._loss.W], lr=1.0, momentum=config.head.optimizer.momentum, nesterov=True)

    def set_progress(self, step: int, warmup: float) -> None:
        self._loss.margin = self._margin * warmup

    def __call__(self, x_BD: Tensor, labels_B: Tensor, keys: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self._loss(x_BD[labels_B >= 0], labels_B[labels_B >= 0])
        return loss, {"loss": loss.detach()}

    def prepare(self, lr: float) -> None:
        self._sgd.param_groups[0]["lr"] = lr

    def step(self, lr: float) -> None:
        self._sgd.step()
        self._sgd.zero_grad()

    def files(self) -> dict[str, dict[str, Tensor]]:
        return {}

    def notes(self, values: Mapping[str, float]) -> list[str]:
        return []


def of_loss(name: str, seed: int, steps: int, lr: float, data: Path, folder: Path) -> dict[str, Rate]:
    """The figures under the head ("ours") or the peer's loss."""
    import trainer.train

    out, ours = folder / f"{name}{seed}", trainer.train.Objective
    trainer.train.Objective = Peer if name == "peer" else ours  # type: ignore[misc, assignment]
    try:
        train(None, ("loss=arcface", *COMMON, *ARCFACE, f"head.optimizer.lr={lr}"), data, out, steps, seed)
    finally:
        trainer.train.Objective = ours  # type: ignore[misc]
    split = Manifest.read(data).split("val")
    return figures(*embed_split(Embedder.open(out / "embedder"), split), list(split.classes))


def compare(pool: ProcessPoolExecutor, seeds: int, steps: int, lr: float, data: Path, folder: Path) -> None:
    """Print the means over the seeds, and the paired differences with their intervals."""
    runs = {
        (name, seed): pool.submit(of_loss, name, seed, steps, lr, data, folder)
        for seed in range(seeds)
        for name in ("ours", "peer")
    }
    print("| | ours (%) | peer (%) | ours better by (points) |\n|---|---:|---:|---:|")
    for key, sign in (("error", 1), ("rank-1", -1), ("FNIR", 1)):
        ours, peer = (
            [100 * runs[name, seed].result()[key].value for seed in range(seeds)] for name in ("ours", "peer")
        )
        better, half = interval([sign * (two - one) for one, two in zip(ours, peer, strict=True)])
        print(f"| {key} | {np.mean(ours):.1f} | {np.mean(peer):.1f} | {better:+.1f} ± {half:.1f} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ablation", "peer", "final"))
    parser.add_argument("--source", type=Path, help="the official images_background.zip")
    parser.add_argument("--folder", type=Path, default=Path("runs/omniglot-bench"), help="where data and runs are kept")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, of one thread each")
    parser.add_argument("--seeds", type=int, default=3, choices=range(2, 11), metavar="2..10", help="of peer")
    parser.add_argument("--steps", type=int, default=366, help="of each run of peer")
    parser.add_argument("--lr", type=float, default=0.5, help="of the centres, of peer")
    parser.add_argument("--embedder", type=Path, help="of final")
    parser.add_argument("--data", type=Path, help="of final: a set whose val split are the test's alphabets")
    options = parser.parse_args(arguments)
    if options.what == "final":
        if options.embedder is None or options.data is None:
            parser.error("final takes --embedder and --data")
        print(f"{HEAD}\n|---|---|---|---|---|---|\n{measured(options.embedder, options.data, 'test')}")
        return 0
    if options.source is None:
        parser.error(f"{options.what} takes --source, the official images_background.zip")
    folder = options.folder.resolve()
    data = choosing(options.source, folder)
    # glibc gives large blocks back to the system and faults them in again in every step.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**30))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**31 - 1))
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn"), _start_worker) as pool:
        if options.what == "peer":
            compare(pool, options.seeds, options.steps, options.lr, data, folder)
            return 0
        print(f"{HEAD} steps | CPU s |\n|---|---|---|---|---|---|---:|---:|", flush=True)
        for lines in pool.map(of_row, ROWS, [data] * len(ROWS), [folder] * len(ROWS)):
            print(lines, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
