"""The head on one rank: every margin in both algorithms against the oracle, numerics at their edges, bad input."""

import pytest
import torch

from tests.trainer.head_cases import MARGINS, compare
from trainer.config import HeadConfig


@pytest.mark.parametrize("algorithm", ["store", "recompute"])
@pytest.mark.parametrize("name", MARGINS)
def test_equals_the_papers_formula(name: str, algorithm: str) -> None:
    compare(name, HeadConfig(algorithm=algorithm, tile=7), batch=10)


@pytest.mark.parametrize("algorithm", ["store", "recompute"])
@pytest.mark.parametrize("name", [name for name, margin in MARGINS.items() if margin.unit_rows])
def test_rows_with_a_length_are_divided_by_it(name: str, algorithm: str) -> None:
    compare(name, HeadConfig(algorithm=algorithm, rows="free", tile=7), batch=10)
