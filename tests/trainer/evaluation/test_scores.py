"""Blocks, cells and searches against plain loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import UserError
from trainer.evaluation import scores
from trainer.evaluation.scores import GRID, ceil_to_grid, cell, check, pair_counts, search_mated, search_non_mated


def unit(rows: int, dimension: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@given(st.floats(-1, 1, width=32), st.integers(-(2**20), 2**20))
def test_a_score_reaches_a_threshold_exactly_when_its_cell_does(score: float, steps: int) -> None:
    threshold = steps * GRID
    cells = cell(np.array([score, threshold], np.float32))
    assert (score >= threshold) == bool(cells[0] >= cells[1])


@given(st.floats(-1, 1))
def test_ceiling_to_the_grid_is_the_lowest_multiple_not_below(value: float) -> None:
    threshold = ceil_to_grid(value)
    assert threshold - GRID < value <= threshold
    assert np.float32(threshold) == threshold


def test_rounding_beyond_one_stays_in_the_last_cell() -> None:
    assert cell(np.array([-1.0000001, -1.0, 1.0, 1.0000001], np.float32)).tolist() == [0, 0, 2**21, 2**21]


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 22])
def test_pair_counts_are_those_of_the_double_loop(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(scores, "BLOCK", block)
    vectors = unit(23, 4, 0)
    labels = np.random.default_rng(1).integers(0, 6, 23)
    thresholds = [-0.5, 0.0, 0.25, 0.75]
    expected = {(t, mated): 0 for t in thresholds for mated in (True, False)}
    total = {True: 0, False: 0}
    for i in range(23):
        for j in range(i):
            mated = bool(labels[i] == labels[j])
            total[mated] += 1
            for t in thresholds:
                expected[t, mated] += float(vectors[i] @ vectors[j]) >= t
    counts = pair_counts(vectors, labels)
    assert (counts.mated.sum(), counts.non_mated.sum()) == (total[True], total[False])
    for t in thresholds:
        first = int(cell(np.array([t]))[0])
        assert counts.mated[first:].sum() == expected[t, True]
        assert counts.non_mated[first:].sum() == expected[t, False]


@pytest.mark.parametrize("block", [1, 50, 1 << 22])
def test_searches_of_a_gallery_with_several_samples_a_subject(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(scores, "BLOCK", block)
    gallery, probes = unit(17, 3, 2), unit(11, 3, 3)
    gallery_labels = np.random.default_rng(4).permutation(np.arange(17) % 5) * 10
    probe_labels = np.random.default_rng(5).integers(0, 5, 11) * 10
    mated = search_mated(gallery, gallery_labels, probes, probe_labels)
    strangers_P = search_non_mated(gallery, gallery_labels, probes)
    for p in range(11):
        best = {
            c: max(float(probes[p] @ g) for g, k in zip(gallery, gallery_labels, strict=True) if k == c)
            for c in range(0, 50, 10)
        }
        mate = best.pop(int(probe_labels[p]))
        assert mated.mate_P[p] == pytest.approx(mate, abs=1e-6)
        assert mated.ahead_P[p] == sum(score > mate for score in best.values())
        assert mated.tied_P[p] == 0
        assert mated.rival_P[p] == max(best, key=best.__getitem__)
        assert strangers_P[p] == pytest.approx(max(mate, *best.values()), abs=1e-6)


def test_duplicates_tie_and_do_not_count_as_ahead() -> None:
    vectors = np.repeat(unit(1, 512, 0), 6, axis=0)
    found = search_mated(vectors[:3], np.array([0, 1, 2]), vectors[3:], np.array([0, 1, 2]))
    assert found.ahead_P.tolist() == [0, 0, 0]
    assert found.tied_P.tolist() == [2, 2, 2]


def test_a_gallery_of_one_identity_has_no_rival() -> None:
    vectors = unit(3, 4, 0)
    found = search_mated(vectors[:2], np.array([7, 7]), vectors[2:], np.array([7]))
    assert (found.ahead_P.tolist(), found.tied_P.tolist(), found.rival_P.tolist()) == ([0], [0], [-1])


def test_a_probe_without_mate_is_a_fault() -> None:
    vectors = unit(3, 4, 0)
    with pytest.raises(ValueError, match="not in the gallery"):
        search_mated(vectors[:2], np.array([0, 1]), vectors[2:], np.array([2]))


@pytest.mark.parametrize(
    ("embeddings", "labels", "message"),
    [
        (np.ones((2, 3)), np.array([0, 1]), "embedding 0 has norm 1.732"),
        (np.array([[1.0, 0], [np.nan, 0]]), np.array([0, 1]), "embedding 1 has norm nan"),
        (np.array([[1.0, 0], [1e300, 0]]), np.array([0, 1]), "embedding 1 has norm inf"),
        (np.eye(2), np.array([0, 1, 2]), r"shape \(2, 2\) with labels of shape \(3,\)"),
        (np.empty((0, 4)), np.empty(0, int), "at least one sample"),
        (np.eye(2), np.array([0.0, 1.0]), "labels of type float64"),
    ],
)
def test_unusable_embeddings_are_refused(embeddings: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(embeddings, labels)


def test_half_precision_is_accepted() -> None:
    vectors, labels = check(unit(4, 64, 0).astype(np.float16), np.array([0, 1, 2, 3], np.int16))
    assert (vectors.dtype, labels.dtype) == (np.float32, np.int64)
