"""Batches of P identities that are computed one by one; their common rules are tested with the sampler."""

from collections import Counter

import numpy as np
import pytest

from trainer.data.dealing import OnDemand, permuted


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_every_place_comes_once(size: int):
    for seed in range(5):
        assert sorted(permuted(np.arange(size), size, [seed]).tolist()) == list(range(size))


def test_a_place_does_not_depend_on_the_others_asked_for():
    whole = permuted(np.arange(1000), 1000, [1, 2])
    np.testing.assert_array_equal(permuted(np.array([3, 999, 3]), 1000, [1, 2]), whole[[3, 999, 3]])
    assert whole.tolist() != permuted(np.arange(1000), 1000, [1, 3]).tolist()


def test_orders_of_few_places_are_about_equally_likely():
    seen = Counter(tuple(permuted(np.arange(4), 4, [seed]).tolist()) for seed in range(4800))
    assert len(seen) == 24
    assert min(seen.values()) > 100  # 200 expected; 100 is 7 standard deviations away
    assert max(seen.values()) < 300


def test_neighbours_are_not_neighbours_afterwards():
    size = 10_000
    order = permuted(np.arange(size), size, [0])
    steps = np.abs(np.diff(order))
    # Two random places are size / 3 apart on average, with a standard deviation of size / sqrt(18).
    assert abs(steps.mean() - size / 3) < 5 * size / np.sqrt(18 * size)
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 5 / np.sqrt(size)


def test_each_round_is_dealt_whole_and_its_last_batch_is_full():
    by_size, sizes = np.array([4, 0, 2, 1, 3]), np.array([5, 3])
    deal = OnDemand(by_size, sizes, 2, [0, 0])
    assert deal.steps == 3 + 2
    for epoch in range(10):
        dealt = [deal(epoch, step) for step in range(deal.steps)]
        assert [groups.tolist() for _, groups in dealt] == [[0, 0]] * 3 + [[1, 1]] * 2
        rounds = [np.concatenate([classes for classes, _ in part]) for part in (dealt[:3], dealt[3:])]
        assert [set(classes.tolist()) for classes in rounds] == [{0, 1, 2, 3, 4}, {4, 0, 2}]
        assert rounds[0][3] == rounds[0][4]  # the last batch went back by one


def test_ten_million_identities_need_no_memory_but_the_batch():
    deal = OnDemand(np.broadcast_to(np.int64(7), 10_000_000), np.array([10_000_000, 9_000_000]), 256, [0, 0])
    assert deal.steps == -(-10_000_000 // 256) + -(-9_000_000 // 256)
    classes, groups = deal(3, deal.steps - 1)
    assert (classes.tolist(), groups.tolist()) == ([7] * 256, [1] * 256)
