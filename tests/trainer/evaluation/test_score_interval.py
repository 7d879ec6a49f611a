"""Intervals of rates: how subjects are drawn, and the score interval."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.evaluation.metrics import score_interval, subject_weights


def test_subjects_are_drawn_with_replacement() -> None:
    weights = subject_weights(np.random.default_rng(0), 50, 2000)
    assert (weights.sum(axis=1) == 50).all()
    assert weights.mean(axis=0) == pytest.approx(np.ones(50), abs=0.12)
    assert weights.var() == pytest.approx(1 - 1 / 50, rel=0.02)


@given(st.floats(1e-6, 0.2), st.floats(0.01, 2))
def test_the_score_interval_solves_its_equation(rate: float, variation: float) -> None:
    variance = (variation * rate) ** 2
    low, high = score_interval(rate, variance)
    assert 0 < low < rate < high
    for end in (low, high):
        if end < 1:
            assert (rate - end) ** 2 == pytest.approx(1.959964**2 * variance * end / rate, rel=1e-5)


def test_the_score_interval_covers_poisson_counts_as_claimed() -> None:
    counts = np.random.default_rng(0).poisson(12.0, 4000) / 1000
    inside = [low <= 0.012 <= high for low, high in (score_interval(c, c / 1000) for c in counts)]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.02)
