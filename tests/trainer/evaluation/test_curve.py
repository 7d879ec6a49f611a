"""The Curve: rates, hits and thresholds are inverse to each other, and it says where it ends."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from trainer.errors import UserError
from trainer.evaluation.curve import Curve, score_of, strength, student
from trainer.evaluation.scores import GRID

ZERO = ((0.0, 0.0, 0.0),) * 3


def curve(**changed: object) -> Curve:
    """A tail of 200 subjects with one probe each; with nothing in `by_...` it is taken to be known without error."""
    values = {
        "target": "FPIR",
        "start": 0.4,
        "share": 0.01,
        "scale": 0.06,
        "shape": 0.0,
        "clumping": 0.0,
        "by_subjects": ZERO,
        "by_pairs": ZERO,
        "by_prior": (0.0, 0.0),
        "dominance": 0.0,
        "subjects_vary": 0.0,
        "gallery_varies": 0.0,
        "freedom": 50.0,
        "subjects": 200,
        "trials": 200,
    }
    return Curve.model_validate(values | changed)


@given(st.floats(-0.3, 0.3), st.floats(0, 3), st.integers(10, 3000), st.floats(1e-3, 0.05))
def test_the_threshold_has_the_rate_where_nothing_is_uncertain(
    shape: float, clumping: float, size: int, rate: float
) -> None:
    known = curve(shape=shape, clumping=clumping)
    found = known.at(size, rate, least_hits=0)
    if 0.4 < found.value < 0.999:
        assert known.rate_at(found.value, size) <= rate * (1 + 1e-6)
        assert known.rate_at(found.value - 2 * GRID, size) >= rate * (1 - 1e-6)
    assert found.low == pytest.approx(rate)
    assert found.high == pytest.approx(rate)


def test_clumped_hits_are_the_negative_binomial() -> None:
    """Probes whose rates differ by a gamma factor, by drawing them."""
    generator = np.random.default_rng(0)
    factor = generator.gamma(1 / 1.5, 1.5, 400_000)
    known = curve(clumping=1.5)
    fmr = 0.01 * np.exp(-(strength(0.5) - strength(0.4)) / 0.06)
    assert known.rate_at(0.5, 1000) == pytest.approx(np.mean(generator.poisson(1000 * fmr * factor) > 0), rel=0.02)


def test_without_clumping_it_is_the_power_of_independent_comparisons() -> None:
    fmr = float(0.01 * np.exp(-(strength(0.6) - strength(0.4)) / 0.06))
    assert curve().rate_at(0.6, 5000) == pytest.approx(1 - (1 - fmr) ** 5000, rel=1e-3)


def test_a_larger_gallery_and_a_lower_rate_raise_the_threshold() -> None:
    uncertain = curve(by_subjects=((0.04, 0.02, 0.01), (0.02, 0.02, 0.01), (0.01, 0.01, 0.01)), subjects_vary=0.3)
    by_size = [uncertain.at(size, 0.05).value for size in (1, 10, 100, 1000, 2000)]
    by_rate = [uncertain.at(100, rate).value for rate in (0.2, 0.1, 0.05, 0.01)]
    for values in (by_size, by_rate):
        assert values == sorted(values)
        assert len(set(values)) == len(values)


def test_what_is_uncertain_raises_the_threshold_and_widens_the_interval() -> None:
    plain, unsure = curve().at(200, 0.05), curve(by_prior=(0.0, 0.1)).at(200, 0.05)
    assert unsure.value > plain.value
    assert unsure.low < 0.05 * 0.7
    assert unsure.high > 0.05 * 1.2


def test_the_lift_is_that_of_shifted_scores() -> None:
    """Subjects nearer by a normal angle: the variance of log rates grows as the square of the hazard."""
    known, shift = curve(subjects_vary=0.2), np.random.default_rng(0).normal(size=200_000)
    hazards = [2 * s / np.sqrt(1 - s**2) / 0.06 for s in (0.4, 0.5)]
    width = np.sqrt(np.log1p(0.2)) / hazards[0]
    rates = np.exp(width * hazards[1] * shift)
    excess = float(strength(0.5) - strength(0.4))
    assert known.lifted(0.2, excess) == pytest.approx(rates.var() / rates.mean() ** 2, rel=0.1)


def test_the_largest_gallery_is_the_last_that_is_not_refused() -> None:
    known = curve(clumping=0.4)
    largest = known.largest(0.02)
    assert known.expected_hits(largest, 0.02) >= 1
    known.at(largest, 0.02)
    with pytest.raises(UserError, match=r"it takes 1; take about \d+ subjects like these"):
        known.at(int(largest * 1.01), 0.02)


@pytest.mark.parametrize("freedom", [3, 4, 6, 10, 30, 1000])
def test_the_quantile_is_students(freedom: int) -> None:
    assert student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=3e-3)


@given(st.floats(-0.999, 0.999))
def test_strength_and_score_are_inverse(score: float) -> None:
    assert score_of(float(strength(score))) == pytest.approx(score, abs=1e-7)


@pytest.mark.parametrize(
    ("size", "rate", "message"),
    [(0, 0.1, "a gallery of 0 subjects"), (5, 0.0, "FPIR 0 is not a target"), (5, float("nan"), "FPIR nan is not")],
)
def test_impossible_questions_are_refused(size: int, rate: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        curve().at(size, rate)
