"""Recognition of characters that were never seen: what helps, a peer's ArcFace, and the trained Embedder.

    python benchmarks/omniglot.py ablation --source images_background.zip
    python benchmarks/omniglot.py peer --source images_background.zip
    python benchmarks/omniglot.py final --embedder runs/omniglot/embedder --data data/characters

The test are the six alphabets that `data import --kind omniglot --holdout-alphabets 6` holds out. Whatever is chosen is
chosen on five of the other 24, on which the first two commands measure; only `final` looks at the test.

Error: of 20-way one-shot identification within an alphabet, as in Omniglot's official runs. One drawer's drawings of 20
characters are enrolled (of all, where the alphabet has fewer), another's are recognised, for 40 pairs of drawers of each
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
from typing import Any, NamedTuple

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
from trainer.data.split import Split
from trainer.embedder import Embedder
from trainer.evaluation.identification import closed_set, open_set
from trainer.evaluation.intervals import of_mean
from trainer.evaluation.protocols import UNENROLLED, enrolled_rows, one_shot_searches, open_set_searches

TEST_ALPHABETS, VALIDATION_ALPHABETS = 6, 5
WAYS, DRAWS, DRAWERS = 20, 40, 20
DEMO = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"
Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Row:
    """A row of the ablation: overrides of the demo's config, and steps that take about as long as the others'."""

    name: str
    steps: int
    overrides: tuple[str, ...] = ()


class Rate(NamedTuple):
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} ({100 * self.low:.1f} to {100 * self.high:.1f})"


def one_shot(x_ND: Vectors, labels_N: NDArray[np.int64], names: Sequence[str]) -> tuple[NDArray[np.bool_], Any]:
    """Whether each trial went wrong, and whose it was; drawings of a character lie in the order of their drawers."""
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
    return np.concatenate(wrong), np.concatenate(whose)


def figures(x_ND: Vectors, labels_N: NDArray[np.int64], names: Sequence[str]) -> dict[str, Rate]:
    wrong_P, whose_P = one_shot(x_ND, labels_N, names)
    wrong_P = wrong_P.astype(np.float64)
    closed = closed_set(one_shot_searches(x_ND, labels_N, enrolled_rows(labels_N)), len(names), [], names)
    searches = open_set_searches(x_ND, labels_N, UNENROLLED, 0)
    point = open_set(searches, len(names) // 2, len(names) // 2, UNENROLLED, 0).points[1]
    assert point.fnir is not None
    assert point.low is not None
    assert point.high is not None
    return {
        "error": Rate(float(wrong_P.mean()), *of_mean(wrong_P, whose_P)),
        "rank-1": Rate(closed.rank1, closed.low, closed.high),
        "FNIR": Rate(point.fnir, point.low, point.high),
    }


class Turned:
    """An Embedder that lays the unit vectors of an image's turns, and of its mirror image's, one behind the other."""

    def __init__(self, embedder: Embedder, turns: int, mirrors: bool) -> None:
        self.preprocessing, self._embedder = embedder.preprocessing, embedder
        self._views = [(turn, mirrored) for mirrored in range(1 + mirrors) for turn in range(turns)]

    def embed(self, images_BCHW: Any) -> Vectors:
        parts = []
        for turn, mirrored in self._views:
            turned_BCHW = np.rot90(images_BCHW, turn, (2, 3))
            parts.append(
                self._embedder.embed(np.ascontiguousarray(turned_BCHW[..., ::-1] if mirrored else turned_BCHW))
            )
        return np.concatenate(parts, axis=1) / np.float32(math.sqrt(len(parts)))


def measure(embedder: Embedder, split: Split) -> dict[str, dict[str, Rate]]:
    """The figures by the views that are taken of each image."""
    found = {}
    for views, model in {
        "as it is": embedder,
        "4 turns": Turned(embedder, 4, False),
        "4 turns, mirrored or not": Turned(embedder, 4, True),
    }.items():
        x_ND, labels_N = embed_split(model, split)  # type: ignore[arg-type]
        found[views] = figures(x_ND, labels_N, list(split.classes))
    return found


def choosing(source: Path, folder: Path) -> Path:
    """A data set without the test's alphabets, of which five are held out; imported unless it is there."""
    data, images = folder / "choosing", folder / "images"
    if (data / "manifest.json").is_file():
        return data
    shutil.rmtree(images, ignore_errors=True)
    with zipfile.ZipFile(source) as archive:
        members = [name for name in archive.namelist() if name.endswith(".png") and name.count("/") == 3]
        test = choose(sorted({name.split("/")[1] for name in members}), TEST_ALPHABETS, 0)
        archive.extractall(images, [name for name in members if name.split("/")[1] not in test])
    run_import("omniglot", images, data, ImportOptions(holdout_alphabets=VALIDATION_ALPHABETS), lambda *_: None)
    return data


