"""Normalised scores: the formulas as plain loops, and what they do to wolves."""

import numpy as np
import pytest

from benchmarks.calibration import population
from trainer.errors import UserError
from trainer.evaluation.calibration import HeldOut, calibrate
from trainer.evaluation.normalise import TOP, Normaliser, set_aside


def by_loop(kind: str, cohort: np.ndarray, p: np.ndarray, g: np.ndarray) -> float:
    def statistics(x: np.ndarray) -> tuple[float, float]:
        scores = sorted((float(x @ c) for c in cohort), reverse=True)
        if kind in TOP:
            scores = scores[: min(TOP[kind], len(scores) // 2)]
        return float(np.mean(scores)), float(np.std(scores))

    own = [float(a @ b) for i, a in enumerate(cohort) for j, b in enumerate(cohort) if i != j]
    if kind == "csls":
        return float(np.mean(own)) + float(p @ g) - (statistics(p)[0] + statistics(g)[0]) / 2
    score, (mean_p, deviation_p), (mean_g, deviation_g) = float(p @ g), statistics(p), statistics(g)
    t, z = (score - mean_p) / deviation_p, (score - mean_g) / deviation_g
    normalised = {"t": t, "z": z}.get(kind, (t + z) / 2)
    return float(np.mean(own)) + float(np.std(own)) / 2 * normalised


@pytest.mark.parametrize("kind", ["z", "t", "s", "as", "csls"])
def test_a_normalised_score_is_a_product_of_longer_vectors(kind: str) -> None:
    generator = np.random.default_rng(0)
    cohort, x = population("wolves", 50, 1, generator), population("wolves", 6, 1, generator)
    normaliser = Normaliser(kind, cohort)  # type: ignore[arg-type]
    scores = normaliser.probes(x) @ normaliser.enrolled(x).T
    assert normaliser.probes(x).shape == normaliser.enrolled(x).shape == (6, normaliser.width)
    expected = [[by_loop(kind, cohort, p, g) for g in x] for p in x]
    assert scores == pytest.approx(np.array(expected), abs=1e-5)


def test_normalising_takes_the_lead_of_wolves() -> None:
    """Subjects' rates differ less, and the calibration works on what is normalised."""
    generator = np.random.default_rng(1)
    vectors, labels = population("wolves", 300, 3, generator), np.repeat(np.arange(300), 3)
    cohort = population("wolves", 200, 1, generator)
    found = {}
    for kind in (None, "s"):
        normaliser = Normaliser(kind, cohort) if kind else None
        held = HeldOut(vectors, labels, "m", "wolves", 0, normaliser)
        found[kind] = calibrate(held, fpir=0.05, fmr=1e-3, gallery_size=300)
    assert found["s"].curve.subjects_vary < 0.5 * found[None].curve.subjects_vary
    assert found["s"].probability is not None
    for calibration in found.values():
        assert calibration.identify.low < 0.05 < calibration.identify.high


def test_those_set_aside_are_no_longer_there() -> None:
    labels = np.repeat(np.arange(100), 4)
    cohort, rest = set_aside(labels, 0.2, 1000, seed=0)
    assert len(cohort) == len(set(labels[cohort])) == 20
    assert not set(labels[cohort]) & set(labels[rest])
    assert len(rest) == 320
    assert len(set_aside(labels, 0.2, 5, seed=0)[0]) == 5


def test_a_cohort_that_is_none_is_named() -> None:
    with pytest.raises(UserError, match="a cohort of 3 vectors is too small"):
        Normaliser("s", population("wolves", 3, 1, np.random.default_rng(0)))
    with pytest.raises(UserError, match="embedding 0 has norm 0"):
        Normaliser("s", np.zeros((30, 4), np.float32))
