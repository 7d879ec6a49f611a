"""What each loss does to embeddings of handwritten digits: the papers' table, on scikit-learn's load_digits.

    python benchmarks/digits.py --json digits.json --markdown benchmarks/digits.md

Two tables: L-Softmax with m = 1, 2, 3, 4 in 2 and in 16 dimensions, and every loss of the project in 16. Each row is
the mean of 5 seeds with its 95 % interval (t distribution); a seed decides the split into 70 % training and 30 % test
samples, the first weights and the order, and is the same for all rows. One core, less than 10 minutes.
"""

import argparse
import itertools
import json
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console

from benchmarks.intervals import interval
from serving.cli.terminal import progress
from trainer.config import Config
from trainer.figures import digits
from trainer.losses import by_name

MULTIPLES = (1, 2, 3, 4)
MEASURES = ("accuracy_by_centres", "accuracy_by_means", "intra_mean_degrees", "inter_smallest_degrees")


@dataclass(frozen=True)
class Row:
    """A loss and what its trainings gave, one number a seed; None where the loss has no class centres."""

    table: str
    label: str
    dimension: int
    config: Config
    values: dict[str, list[float] | None]

    def mean(self, measure: str) -> tuple[float, float] | None:
        """Mean and half the width of its 95 % interval."""
        values = self.values[measure]
        return None if values is None else interval(values)

    def record(self) -> dict[str, Any]:
        summary: dict[str, Any] = {}
        for measure in MEASURES:
            found = self.mean(measure)
            summary[measure] = None if found is None else {"mean": found[0], "half_interval_95": found[1]}
        return {
            "table": self.table,
            "label": self.label,
            "dimension": self.dimension,
            "loss": asdict(self.config.loss),
            "auxiliary": [asdict(spec) for spec in self.config.auxiliary],
            **summary,
            "seeds": self.values,
        }


def plan(losses: Sequence[str], dimension: int, steps: int) -> list[tuple[str, str, int, Config]]:
    """Table, label, dimension and Config of every row."""
    rows = [
        ("multiples", f"L-Softmax, m = {m}", d, digits.settings("l_softmax", d, steps, margin=m))
        for d in sorted({2, dimension})
        for m in MULTIPLES
    ]
    return rows + [("losses", name, dimension, digits.settings(name, dimension, steps)) for name in losses]


def measure(table: str, label: str, dimension: int, config: Config, steps: int, splits: Sequence[digits.Digits]) -> Row:
    values: dict[str, list[float] | None] = {name: [] for name in MEASURES}
    for seed, split in enumerate(splits):
        trained = digits.train(config, steps, seed, split)
        angles = trained.angles()
        found = (
            trained.accuracy_by_centres(),
            trained.accuracy_by_means(),
            angles.intra_mean,
            angles.inter_smallest,
        )
        for name, value in zip(MEASURES, found, strict=True):
            kept = values[name]
            if value is None or kept is None:
                values[name] = None
            else:
                kept.append(value)
    return Row(table, label, dimension, config, values)


