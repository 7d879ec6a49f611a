"""recall@k and mAP@R against all orders of what ties."""

from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.evaluation.made_up import made_up
from trainer.errors import UserError
from trainer.evaluation.retrieval import KS, average_precision, retrieval

candidates = st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6)


def orders(found: list[tuple[int, bool]]) -> list[list[bool]]:
    """Whether each is a mate, in every falling order of the scores."""
    falling = [order for order in permutations(found) if all(a[0] >= b[0] for a, b in pairwise(order))]
    return [[same for _, same in order] for order in falling]


@settings(max_examples=60, deadline=None)
@given(candidates)
def test_precision_is_the_mean_over_all_orders_of_ties(found: list[tuple[int, bool]]) -> None:
    mates = sum(same for _, same in found)
    if not mates:
        return
    expected = np.mean([
        sum(order[i] * sum(order[: i + 1]) / (i + 1) for i in range(mates)) / mates for order in orders(found)
    ])  # fmt: skip
    falling = sorted(found, key=lambda one: -one[0])
    scores = [-score for score, _ in falling]
    group = np.searchsorted(scores, scores)
    assert average_precision(np.array([same for _, same in falling]), group, mates) == pytest.approx(expected)


def test_everything_is_the_loop_over_queries() -> None:
    vectors, labels = made_up(12, 5, 1.2, dimension=6)
    found = retrieval(vectors, labels)
    recalls, precisions = np.zeros(len(KS)), []
    for i in range(len(labels)):
        order = sorted((j for j in range(len(labels)) if j != i), key=lambda j: -float(vectors[i] @ vectors[j]))
        same = [labels[j] == labels[i] for j in order]
        recalls += [any(same[:k]) for k in KS]
        precisions.append(sum(same[r] * sum(same[: r + 1]) / (r + 1) for r in range(4)) / 4)
    assert found.recall == pytest.approx(recalls / len(labels))
    assert found.map_at_r == pytest.approx(np.mean(precisions))
    assert found.map_interval[0] < found.map_at_r < found.map_interval[1]


def test_collapsed_embeddings_retrieve_by_chance() -> None:
    vectors = np.zeros((30, 4), np.float32)
    vectors[:, 0] = 1
    found = retrieval(vectors, np.arange(30) // 3)
    assert found.recall[0] == pytest.approx(2 / 29)
    assert found.map_at_r == pytest.approx((2 / 29 + 2 / 29 * (1 + 1 / 28) / 2) / 2)


def test_single_samples_are_no_queries() -> None:
    vectors, _ = made_up(5, 1, 0.0)
    with pytest.raises(UserError, match="none has another to retrieve"):
        retrieval(vectors, np.arange(5))
    assert retrieval(np.concatenate([vectors, vectors[:1]]), np.array([0, 1, 2, 3, 4, 0])).queries == 2
