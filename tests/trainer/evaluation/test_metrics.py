"""Error rates against their definitions, written as loops over scores."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from trainer.errors import UserError
from trainer.evaluation.metrics import (
    area_under_curve,
    equal_error_rate,
    fnir_at_fpir,
    identification_curve,
    match_characteristic,
    minimum_cost,
    missed_P,
    rank1_P,
    tar_at_far,
    ten_fold_accuracy,
    threshold_at,
    verification_curve,
)
from trainer.evaluation.scores import CELLS, GRID, MatedSearches, PairCounts, cell

# scores on a coarse grid, so that ties within and between mated and non-mated ones are common
score_lists = st.lists(st.integers(-8, 8).map(lambda k: k / 8), min_size=1, max_size=40)


def counts(mated: list[float], non_mated: list[float]) -> PairCounts:
    return PairCounts(*(np.bincount(cell(np.array(s, np.float32)), minlength=CELLS) for s in (mated, non_mated)))


@settings(max_examples=25, deadline=None)
@given(score_lists, score_lists)
def test_the_curve_is_the_definition_at_every_threshold(mated: list[float], non_mated: list[float]) -> None:
    curve = verification_curve(counts(mated, non_mated))
    for threshold, fmr, fnmr in zip(curve.thresholds_T, curve.fmr_T, curve.fnmr_T, strict=True):
        assert fmr == sum(s >= threshold for s in non_mated) / len(non_mated)
        assert fnmr == sum(s < threshold for s in mated) / len(mated)
    assert (curve.fmr_T[0], curve.fnmr_T[0], curve.fmr_T[-1], curve.fnmr_T[-1]) == (1, 0, 0, 1)
    assert (np.diff(curve.fmr_T) <= 0).all()
    assert (np.diff(curve.fnmr_T) >= 0).all()


@settings(max_examples=25, deadline=None)
@given(score_lists, score_lists)
def test_the_area_is_the_chance_that_a_mated_pair_scores_higher(mated: list[float], non_mated: list[float]) -> None:
    wins = sum((m > n) + (m == n) / 2 for m in mated for n in non_mated) / len(mated) / len(non_mated)
    area = area_under_curve(verification_curve(counts(mated, non_mated)))
    assert area == pytest.approx(wins, abs=1e-12)
    truth = [1] * len(mated) + [0] * len(non_mated)
    assert area == pytest.approx(roc_auc_score(truth, mated + non_mated), abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(score_lists, score_lists)
def test_the_equal_error_rate_lies_where_the_rates_cross(mated: list[float], non_mated: list[float]) -> None:
    curve = verification_curve(counts(mated, non_mated))
    rate = equal_error_rate(curve)
    points = list(zip(curve.fmr_T, curve.fnmr_T, strict=True))
    crossings = [(a, b) for a, b in pairwise(points) if a[0] > a[1] and b[0] <= b[1]]
    ((fmr_a, fnmr_a), (fmr_b, fnmr_b)) = crossings[0]
    assert min(fmr_a, fmr_b) - 1e-12 <= rate <= max(fmr_a, fmr_b) + 1e-12
    assert min(fnmr_a, fnmr_b) - 1e-12 <= rate <= max(fnmr_a, fnmr_b) + 1e-12


def test_chance_and_perfection() -> None:
    chance = verification_curve(counts([0.5] * 7, [0.5] * 90))
    assert (equal_error_rate(chance), area_under_curve(chance)) == (0.5, 0.5)
    perfect = verification_curve(counts([0.75] * 7, [0.5] * 90))
    assert (equal_error_rate(perfect), area_under_curve(perfect)) == (0, 1)
    backwards = verification_curve(counts([0.25] * 7, [0.5] * 90))
    assert (equal_error_rate(backwards), area_under_curve(backwards)) == (1, 0)


def test_the_equal_error_rate_of_two_normal_distributions() -> None:
    generator = np.random.default_rng(0)
    mated, non_mated = generator.normal(0.6, 0.1, 100_000), generator.normal(0.2, 0.1, 100_000)
    curve = verification_curve(counts(mated.tolist(), non_mated.tolist()))
    assert equal_error_rate(curve) == pytest.approx(0.02275, abs=0.001)  # Phi(-2)


@settings(max_examples=25, deadline=None)
@given(score_lists, score_lists, st.sampled_from([0.05, 0.25, 0.5, 0.9]))
def test_tar_is_the_best_that_keeps_the_far(mated: list[float], non_mated: list[float], far: float) -> None:
    few = counts(mated, non_mated)
    point = tar_at_far(
        verification_curve(PairCounts(few.mated, few.non_mated * 600)), far
    )  # enough to resolve the rates
    assert point.tar is not None
    assert point.threshold is not None
    reachable = [t for t in (*mated, *non_mated, 2.0) if sum(s >= t for s in non_mated) <= far * len(non_mated)]
    assert point.tar == pytest.approx(max(sum(s >= t for s in mated) / len(mated) for t in reachable))
    assert sum(s >= point.threshold for s in non_mated) <= far * len(non_mated)
    assert sum(s >= point.threshold - GRID for s in non_mated) > far * len(non_mated)


def test_a_far_that_the_pairs_do_not_resolve_has_a_reason_instead_of_a_value() -> None:
    curve = verification_curve(counts([0.9] * 10, [0.1] * 29_999))
    assert tar_at_far(curve, 1e-2).tar == 1
    point = tar_at_far(curve, 1e-3)
    assert (point.tar, point.threshold) == (None, None)
    assert point.reason == "29999 non-mated pairs do not resolve FAR 0.001; it takes 30000"


@pytest.mark.parametrize(("mated", "non_mated"), [([], [0.1]), ([0.1], [])])
def test_one_kind_of_pairs_gives_no_rates(mated: list[float], non_mated: list[float]) -> None:
    with pytest.raises(UserError, match="at least two identities"):
        verification_curve(counts(mated, non_mated))


def searches(ahead: list[int], tied: list[int]) -> MatedSearches:
    nothing = np.zeros(len(ahead))
    return MatedSearches(nothing.astype(np.float32), np.array(ahead), np.array(tied), nothing.astype(np.int64))


def test_cmc_counts_the_mates_among_the_first_k() -> None:
    found = searches([0, 2, 1, 7], [0, 0, 0, 0])
    assert match_characteristic(found, 4).tolist() == [0.25, 0.5, 0.75, 0.75]
    assert rank1_P(found).tolist() == [1, 0, 0, 0]


@given(st.integers(0, 6), st.integers(0, 6))
def test_ties_are_broken_by_lot_in_expectation(ahead: int, tied: int) -> None:
    places = [ahead + 1 + k for k in range(tied + 1)]  # equally likely ranks of the mate
    expected = [sum(place <= k for place in places) / len(places) for k in range(1, 15)]
    assert match_characteristic(searches([ahead], [tied]), 14) == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(score_lists, st.floats(0.001, 0.999))
def test_the_threshold_is_the_lowest_that_keeps_the_rate(non_mated: list[float], rate: float) -> None:
    assume(abs(rate * len(non_mated) - round(rate * len(non_mated))) > 1e-6)
    threshold = threshold_at(np.array(non_mated, np.float32), rate)
    assert sum(s >= threshold for s in non_mated) <= rate * len(non_mated)
    if threshold > -1:
        assert sum(s >= threshold - GRID for s in non_mated) > rate * len(non_mated)


def test_an_exact_share_is_allowed() -> None:
    scores = np.arange(100, dtype=np.float32) / 100
    assert np.count_nonzero(scores >= threshold_at(scores, 0.07)) == 7
    assert threshold_at(np.array([0.5], np.float32), 0.01) == 0.5 + GRID
    assert threshold_at(np.ones(5, np.float32), 0.1) == 1 + GRID  # nothing is accepted


def test_fnir_at_fpir_and_its_limit() -> None:
    non_mated = np.arange(300, dtype=np.float32) / 300
    mated = replace(searches([0, 0, 1], [0, 0, 0]), mate_P=np.array([0.2, 0.995, 0.999], np.float32))
    point = fnir_at_fpir(mated, non_mated, 0.01)
    assert point.fnir == pytest.approx(1 / 3)
    assert point.fnir_rank1 == pytest.approx(2 / 3)
    assert point.threshold == pytest.approx(296 / 300, abs=2 * GRID)
    short = fnir_at_fpir(mated, non_mated[:299], 0.01)
    assert (short.fnir, short.fnir_rank1, short.threshold) == (None, None, None)
    assert short.reason == "299 non-mated probes do not show FPIR 0.01; it takes 300"


@settings(max_examples=25, deadline=None)
@given(score_lists, score_lists)
def test_the_identification_curve_is_the_definition(mated: list[float], non_mated: list[float]) -> None:
    curve = identification_curve(np.array(mated, np.float32), np.array(non_mated, np.float32))
    for threshold, fpir, fnir in zip(*curve, strict=True):
        assert fpir == pytest.approx(sum(s >= threshold for s in non_mated) / len(non_mated))
        assert fnir == pytest.approx(sum(s < threshold for s in mated) / len(mated))


def test_ten_fold_accuracy_is_the_double_loop() -> None:
    generator = np.random.default_rng(0)
    mated = generator.random(200) < 0.5
    scores = np.clip(generator.normal(np.where(mated, 0.4, 0.2), 0.15), -1, 1).astype(np.float32)
    folds = np.arange(200) % 10
    accuracies = ten_fold_accuracy(scores, mated, folds)
    for fold in range(10):
        train = [(s, m) for s, m, f in zip(scores, mated, folds, strict=True) if f != fold]
        correct = {float(t): sum((s >= t) == m for s, m in train) for t in [*(s for s, _ in train), 2.0]}
        best = min(t for t in correct if correct[t] == max(correct.values()))
        below = max(float(s) for s, _ in train if s < best)  # any threshold in (below, best] decides the others alike
        test = [(s, m) for s, m, f in zip(scores, mated, folds, strict=True) if f == fold]
        assert accuracies[fold] == sum((s >= (below + best) / 2) == m for s, m in test) / len(test)


def test_ten_fold_accuracy_of_separated_scores_is_one() -> None:
    mated = np.arange(100) % 2 == 0
    assert ten_fold_accuracy(np.where(mated, 0.6, 0.3), mated, np.arange(100) // 10).tolist() == [1.0] * 10


@settings(max_examples=50, deadline=None)
@given(score_lists, score_lists)
def test_the_curve_is_that_of_scikit_learn(mated: list[float], non_mated: list[float]) -> None:
    curve = verification_curve(counts(mated, non_mated))
    truth = [1] * len(mated) + [0] * len(non_mated)
    fpr, tpr, thresholds = roc_curve(truth, mated + non_mated, drop_intermediate=False)
    assert curve.fmr_T[::-1] == pytest.approx(fpr, abs=1e-12)
    assert 1 - curve.fnmr_T[::-1] == pytest.approx(tpr, abs=1e-12)
    assert curve.thresholds_T[::-1][1:] == pytest.approx(thresholds[1:], abs=1e-12)  # the first of each accepts nothing


@settings(max_examples=50, deadline=None)
@given(score_lists, score_lists, st.sampled_from([0.001, 0.01, 0.5, 0.9]))
def test_the_minimum_cost_is_that_of_the_loop_over_thresholds(
    mated: list[float], non_mated: list[float], prior: float
) -> None:
    costs = [
        prior * sum(s < t for s in mated) / len(mated) + (1 - prior) * sum(s >= t for s in non_mated) / len(non_mated)
        for t in (*mated, *non_mated, 2.0)
    ]
    expected = min(costs) / min(prior, 1 - prior)
    assert minimum_cost(verification_curve(counts(mated, non_mated)), prior) == pytest.approx(expected)
    assert expected <= 1 + 1e-12


search_lists = st.lists(st.tuples(st.integers(-4, 4), st.lists(st.integers(-4, 4), max_size=6)), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(search_lists, st.integers(1, 4), st.integers(-4, 5))
def test_fnir_is_the_mean_over_all_orders_of_ties(
    found: list[tuple[int, list[int]]], rank: int, threshold: int
) -> None:
    """FNIR(N, R, T) by its definition: candidates in order of score, what ties in every order."""
    missed = []
    for mate, others in found:
        ahead, tied = sum(o > mate for o in others), sum(o == mate for o in others)
        places = [ahead + k for k in range(tied + 1)]
        missed.append(np.mean([not (place < rank and mate >= threshold) for place in places]))
    searched = MatedSearches(
        np.array([mate / 4 for mate, _ in found], np.float32),
        np.array([sum(o > mate for o in others) for mate, others in found]),
        np.array([sum(o == mate for o in others) for mate, others in found]),
        np.zeros(len(found), np.int64),
    )
    assert missed_P(searched, threshold / 4, rank) == pytest.approx(missed)
    assert missed_P(searched, threshold / 4) == pytest.approx([float(mate < threshold) for mate, _ in found])


def test_nan_scores_are_refused() -> None:
    scores = np.array([0.1, np.nan, 0.3, np.nan], np.float32)
    for measure in (cell, lambda s: ten_fold_accuracy(s, s > 0, np.arange(4)), lambda s: identification_curve(s, s)):
        with pytest.raises(UserError, match=r"of . scores are nan"):
            measure(scores)