def trends(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Whether accuracy and compactness grow with m: the steps from m to m + 1, and m = 4 against m = 1, by seed."""
    found = []
    for dimension in sorted({row.dimension for row in rows if row.table == "multiples"}):
        series = [row for row in rows if row.table == "multiples" and row.dimension == dimension]
        for name, better in (("accuracy_by_centres", 1), ("intra_mean_degrees", -1), ("inter_smallest_degrees", 1)):
            columns = [row.values[name] or [] for row in series]
            means = [sum(column) / len(column) for column in columns]
            steps = [better * (after - before) > 0 for before, after in itertools.pairwise(means)]
            change = interval([last - first for first, last in zip(columns[0], columns[-1], strict=True)])
            found.append(
                {
                    "dimension": dimension,
                    "measure": name,
                    "means_by_m": means,
                    "better_at_every_step": all(steps),
                    "steps_that_are_worse": [
                        f"m = {m} to {m + 1}" for m, ok in zip(MULTIPLES, steps, strict=False) if not ok
                    ],
                    "change_m1_to_m4": {"mean": change[0], "half_interval_95": change[1]},
                    "beyond_chance": abs(change[0]) > change[1],
                }
            )
    return found


def markdown(rows: Sequence[Row], found: Sequence[dict[str, Any]], options: argparse.Namespace, seconds: float) -> str:
    about = (
        "scikit-learn's load_digits (1797 images of 8 x 8), a network of 64 - 256 - 128 - D units, "
        f"{options.steps} steps of 128 samples. Mean of {options.seeds} seeds ± half the 95 % interval (t "
        "distribution); a seed decides the split (70 % / 30 % by class), the first weights and the order, and is "
        "the same for all rows. All figures are of test samples. *Centres*: the greatest logit without margin "
        "decides; *means*: the nearest class mean of the training embeddings, by the cosine, which is how "
        "embeddings are compared in service. *Intra*: mean angle of a sample to its class mean; *inter*: the "
        "smallest angle between two class means. The constants of each loss are in the JSON and in "
        f"their classes; they were chosen once for ten classes, not tuned loss by loss. {seconds:.0f} s of "
        "one core."
    )
    command = "    python benchmarks/digits.py --json digits.json --markdown benchmarks/digits.md"
    lines = ["# Digits under every loss", "", command, "", textwrap.fill(about, 120), "", "## L-Softmax over m", ""]
    for dimension in sorted({row.dimension for row in rows if row.table == "multiples"}):
        lines += [f"D = {dimension}:", "", *_table(rows, "multiples", dimension), ""]
    lines += ["Does it grow with m, as in the papers (Liu et al. 2016, tables 2 to 4)?", "", *_told(found), ""]
    lines += [f"## Every loss, D = {options.dimension}", "", *_table(rows, "losses", options.dimension), ""]
    notes = (
        "center, center_invariant and range stand beside softmax; tse and tpe learn their projection from the "
        "embeddings that softmax learns. Losses without class centres are decided by means alone."
    )
    lines.append(textwrap.fill(notes, 120))
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row], table: str, dimension: int) -> list[str]:
    lines = [
        "| loss | accuracy, centres (%) | accuracy, means (%) | intra (°) | smallest inter (°) |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        if (row.table, row.dimension) != (table, dimension):
            continue
        cells = [_cell(row.mean(name), 100 if name.startswith("accuracy") else 1) for name in MEASURES]
        lines.append(f"| {row.label} | " + " | ".join(cells) + " |")
    return lines


def _cell(found: tuple[float, float] | None, factor: float) -> str:
    digits_kept = 2 if factor == 100 else 1
    return "" if found is None else f"{factor * found[0]:.{digits_kept}f} ± {factor * found[1]:.{digits_kept}f}"


def _told(found: Sequence[dict[str, Any]]) -> list[str]:
    names = {
        "accuracy_by_centres": ("accuracy", 100, "points"),
        "intra_mean_degrees": ("intra-class angle", 1, "°"),
        "inter_smallest_degrees": ("smallest inter-class angle", 1, "°"),
    }
    lines = []
    for one in found:
        name, factor, unit = names[one["measure"]]
        change = one["change_m1_to_m4"]
        size = f"{factor * change['mean']:+.2f} ± {factor * change['half_interval_95']:.2f} {unit} from m = 1 to 4"
        steps = (
            "better at every step"
            if one["better_at_every_step"]
            else "not at " + ", ".join(one["steps_that_are_worse"])
        )
        chance = "" if one["beyond_chance"] else "; the interval of that change, by seed, contains 0"
        lines.append(f"- D = {one['dimension']}, {name}: {steps}; {size}{chance}.")
    return lines


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--losses", nargs="*", choices=list(by_name()), default=list(by_name()), metavar="NAME")
    parser.add_argument("--dimension", type=int, default=16, help="of the table of all losses")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=5, choices=range(2, 11), metavar="2..10")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)
    splits = [digits.load(seed) for seed in range(options.seeds)]
    todo = plan(options.losses, options.dimension, options.steps)
    rows: list[Row] = []
    started = time.process_time()
    console = Console(stderr=True)
    with progress(console) as show:
        for table, label, dimension, config in todo:
            rows.append(measure(table, label, dimension, config, options.steps, splits))
            show("rows", len(rows), len(todo))
            if not console.is_terminal:
                console.print(f"{len(rows)} of {len(todo)}: {label}, D = {dimension}", highlight=False)
    seconds = time.process_time() - started
    found = trends(rows)
    text = markdown(rows, found, options, seconds)
    if options.markdown:
        options.markdown.write_text(text)
    if options.json:
        settings = {name: getattr(options, name) for name in ("losses", "dimension", "steps", "seeds")}
        content = {
            "config": settings | {"cpu_seconds": round(seconds, 1), "torch": torch.__version__},
            "rows": [row.record() for row in rows],
            "trends": found,
        }
        options.json.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
