import hashlib
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from trainer.data.samplers import PKSampler, SequentialSampler, ShuffledSampler
from trainer.data.tables import Classes
from trainer.errors import UserError

SHARDS = [10, 10, 3, 10, 10, 4]


def epoch_of(order: SequentialSampler | ShuffledSampler | PKSampler, epoch: int) -> list[np.ndarray]:
    return [order.positions(epoch, step) for step in range(order.steps_per_epoch)]


@pytest.mark.parametrize(("batch", "window"), [(1, 1), (8, 20), (8, 7), (47, 1000), (100, 1000), (5, 47), (16, 3)])
def test_every_sample_comes_once_an_epoch(batch: int, window: int):
    order = ShuffledSampler(SHARDS, batch, window, seed=3)
    for epoch in range(3):
        batches = epoch_of(order, epoch)
        assert sorted(np.concatenate(batches).tolist()) == list(range(47))
        assert [len(b) for b in batches[:-1]] == [batch] * (len(batches) - 1)


def test_order_depends_on_seed_and_epoch_and_on_nothing_else():
    first, again = ShuffledSampler(SHARDS, 8, 20, seed=3), ShuffledSampler(SHARDS, 8, 20, seed=3)
    reference = [np.concatenate(epoch_of(first, epoch)).tolist() for epoch in range(2)]
    assert np.concatenate([again.positions(1, step) for step in reversed(range(6))][::-1]).tolist() == reference[1]
    assert np.concatenate(epoch_of(again, 0)).tolist() == reference[0]
    assert reference[0] != reference[1]
    assert np.concatenate(epoch_of(ShuffledSampler(SHARDS, 8, 20, seed=4), 0)).tolist() != reference[0]


def test_asking_again_gives_the_same_and_changes_nothing():
    order = ShuffledSampler(SHARDS, 8, 20, seed=3)
    first = order.positions(0, 2).copy()
    order.positions(0, 2)[:] = -1
    np.testing.assert_array_equal(order.positions(0, 2), first)


def test_window_that_holds_all_mixes_all():
    order = ShuffledSampler([10] * 100, 100, 1000, seed=0)
    shards = order.positions(0, 0) // 10
    assert len(set(shards.tolist())) > 50


