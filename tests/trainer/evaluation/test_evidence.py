"""Errors by subject against loops over pairs, and intervals against populations whose rates are known."""

from itertools import combinations

import numpy as np
import pytest

from tests.trainer.evaluation.made_up import made_up
from trainer.evaluation import evidence, intervals, metrics
from trainer.evaluation.evidence import fnmr_at, lowest_costs, of_all_pairs, of_list
from trainer.evaluation.intervals import of_mean, of_rate, wilson
from trainer.evaluation.scores import pair_counts


def all_pairs(vectors: np.ndarray, labels: np.ndarray) -> tuple[metrics.ErrorCurve, evidence.Evidence]:
    curve = metrics.verification_curve(pair_counts(vectors, labels))
    return curve, of_all_pairs(vectors, labels, curve)


@pytest.mark.parametrize("block", [60, 1 << 22])
def test_each_subject_has_the_pairs_of_the_loop(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.evaluation.scores.BLOCK", block)
    vectors, labels = made_up(9, 4, 1.5)  # an EER so large that all pairs are counted
    vectors = np.sign(vectors) / 4  # scores are multiples of 1 / 8 in any order of summation, and many tie
    _, found = all_pairs(vectors, labels)
    rejected, accepted = np.zeros_like(found.rejected_SK), np.zeros_like(found.accepted_SK)
    dyads: dict[tuple[int, int], np.ndarray] = {}
    for i, j in combinations(range(len(labels)), 2):
        over = (vectors[i] @ vectors[j] >= found.thresholds_K).astype(int)
        if labels[i] == labels[j]:
            rejected[labels[i]] += 1 - over
        else:
            accepted[labels[i]] += over
            accepted[labels[j]] += over
            key = (min(labels[i], labels[j]), max(labels[i], labels[j]))
            dyads[key] = dyads.get(key, np.zeros(len(over), int)) + over
    assert (found.rejected_SK == rejected).all()
    assert (found.accepted_SK == accepted).all()
    assert (found.mated_S == 6).all()
    assert (found.non_mated_S == 4 * 32).all()
    sparse = found.fmr_K <= evidence.SPARSE
    assert sparse.any()
    if block > 1000:  # in small blocks the pairs of two subjects may be parted
        assert (found.dyads_K[sparse] == sum(np.square(one) for one in dyads.values())[sparse]).all()


def test_a_list_of_all_pairs_is_all_pairs() -> None:
    vectors, labels = made_up(9, 4, 1.0)
    vectors = np.sign(vectors) / 4
    curve, found = all_pairs(vectors, labels)
    pairs = np.array(list(combinations(range(len(labels)), 2)))
    scores = np.einsum("pd,pd->p", *(vectors[side] for side in pairs.T))
    listed = of_list(scores, np.equal(*labels[pairs].T), labels[pairs], curve)
    for name in ("rejected_SK", "accepted_SK", "dyads_K", "mated_S", "non_mated_S"):
        assert np.array_equal(getattr(listed, name), getattr(found, name)), name


def test_statistics_of_the_levels_are_those_of_the_curve() -> None:
    curve, found = all_pairs(*made_up(60, 6, 0.9))
    fmr, fnmr = found.fmr_K[None], found.fnmr_K[None]
    assert evidence.equal_errors(fmr, fnmr)[0] == pytest.approx(metrics.equal_error_rate(curve), rel=0.1)
    assert evidence.areas(fmr, fnmr)[0] == pytest.approx(metrics.area_under_curve(curve), abs=2e-3)
    assert lowest_costs(fmr, fnmr, 0.01)[0] == pytest.approx(metrics.minimum_cost(curve, 0.01), rel=0.1)
    at = float(curve.fnmr_T[np.argmax(curve.fmr_T <= 0.01)])
    assert fnmr_at(fmr, fnmr, np.array([0.01]))[0, 0] == pytest.approx(at, rel=0.2)


def test_intervals_hold_the_rates_of_the_population() -> None:
    """120 samples of a population; 95 % are meant, and 90 % would be noticed more often than not."""
    big, _ = all_pairs(*made_up(1500, 3, 0.55, seed=99))
    eer, threshold = metrics.equal_error_rate(big), metrics.tar_at_far(big, 1e-2).threshold
    assert threshold is not None
    place = np.searchsorted(big.thresholds_T, threshold)
    truth = {"eer": eer, "fmr": float(big.fmr_T[place]), "fnmr": float(big.fnmr_T[place])}
    truth["fnmr at"] = float(big.fnmr_T[np.argmax(big.fmr_T <= 1e-2)])
    hits = dict.fromkeys(truth, 0)
    for repetition in range(120):
        vectors, labels = made_up(150, 3, 0.55, seed=repetition)
        curve, found = all_pairs(vectors, labels)
        at = of_all_pairs(vectors, labels, curve, at=threshold)
        rate = float(curve.fnmr_T[np.argmax(curve.fmr_T <= 1e-2)])
        ends = {
            "eer": found.interval(metrics.equal_error_rate(curve), evidence.equal_errors, repetition, 300),
            "fmr": at.fmr_interval(0),
            "fnmr": at.fnmr_interval(0),
            "fnmr at": found.interval(
                rate, lambda fmr, fnmr: fnmr_at(fmr, fnmr, np.array([1e-2]))[:, 0], repetition, 300
            ),
        }
        for name, (low, high) in ends.items():
            hits[name] += low <= truth[name] <= high
    assert all(count >= 108 for count in hits.values()), hits


def test_two_views_of_a_subject_are_no_two_trials() -> None:
    """Every sample ten times over: the rates stay, and so must the intervals."""
    vectors, labels = made_up(80, 3, 0.7)
    curve, _ = all_pairs(vectors, labels)
    copied, copied_labels = np.repeat(vectors, 10, axis=0), np.repeat(labels, 10)
    threshold = float(np.quantile(vectors @ vectors.T, 0.97))
    once = of_all_pairs(vectors, labels, curve, at=threshold)
    copies_curve = metrics.verification_curve(pair_counts(copied, copied_labels))
    often = of_all_pairs(copied, copied_labels, copies_curve, at=threshold)
    assert often.fmr_K[0] == pytest.approx(once.fmr_K[0])
    width = np.diff(once.fmr_interval(0))[0]
    assert np.diff(often.fmr_interval(0))[0] == pytest.approx(width, rel=0.35)


def test_wilson_is_the_root_of_its_equation() -> None:
    for rate, trials in ((0.01, 300.0), (0.5, 12.0), (0.93, 77.5)):
        for end in wilson(rate, trials):
            assert (rate - end) ** 2 == pytest.approx(intervals.DEVIATE**2 * end * (1 - end) / trials)


def test_without_an_error_the_rule_of_three_stands() -> None:
    assert of_rate(0.0, 0.0, 10_000, 300) == (0.0, 0.01)
    assert of_rate(1.0, 0.0, 10_000, 300) == (0.99, 1.0)
    assert of_rate(0.0, 0.0, 2, 2) == (0.0, 1.0)
    assert of_mean(np.zeros(400), np.arange(400) // 4) == (0.0, 0.03)


def test_where_few_subjects_count_the_interval_is_wider() -> None:
    """The same variance of 100 subjects, made by all, or by four of them."""
    even = np.full(100, 0.001) * np.tile([1, -1], 50)
    few = np.zeros(100)
    few[:4] = np.array([1, -1, 1, -1]) * 0.005
    plain = of_rate(0.05, 1e-4, 10**9, 100)
    many, dominated = (of_rate(0.05, 1e-4, 10**9, 100, influence) for influence in (even, few))
    assert many == pytest.approx(plain, rel=0.03)
    # Student's 97.5 % quantile of 4 / (1/2 - 4/200) = 8.3 degrees is 2.29, and the variance is 1.25 times as large
    assert np.diff(dominated)[0] == pytest.approx(np.diff(plain)[0] * 2.29 / 1.96 * 1.25**0.5, rel=0.03)


def test_what_one_subject_more_adds_is_told_by_drawing_it_twice() -> None:
    vectors, labels = made_up(40, 3, 0.9)
    curve, found = all_pairs(vectors, labels)
    added = found.added(evidence.equal_errors)
    rates = []
    for subject in range(40):
        again = np.concatenate([np.arange(len(labels)), np.flatnonzero(labels == subject)])
        copied = np.concatenate([labels, np.full(3, 40)])
        own_curve, _ = all_pairs(vectors[again], copied)
        rates.append(metrics.equal_error_rate(own_curve) - metrics.equal_error_rate(curve))
    assert np.corrcoef(added, rates)[0, 1] > 0.6


def test_one_subject_shows_nothing() -> None:
    assert of_mean(np.array([0.0, 1.0]), np.array([7, 7])) == (0.0, 1.0)
