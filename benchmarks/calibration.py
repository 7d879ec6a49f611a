"""Calibration against made-up populations of known truth: does the interval hold, is the mean rate the target?

    python benchmarks/calibration.py --repetitions 1000 --json calibration.json --markdown benchmarks/calibration.md

A repetition draws subjects from a population, calibrates on them, draws a real gallery of N other subjects, and lets
strangers search it. `reached` is the FPIR of that gallery: what the service's operator would see. It varies for two
reasons, the subjects at hand and the gallery, and the stated interval is to hold 95 % of its values. Galleries are of
as many subjects as were at hand, of twice and of ten times as many. Four populations:

    independent   directions that are alike: comparisons are independent
    families      each subject belongs to one of 200 families, whose members share 45 % of their variance
    anisotropic   some directions are crowded: subjects differ in their lookalikes
    wolves        one subject in twenty leans to what all have in common, and is taken for many

With --embedder and --data the populations are a third each of the held-out identities of a real data set, divided anew
in each repetition: one third calibrates, one is the gallery, one are the strangers. There the strangers are few, and
what is reached varies with who they are, which the interval does not speak of: it holds less than 95 %.

Beside the calibrated threshold stand the plain alternatives: the threshold for the same rate in 1:1, and the one where
1 - (1 - FMR)^N is the target, both from the same fitted tail. With the defaults about an hour on one core.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from numpy.typing import NDArray

from trainer.assess import embed_split
from trainer.data.manifest import Manifest
from trainer.embedder import Embedder
from trainer.errors import UserError
from trainer.evaluation.calibration import HeldOut, identify_threshold, verify_threshold
from trainer.evaluation.curve import Curve, score_of, strength

KINDS = ("independent", "families", "anisotropic", "wolves")
GROWTH = (1, 2, 10)
FPIR, FMR = (0.05, 0.01), 1e-3
REAL_FPIR = (0.1, 0.05)
DIMENSION, CROWDED, NOISE = 32, 16, 0.7
FAMILIES = np.random.default_rng(777).normal(size=(200, DIMENSION))
SCALES = np.exp(-2 * np.arange(CROWDED) / CROWDED)
Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Draw:
    """One repetition: what was promised, and what a real gallery then reached. None: refused."""

    kind: str
    subjects: int
    samples: int
    target: str
    rate: float
    growth: int
    reached: float | None = None
    low: float = 0.0
    high: float = 0.0
    by_pairs: float = 0.0  # reached with the threshold for the same rate in 1:1
    by_power: float = 0.0  # reached with the threshold where 1 - (1 - FMR)^N is the target


def centres(kind: str, subjects: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Where the samples of each subject lie, before they are normalised."""
    if kind == "anisotropic":
        return np.asarray(generator.normal(size=(subjects, CROWDED)) * SCALES)
    own = generator.normal(size=(subjects, DIMENSION))
    if kind == "families":
        return np.sqrt(0.45) * FAMILIES[generator.integers(0, len(FAMILIES), subjects)] + np.sqrt(0.55) * own
    if kind == "wolves":
        lean = np.where(generator.random(subjects) < 0.05, 0.8, 0.25)
        own[:, 0] += lean * np.sqrt(DIMENSION)
    return own


def population(kind: str, subjects: int, samples: int, generator: np.random.Generator) -> Vectors:
    """Unit vectors [subjects x samples, D] of new subjects."""
    middle_SD = centres(kind, subjects, generator)
    scales = SCALES if kind == "anisotropic" else 1.0
    x_SnD = middle_SD[:, None] + NOISE * scales * generator.normal(size=(subjects, samples, middle_SD.shape[1]))
    x_ND = x_SnD.reshape(subjects * samples, -1)
    return np.asarray(x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True), dtype=np.float32)


def searches(kind: str, sizes: Sequence[int], probes: int, generator: np.random.Generator) -> list[Vectors]:
    """The best score of each stranger in a gallery, ascending, for nested galleries of these sizes."""
    gallery_GD, strangers_PD = population(kind, sizes[-1], 1, generator), population(kind, probes, 1, generator)
    best = np.full((len(sizes), probes), -1, np.float32)
    for start in range(0, probes, 1000):
        scores_bG = strangers_PD[start : start + 1000] @ gallery_GD.T
        parts = zip((0, *sizes[:-1]), sizes, strict=True)
        found = np.stack([scores_bG[:, first:last].max(axis=1) for first, last in parts])
        best[:, start : start + 1000] = np.maximum.accumulate(found)
    return [np.sort(row) for row in best]