FIXED = ("scaling.workers=1", "tracking.enabled=false", "run.eval_every=0", "run.collapse=false", "run.epochs=10000")
WIDER = (
    *("augment.rotate_degrees=15", "augment.scale=0.2", "augment.shear_degrees=12", "augment.translate=0.1"),
    *("augment.elastic=0.06", "augment.stroke=0.5"),
)
RESNET = ("backbone.name=resnet14", "backbone.channels_last=true", "backbone.width=32")
EMA, MIRRORS = "engine.ema_decay=0.995", "augment.mirrors=true"
ROWS = (
    Row("the demo's network and augmentation", 1704),
    Row("+ mirror images as classes", 1721, (EMA, MIRRORS)),
    Row("+ wider augmentation, elastic, strokes", 1548, (EMA, *WIDER)),
)


def train(config: Config, out: Path) -> tuple[Embedder, float]:
    """The Embedder of a training, of the averaged weights where there are any, and the seconds of CPU that it took."""
    from trainer.export import export_run
    from trainer.train import run

    started = time.process_time()
    run(config, resume=False, report=lambda _: None)
    seconds = time.process_time() - started
    which = "ema" if config.engine.ema_decay else "trained"
    export_run(out, out / "embedder", data=None, overwrite=True, register=False, on_trouble=print, which=which)
    return Embedder.open(out / "embedder"), seconds


def config_of(base: Path | None, overrides: Sequence[str], data: Path, out: Path, steps: int, seed: int) -> Config:
    shutil.rmtree(out, ignore_errors=True)
    own = (
        f"data.path={data}",
        f"run.out={out}",
        f"run.max_steps={steps}",
        f"run.seed={seed}",
        "run.checkpoint_every=0",
    )
    return load(base, [*overrides, *FIXED, *own])


def of_row(row: Row, data: Path, folder: Path) -> str:
    """A line of the ablation's table for each set of views."""
    out = folder / row.name.replace(" ", "-")
    embedder, seconds = train(config_of(DEMO, row.overrides, data, out, row.steps, 0), out)
    found = measure(embedder, Manifest.read(data).split("val"))
    return "\n".join(
        line(f"{row.name}; {views}", rates, f" {row.steps} | {seconds:.0f} |") for views, rates in found.items()
    )


def line(name: str, rates: Mapping[str, Rate], more: str = "") -> str:
    return f"| {name} | {' | '.join(map(str, rates.values()))} |{more}"


