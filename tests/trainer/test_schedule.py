"""Schedules as plain functions of the step."""

import math

import pytest

from trainer.config import ScheduleConfig
from trainer.schedule import learning_rate_factor, margin_factor


def test_warm_up_is_linear_and_meets_the_peak() -> None:
    config = ScheduleConfig(kind="cosine", warmup_steps=4)
    assert [learning_rate_factor(step, 20, config) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_cosine_halves_at_the_middle_and_ends_at_final() -> None:
    config = ScheduleConfig(kind="cosine", final=0.1)
    assert learning_rate_factor(50, 100, config) == pytest.approx(0.55)
    assert learning_rate_factor(100, 100, config) == pytest.approx(0.1)
    expected = 0.1 + 0.9 * (1 + math.cos(math.pi * 0.25)) / 2
    assert learning_rate_factor(25, 100, config) == pytest.approx(expected)


def test_polynomial_and_constant() -> None:
    config = ScheduleConfig(kind="polynomial", power=2)
    assert learning_rate_factor(50, 100, config) == pytest.approx(0.25)
    assert learning_rate_factor(99, 100, ScheduleConfig(kind="constant")) == 1.0


def test_a_warm_up_longer_than_the_run_still_ends() -> None:
    assert learning_rate_factor(9, 10, ScheduleConfig(warmup_steps=100)) == pytest.approx(10 / 11)


def test_margin_grows_to_its_value() -> None:
    config = ScheduleConfig(margin_warmup_steps=10)
    assert [margin_factor(step, config) for step in (0, 5, 10, 99)] == [0.0, 0.5, 1.0, 1.0]
    assert margin_factor(0, ScheduleConfig()) == 1.0