def share_above(ascending: Vectors, threshold: float) -> float:
    return 1 - float(np.searchsorted(ascending, np.float32(threshold))) / len(ascending)


def pair_scores(kind: str) -> Vectors:
    """The highest 2 % of the scores of 2 x 10^8 pairs of a population, ascending."""
    generator = np.random.default_rng(12)
    one, other = population(kind, 20_000, 1, generator), population(kind, 10_000, 1, generator)
    kept = []
    for start in range(0, len(one), 500):
        scores_B = (one[start : start + 500] @ other.T).ravel()
        scores_B.partition(len(scores_B) - len(scores_B) // 50)
        kept.append(scores_B[-(len(scores_B) // 50) :].copy())  # a view would keep the whole block
    return np.sort(np.concatenate(kept))


def plain(curve: Curve, fmr: float) -> float:
    """The score that matches at a rate by the fitted tail, nothing corrected."""
    return score_of(float(strength(curve.start)) + curve.excess(float(np.log(curve.share / fmr))))


def repetition(
    kind: str, subjects: int, samples: Sequence[int], probes: int, number: int, growths: Sequence[int] = GROWTH
) -> Iterator[Draw]:
    """One gallery, and calibrations on 1, 2, ... samples of each subject."""
    generator = np.random.default_rng([KINDS.index(kind), subjects, number])
    sizes = [growth * subjects for growth in growths]
    ascending = dict(zip(growths, searches(kind, sizes, probes, generator), strict=True))
    for count in samples:
        vectors_ND = population(kind, subjects, count, generator)
        held = HeldOut(vectors_ND, np.repeat(np.arange(subjects), count), "simulated", kind, number)
        for rate in FPIR:
            _, curve = identify_threshold(held, rate, subjects, least_hits=0)
            for growth in growths:
                cell = Draw(kind, subjects, count, "FPIR", rate, growth)
                size = growth * subjects
                try:
                    found = curve.at(size, rate)
                except UserError:
                    yield cell
                    continue
                values = found.value, plain(curve, rate), plain(curve, -np.expm1(np.log1p(-rate) / size))
                reached, by_pairs, by_power = (share_above(ascending[growth], value) for value in values)
                bounds = {"low": found.low, "high": found.high}
                yield Draw(**asdict(cell) | bounds | {"reached": reached, "by_pairs": by_pairs, "by_power": by_power})
        verified = verify_threshold(held, FMR, least_hits=0)
        yield Draw(kind, subjects, count, "FMR", FMR, 1, verified.value, verified.low, verified.high)


def real_repetition(
    vectors_ND: Vectors, labels_N: NDArray[np.int64], samples: Sequence[int], number: int
) -> Iterator[Draw]:
    """A third of the subjects calibrates, a third is enrolled with one sample each, and a third searches."""
    generator = np.random.default_rng([9, number])
    calibrating, enrolled, strangers = np.array_split(generator.permutation(np.unique(labels_N)), 3)
    order_N = generator.permutation(len(labels_N))
    order_N = order_N[np.argsort(labels_N[order_N], kind="stable")]
    place_N = np.arange(len(order_N)) - np.searchsorted(labels_N[order_N], labels_N[order_N])
    gallery_ND = vectors_ND[order_N[(place_N < 1) & np.isin(labels_N[order_N], enrolled)]]
    ascending = np.sort((vectors_ND[np.isin(labels_N, strangers)] @ gallery_ND.T).max(axis=1))
    for count in samples:
        rows = order_N[(place_N < count) & np.isin(labels_N[order_N], calibrating)]
        held = HeldOut(vectors_ND[rows], labels_N[rows], "real", "real", number)
        for rate in REAL_FPIR:
            found, curve = identify_threshold(held, rate, len(enrolled))
            values = found.value, plain(curve, rate), plain(curve, -np.expm1(np.log1p(-rate) / len(enrolled)))
            reached, by_pairs, by_power = (share_above(ascending, value) for value in values)
            cell = "real", len(calibrating), count, "FPIR", rate, 1
            yield Draw(*cell, reached, found.low, found.high, by_pairs, by_power)


def run_real(embedder: Path, data: Path, samples: Sequence[int], repetitions: int) -> list[dict[str, object]]:
    """The rows of an Embedder's held-out identities."""
    vectors_ND, labels_N = embed_split(Embedder.open(embedder), Manifest.read(data).split("val"))
    cells = dict[tuple[object, ...], list[Draw]]()
    for number in range(repetitions):
        for draw in real_repetition(vectors_ND, labels_N, samples, number):
            cells.setdefault((draw.samples, draw.rate), []).append(draw)
    return [dict(summary(draws)) for draws in cells.values()]


def summary(draws: list[Draw]) -> dict[str, float | int | str]:
    """A row of the table."""
    first, told = draws[0], [draw for draw in draws if draw.reached is not None]
    row = {name: getattr(first, name) for name in ("kind", "subjects", "samples", "target", "rate", "growth")}
    if not told:
        return row | {"refused": len(draws)}
    reached, low, high = (np.array([getattr(d, name) for d in told]) for name in ("reached", "low", "high"))
    return row | {
        "repetitions": len(told),
        "refused": len(draws) - len(told),
        "covered": float(np.mean((low <= reached) & (reached <= high))),
        "above": float(np.mean(reached > high)),
        "mean_over_target": float(reached.mean() / first.rate),
        "low_over_target": float(np.median(low) / first.rate),
        "high_over_target": float(np.median(high) / first.rate),
        "by_power_over_target": float(np.mean([d.by_power for d in told]) / first.rate),
        "by_pairs_over_target": float(np.mean([d.by_pairs for d in told]) / first.rate),
    }


def run(kind: str, subjects: int, samples: Sequence[int], probes: int, repetitions: int) -> list[dict[str, object]]:
    """All rows of a population and number of subjects."""
    ascending, cells = pair_scores(kind), dict[tuple[object, ...], list[Draw]]()
    for number in range(repetitions):
        for draw in repetition(kind, subjects, samples, probes, number):
            if draw.target == "FMR":
                assert draw.reached is not None
                truth = 0.02 * share_above(ascending, draw.reached)
                draw = Draw(**asdict(draw) | {"reached": truth})
            cells.setdefault((draw.samples, draw.target, draw.rate, draw.growth), []).append(draw)
    return [dict(summary(draws)) for draws in cells.values()]


def markdown(rows: list[dict[str, object]]) -> str:
    """The table."""
    head = "| population | subjects x samples | target | gallery | refused | covered | above | mean ÷ target "
    lines = [head + "| interval ÷ target | 1-(1-FMR)^N ÷ target | 1:1 threshold ÷ target |", "|" + "---|" * 11]
    for row in rows:
        size = "—" if row["target"] == "FMR" else f"{row['growth']} N"
        start = f"| {row['kind']} | {row['subjects']} x {row['samples']} | {row['target']} {row['rate']:g} | {size} "
        if "covered" not in row:
            lines.append(start + "| all | | | | | | |")
            continue
        total = int(str(row["refused"])) + int(str(row["repetitions"]))
        found = f"| {int(str(row['refused'])) / total:.0%} | {row['covered']:.1%} "
        found += f"| {row['above']:.1%} | {row['mean_over_target']:.2f} "
        found += f"| {row['low_over_target']:.2f} to {row['high_over_target']:.2f} "
        alternatives = f"| {row['by_power_over_target']:.2f} | {row['by_pairs_over_target']:.1f} |"
        lines.append(start + found + ("| | |" if row["target"] == "FMR" else alternatives))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=1000)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--subjects", nargs="+", type=int, default=[50, 200, 1000])
    parser.add_argument("--samples", nargs="+", type=int, default=[1, 5])
    parser.add_argument("--probes", type=int, default=10_000, help="strangers that search each gallery")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--embedder", type=Path, help="with --data: real identities instead of made-up ones")
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    if options.embedder:
        print(markdown(run_real(options.embedder, options.data, options.samples, options.repetitions)))
        return
    for subjects in options.subjects:
        for kind in options.kinds:
            new = run(kind, subjects, options.samples, options.probes, options.repetitions)
            rows += new
            print(markdown(new), flush=True)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
            if options.markdown:
                options.markdown.write_text(markdown(rows))


if __name__ == "__main__":
    main()
