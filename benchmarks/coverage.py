"""How often the intervals of the metrics hold the figure of the population; 95 % is meant.

    python benchmarks/coverage.py --repetitions 300

A repetition draws subjects from a population, computes the figures with their intervals, and compares these with the
figures of 8,000 other subjects. *Below* and *above*: the population's figure lies there. Populations: subjects of
independent directions, and one where every tenth leans to what all have in common and is taken for many ("wolves").
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from trainer.evaluation import evidence, metrics
from trainer.evaluation.scores import pair_counts

DIMENSION, NOISE, LEAN = 16, 0.55, 1.0
CASES = (("independent", 150, 3), ("independent", 60, 4), ("wolves", 60, 4), ("wolves", 150, 3))
FARS = (1e-3, 1e-2)
Ends = tuple[float, float]


def population(kind: str, subjects: int, samples: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of new subjects, and their labels."""
    centres = generator.normal(size=(subjects, 1, DIMENSION))
    if kind == "wolves":
        centres += LEAN * (generator.random((subjects, 1, 1)) < 0.1)
    vectors = (centres + NOISE * generator.normal(size=(subjects, samples, DIMENSION))).reshape(-1, DIMENSION)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32), np.repeat(np.arange(subjects), samples)


def figures(curve: metrics.ErrorCurve, thresholds: dict[float, float]) -> dict[str, float]:
    """The figures of a population or a draw of it; FMR at the thresholds."""
    found = {"EER": metrics.equal_error_rate(curve), "AUC": metrics.area_under_curve(curve)}
    found["cost"] = metrics.minimum_cost(curve, 0.01)
    for far in FARS:
        found[f"TAR at FAR {far:g}"] = 1 - float(curve.fnmr_T[np.argmax(curve.fmr_T <= far)])
        found[f"FMR, threshold for {far:g}"] = float(
            curve.fmr_T[np.searchsorted(curve.thresholds_T, thresholds[far] - 1e-9)]
        )
    return found


def intervals_of(
    vectors: np.ndarray, labels: np.ndarray, thresholds: dict[float, float], seed: int
) -> Iterator[tuple[str, Ends]]:
    """The intervals of a draw."""
    curve = metrics.verification_curve(pair_counts(vectors, labels))
    found, drawn = evidence.of_all_pairs(vectors, labels, curve), figures(curve, thresholds)
    yield "EER", found.interval(drawn["EER"], evidence.equal_errors, seed, 400)
    yield "AUC", found.interval(drawn["AUC"], evidence.areas, seed, 400)
    yield "cost", found.interval(drawn["cost"], lambda fmr, fnmr: evidence.lowest_costs(fmr, fnmr, 0.01), seed, 400)
    for far in FARS:

        def missed(fmr: np.ndarray, fnmr: np.ndarray, far: float = far) -> np.ndarray:
            return evidence.fnmr_at(fmr, fnmr, np.array([far]))[:, 0]

        low, high = found.interval(1 - drawn[f"TAR at FAR {far:g}"], missed, seed, 400)
        yield f"TAR at FAR {far:g}", (1 - high, 1 - low)
        at = evidence.of_all_pairs(vectors, labels, curve, at=thresholds[far])
        yield f"FMR, threshold for {far:g}", at.fmr_interval(0)


def row(kind: str, subjects: int, samples: int, repetitions: int) -> str:
    """Of the table: coverage, and how often the truth lies above the interval."""
    vectors, labels = population(kind, 8000, samples, np.random.default_rng(99))
    curve = metrics.verification_curve(pair_counts(vectors, labels))
    thresholds = {far: float(curve.thresholds_T[np.argmax(curve.fmr_T <= far)]) for far in FARS}
    truth = figures(curve, thresholds)
    below, above = dict.fromkeys(truth, 0), dict.fromkeys(truth, 0)
    for number in range(repetitions):
        drawn = population(kind, subjects, samples, np.random.default_rng([number, subjects, samples]))
        for name, (low, high) in intervals_of(*drawn, thresholds, number):
            below[name] += truth[name] < low
            above[name] += truth[name] > high
    told = [
        f"{1 - (below[name] + above[name]) / repetitions:.1%} ({below[name]}, {above[name]})" for name in sorted(truth)
    ]
    return " | ".join([f"| {kind} {subjects} x {samples}", *told]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=300)
    options = parser.parse_args()
    names = sorted(
        ["EER", "AUC", "cost", *(f"{what} {far:g}" for far in FARS for what in ("TAR at FAR", "FMR, threshold for"))]
    )
    print("| population | " + " | ".join(names) + " |\n" + "|---" * (1 + len(names)) + "|", flush=True)
    for case in CASES:
        print(row(*case, options.repetitions), flush=True)


if __name__ == "__main__":
    main()