def test_small_window_keeps_to_few_shards():
    order = ShuffledSampler([10] * 100, 10, 20, seed=0)
    for batch in epoch_of(order, 1):
        assert len(set((batch // 10).tolist())) <= 2


def test_each_order_of_a_window_is_equally_likely():
    seen = Counter(tuple(ShuffledSampler([3], 3, 3, seed=seed).positions(0, 0).tolist()) for seed in range(1200))
    assert len(seen) == 6
    assert min(seen.values()) > 140  # 200 expected; 140 is 4.6 standard deviations away


def test_ten_million_identities_need_no_memory_but_the_windows():
    order = ShuffledSampler([10_000] * 10_000, 1024, 50_000, seed=0)
    batch = order.positions(7, 50_000)
    assert len(np.unique(batch)) == 1024
    assert len(np.unique(batch // 10_000)) <= 10


def test_sequential_is_the_order_of_the_shards():
    order = SequentialSampler(47, 10)
    assert np.concatenate(epoch_of(order, 5)).tolist() == list(range(47))
    assert order.steps_per_epoch == 5


Tables = tuple[Classes, np.ndarray, np.ndarray]


def tables_of(counts: list[int]) -> Tables:
    """Classes, by-class positions and labels."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts)).astype(np.uint32)
    return Classes.of([f"who {i}" for i in range(len(counts))], counts), np.argsort(labels, kind="stable"), labels


def pk(tables: Tables, p: int, batch_size: int, seed: int) -> PKSampler:
    return PKSampler(*tables[:2], p, batch_size, seed)


@pytest.fixture(params=["whole", "on demand"])
def either_deal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "on demand":
        monkeypatch.setattr("trainer.data.samplers.MOST_DEALT", 0)
    return request.param


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("counts", "p", "k"),
    [
        ([4] * 6, 3, 2),
        ([4] * 7, 3, 4),
        ([5, 9, 4, 30, 4, 6, 7], 4, 4),
        ([2, 2], 2, 2),
        ([20] * 50, 16, 5),
        ([1] * 11, 4, 1),
        ([100, 3, 3, 3, 3], 5, 3),
        ([8, 8, 8, 4, 4], 3, 2),
    ],
)
@pytest.mark.usefixtures("either_deal")
def test_every_batch_is_p_identities_of_k_samples(counts: list[int], p: int, k: int, seed: int):
    tables = tables_of(counts)
    labels, order = tables[2], pk(tables, p, p * k, seed)
    for epoch in range(4):
        batches = epoch_of(order, epoch)
        for batch in batches:
            assert len(set(batch.tolist())) == p * k  # no sample twice
            table = labels[batch].reshape(p, k)
            assert (table == table[:, :1]).all()  # rows p * k .. are one identity
            assert len(set(table[:, 0].tolist())) == p
        assert {int(c) for batch in batches for c in labels[batch]} == set(range(len(counts)))


@pytest.mark.usefixtures("either_deal")
def test_a_part_is_those_rows_of_the_batch():
    shuffled = ShuffledSampler(SHARDS, 10, 20, seed=3)
    for order in (shuffled, SequentialSampler(47, 10), pk(tables_of([6] * 9), 5, 10, 1)):
        for step in range(order.steps_per_epoch):
            whole = order.positions(2, step)
            for rows in (np.arange(3, 8), np.arange(10), np.array([9, 0])):
                np.testing.assert_array_equal(order.part(2, step, rows), whole[rows % len(whole)])


def test_a_part_looks_only_its_own_identities_up(monkeypatch: pytest.MonkeyPatch):
    order, looked_up = pk(tables_of([6] * 9), 5, 10, 1), []
    group = order._group
    monkeypatch.setattr(order, "_group", lambda *which: looked_up.append(which) or group(*which))
    order.part(0, 0, np.arange(4, 6))
    assert len(looked_up) == 1


@pytest.mark.usefixtures("either_deal")
def test_epoch_uses_all_groups_of_a_balanced_set_once():
    batches = epoch_of(pk(tables_of([8] * 6), 3, 12, 0), 0)
    assert sorted(np.concatenate(batches).tolist()) == list(range(48))


@pytest.mark.usefixtures("either_deal")
def test_left_over_samples_come_in_other_epochs():
    order = pk(tables_of([5] * 4), 2, 6, 0)
    seen = {int(i) for epoch in range(12) for batch in epoch_of(order, epoch) for i in batch}
    assert seen == set(range(20))


@pytest.mark.usefixtures("either_deal")
def test_batches_depend_on_seed_and_epoch_alone():
    first, again, other = (pk(tables_of([6] * 9), 4, 8, seed) for seed in (1, 1, 2))
    reference = epoch_of(first, 2)
    np.testing.assert_array_equal(again.positions(2, 3), reference[3])
    assert np.concatenate(epoch_of(again, 1)).tolist() != np.concatenate(reference).tolist()
    assert np.concatenate(epoch_of(other, 2)).tolist() != np.concatenate(reference).tolist()


def test_the_order_of_an_epoch_is_what_it_always_was():
    """A run that was begun with an earlier version must go on with the batches of that version."""
    digest = hashlib.sha256()
    for counts, p, k in (
        ([4] * 6, 3, 2), ([5, 9, 4, 30, 4, 6, 7], 4, 4), ([20] * 50, 16, 5), ([100, 3, 3, 3, 3], 5, 3),
        ([8, 8, 8, 4, 4], 3, 2),
    ):  # fmt: skip
        order = pk(tables_of(counts), p, p * k, 7)
        for epoch in range(2):
            for batch in epoch_of(order, epoch):
                digest.update(batch.astype("<i8").tobytes())
    assert digest.hexdigest() == "44942ef535648dba0927d4911e2c102dbb1ac127e9aa70c27607c5cc8f804db4"
    digest = hashlib.sha256()
    for epoch in range(2):
        for batch in epoch_of(ShuffledSampler(SHARDS, 8, 20, seed=3), epoch):
            digest.update(batch.astype("<i8").tobytes())
    assert digest.hexdigest() == "d14d529ff1debff9df544f6086f9868bafb50b4592ea876f71e19e33f690ab08"


def test_too_few_classes_say_how_many():
    with pytest.raises(UserError, match="identities_per_batch 4 is more than the 3 classes"):
        pk(tables_of([4] * 3), 4, 8, 0)


def test_class_with_too_few_samples_is_named():
    with pytest.raises(UserError, match=r"K = 4 .* class 'who 2' has 2 and 2 of 4 classes have fewer than 4; .*--min-"):
        pk(tables_of([4, 4, 2, 3]), 2, 8, 0)


@pytest.mark.parametrize("wrong", [-1, 24, 2**62])
def test_positions_that_the_split_does_not_have_are_refused(wrong: int):
    by_class = np.arange(24)
    by_class[5] = wrong
    sampler = PKSampler(Classes.of([f"c{i}" for i in range(6)], [4] * 6), by_class, 6, 24, seed=0)
    with pytest.raises(UserError, match=rf"class 'c1' has a sample at {wrong}, but the split has 24 samples"):
        sampler.positions(0, 0)


def made_up(**columns: list[int]) -> Classes:
    """The table of six classes of four samples, with other columns than it should have."""
    right = {"samples": [4] * 6, "end": [4, 8, 12, 16, 20, 24], "by_size": list(range(6))}
    return Classes(pa.table({"name": pa.array([f"c{i}" for i in range(6)]), **right, **columns}))


@pytest.mark.parametrize(
    "columns",
    [
        {"by_size": [99, 1, 2, 3, 4, 5]},
        {"by_size": [-1, 1, 2, 3, 4, 5]},
        {"samples": [2**40] * 6},
        {"samples": [-4] * 6},
        {"end": [2**40] * 6},
        {"end": [-4] * 6},
    ],
)
@pytest.mark.usefixtures("either_deal")
def test_a_table_that_contradicts_itself_is_refused(columns: dict[str, list[int]]):
    with pytest.raises(
        UserError, match=r"table of classes.*; (run 'hypersphere|import the data again)|class 'c0' has -4"
    ):
        PKSampler(made_up(**columns), np.arange(24), 6, 12, seed=0).positions(0, 0)