class Peer:
    """pytorch-metric-learning's ArcFaceLoss in the place of the objective. Its centres begin at length 1, as the head's
    do, so that the head's learning rate is theirs; afterwards they may grow."""

    def __init__(self, config: Config, classes: int, counts: Tensor, device: torch.device) -> None:
        from pytorch_metric_learning.losses import ArcFaceLoss

        margin, scale = (config.loss.model_dump()[key] for key in ("margin", "scale"))
        self._loss = ArcFaceLoss(classes, config.backbone.dimension, math.degrees(margin), scale)
        self._loss.W.data = torch.nn.functional.normalize(self._loss.W.data, dim=0)
        self._margin = margin
        settings = config.head.optimizer
        self._sgd = torch.optim.SGD(self._loss.parameters(), lr=1.0, momentum=settings.momentum, nesterov=True)

    def set_progress(self, step: int, warmup: float) -> None:
        self._loss.margin = self._margin * warmup

    def __call__(self, x_BD: Tensor, labels_B: Tensor, keys: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self._loss(x_BD[labels_B >= 0], labels_B[labels_B >= 0])
        return loss, {"loss": loss.detach()}

    def prepare(self, lr: float) -> None: ...

    def step(self, lr: float) -> None:
        self._sgd.param_groups[0]["lr"] = lr
        self._sgd.step()
        self._sgd.zero_grad()

    def files(self) -> dict[str, dict[str, Tensor]]:
        return {}

    def notes(self, values: Mapping[str, float]) -> list[str]:
        return []


def of_loss(name: str, seed: int, steps: int, data: Path, folder: Path) -> dict[str, Rate]:
    """The figures under the head (`ours`) or the peer's loss."""
    import trainer.train

    out = folder / f"{name}-{seed}"
    kept = trainer.train.Objective
    if name == "peer":
        trainer.train.Objective = Peer  # type: ignore[misc, assignment]
    try:
        embedder, _ = train(config_of(None, ("loss=arcface", *COMMON, *ARCFACE), data, out, steps, seed), out)
    finally:
        trainer.train.Objective = kept  # type: ignore[misc]
    split = Manifest.read(data).split("val")
    x_ND, labels_N = embed_split(embedder, split)
    return figures(x_ND, labels_N, list(split.classes))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ablation", "peer", "final"))
    parser.add_argument("--source", type=Path, help="the official images_background.zip")
    parser.add_argument("--folder", type=Path, default=Path("runs/omniglot"), help="where data and runs are kept")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, of one thread each")
    parser.add_argument("--seeds", type=int, default=3, choices=range(2, 11), metavar="2..10", help="of peer")
    parser.add_argument("--steps", type=int, default=366, help="of each run of peer")
    parser.add_argument("--embedder", type=Path, help="of final")
    parser.add_argument("--data", type=Path, help="of final: a set whose val split are the test's alphabets")
    options = parser.parse_args(arguments)
    head = "| | error | rank-1 | FNIR at FPIR 1 % |"
    if options.what == "final":
        if options.embedder is None or options.data is None:
            parser.error("final takes --embedder and --data")
        found = measure(Embedder.open(options.embedder), Manifest.read(options.data).split("val"))
        print("\n".join([head, "|---|---|---|---|", *(line(views, rates) for views, rates in found.items())]))
        return 0
    if options.source is None:
        parser.error(f"{options.what} takes --source")
    folder = options.folder.resolve()
    data = choosing(options.source, folder)
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**30))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**31 - 1))
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn"), _start_worker) as pool:
        if options.what == "ablation":
            print(f"{head} steps | CPU s |\n|---|---|---|---|---:|---:|", flush=True)
            for told in pool.map(of_row, ROWS, [data] * len(ROWS), [folder] * len(ROWS)):
                print(told, flush=True)
            return 0
        return compare(pool, options, data, folder)


def compare(pool: ProcessPoolExecutor, options: argparse.Namespace, data: Path, folder: Path) -> int:
    """The table of the peer: means over the seeds, and the paired differences with their intervals."""
    runs = {
        (name, seed): pool.submit(of_loss, name, seed, options.steps, data, folder)
        for seed in range(options.seeds)
        for name in ("ours", "peer")
    }
    print("| | ours (%) | peer (%) | ours better by (95 % interval, points) |\n|---|---:|---:|---:|")
    for key, sign in (("error", 1), ("rank-1", -1), ("FNIR", 1)):
        ours, peer = (
            [100 * runs[name, seed].result()[key].value for seed in range(options.seeds)] for name in ("ours", "peer")
        )
        better, half = interval([sign * (two - one) for one, two in zip(ours, peer, strict=True)])
        print(f"| {key} | {np.mean(ours):.1f} | {np.mean(peer):.1f} | {better:+.1f} ± {half:.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
