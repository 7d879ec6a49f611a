"""The tail: exact weights of smaller galleries, the Pareto fit, and the variance of a rate that has two subjects."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trainer.evaluation.metrics import score_interval, subject_weights
from trainer.evaluation.nonmated import maximum_weights, pair_tail, search_tail
from trainer.evaluation.scores import GRID
from trainer.evaluation.tails import Pareto, Tail, fit, pareto_moments, replicate_rates, spread, strength


def unit(rows: int, dimension: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@given(st.integers(1, 8), st.data())
def test_the_weights_are_the_share_of_galleries_in_which_a_candidate_is_best(at_hand: int, data: st.DataObject) -> None:
    enrolled = data.draw(st.integers(1, at_hand))
    galleries = list(combinations(range(at_hand), enrolled))  # candidate 0 is the best, at_hand - 1 the worst
    expected = [sum(min(g) == j for g in galleries) / len(galleries) for j in range(at_hand - enrolled + 1)]
    assert maximum_weights(at_hand, enrolled) == pytest.approx(expected)


@pytest.mark.parametrize("gallery_size", [3, 7, 50])
def test_the_search_tail_is_the_mean_over_all_galleries(gallery_size: int) -> None:
    subjects = 8
    vectors, labels = unit(subjects, 3, 0), np.arange(subjects)  # one sample each: every round enrols the same
    tail = search_tail(vectors, labels, gallery_size, 1, seed=0)
    size = min(gallery_size, subjects - 1)
    for threshold in np.quantile(vectors @ vectors.T, [0.8, 0.9, 0.97]):
        rates = []
        for probe in range(subjects):
            others = [s for s in range(subjects) if s != probe]
            galleries = list(combinations(others, size))
            rates.append(
                np.mean(
                    [max(float(vectors[probe] @ vectors[g]) for g in gallery) >= threshold for gallery in galleries]
                )
            )
        if np.mean(rates) <= 0.3:
            assert tail.rate(threshold) == pytest.approx(np.mean(rates), abs=1e-6)


def test_the_search_tail_of_several_samples_takes_the_best_of_a_subject() -> None:
    vectors, labels = unit(40, 4, 1), np.arange(40) // 4
    tail = search_tail(vectors, labels, 9, samples_per_subject=4, seed=0)  # all samples are enrolled: one gallery
    best = [max(float(vectors[i] @ vectors[j]) for j in range(40) if labels[i] != labels[j]) for i in range(40)]
    threshold = float(np.quantile(best, 0.8))
    assert tail.rate(threshold) == pytest.approx(np.mean(np.array(best) >= threshold))
    assert tail.trials == 40


def test_a_small_gallery_of_many_subjects_is_drawn_from_some_of_them() -> None:
    vectors, labels = unit(600, 4, 2), np.arange(600) // 2
    tail = search_tail(vectors, labels, 2, 1, seed=0)
    fmr = np.mean(
        [float(vectors[i] @ vectors[j]) >= 0.97 for i in range(0, 600, 2) for j in range(600) if i // 2 != j // 2]
    )
    assert tail.rate(0.97) == pytest.approx(1 - (1 - fmr) ** 2, rel=0.15)


def test_the_pair_tail_holds_the_highest_pairs_of_different_subjects() -> None:
    vectors, labels = unit(40, 4, 0), np.random.default_rng(0).integers(0, 12, 40)
    tail = pair_tail(vectors, labels, 0.1)
    pairs = [(float(vectors[i] @ vectors[j]), {labels[i], labels[j]}) for i in range(40) for j in range(i)]
    pairs = sorted((p for p in pairs if len(p[1]) == 2), key=lambda p: -p[0])
    assert tail.trials == len(pairs)
    assert len(tail.scores_E) >= 0.1 * len(pairs)
    names = np.unique(labels)
    for k, (score, who) in enumerate(pairs[: len(tail.scores_E)]):
        assert tail.scores_E[k] == pytest.approx(score, abs=1e-6)
        assert {names[tail.first_E[k]], names[tail.second_E[k]]} == who
    assert tail.rate(pairs[9][0] - 1e-6) == pytest.approx(10 / len(pairs))


@pytest.mark.parametrize("shape", [-0.4, -0.1, 0.0, 0.2])
def test_moments_recover_a_pareto_tail(shape: float) -> None:
    uniform = np.random.default_rng(0).random(40_000)
    excess = -np.log(uniform) if shape == 0 else (uniform**-shape - 1) / shape
    found_shape, found_scale = pareto_moments(np.sort(0.05 * excess)[::-1], np.ones((1, 40_000)))
    assert found_shape[0] == pytest.approx(shape, abs=0.02)
    assert found_scale[0] == pytest.approx(0.05, rel=0.03)


def test_a_weight_of_two_is_the_same_as_two_hits() -> None:
    excess = np.sort(np.random.default_rng(0).random(50))[::-1]
    twice = np.repeat(excess, 2)
    weights = np.ones((1, 50))
    once = np.concatenate(pareto_moments(excess, weights))
    assert np.concatenate(pareto_moments(excess, 2 * weights)) == pytest.approx(once)
    assert np.concatenate(pareto_moments(twice, np.ones((1, 100)))) == pytest.approx(once)


@given(st.floats(-0.5, 0.4), st.floats(0.001, 0.1), st.floats(1e-6, 0.09))
def test_rate_and_quantile_of_a_pareto_tail_are_inverse(shape: float, scale: float, rate: float) -> None:
    tail = Pareto(0.4, 0.1, shape, scale)
    threshold = tail.quantile(rate)
    assume(threshold < 1)  # where no score below 1 is rare enough, there is none to be had
    assert tail.rate(threshold) <= rate * (1 + 1e-6)
    assert tail.rate(threshold - 2 * GRID) >= rate * (1 - 1e-6)


def test_the_tail_beyond_its_end_has_rate_zero() -> None:
    end = np.sqrt(1 - np.exp(-(strength(np.array(0.4)) + 0.1 / 0.5)))
    tail = Pareto(0.4, 0.1, -0.5, 0.1)
    assert tail.rate(end + 1e-6) == 0 < tail.rate(end - 1e-2)


@given(st.floats(-1, 1), st.floats(-1, 1))
def test_strength_keeps_the_order_of_scores(one: float, other: float) -> None:
    low, high = sorted([one, other])
    assert strength(np.array(low)) <= strength(np.array(high))
    assert strength(np.array(-one)) == -strength(np.array(one))


def test_directions_that_are_alike_have_an_exponential_tail_of_strength() -> None:
    scores = np.random.default_rng(0).normal(size=(200_000, 9))
    scores = np.sort(scores[:, 0] / np.linalg.norm(scores, axis=1))[::-1][:2000]
    excess = strength(scores) - strength(scores[-1:])
    shape, scale = pareto_moments(excess, np.ones((1, 2000)))
    assert shape[0] == pytest.approx(0, abs=0.08)
    assert scale[0] == pytest.approx(2 / 8, rel=0.12)  # (1 - t^2)^((D - 1) / 2) in 9 dimensions


def tail_of(shares: np.ndarray, scores: np.ndarray | None = None) -> Tail:
    """A tail with a share per ordered pair of subjects, [S, S]."""
    first, second = np.nonzero(shares)
    scores = np.linspace(0.9, 0.5, len(first)) if scores is None else scores
    mass = np.ones(len(shares))
    return Tail(scores, shares[first, second], first, second, second, mass, mass, len(shares) ** 2, 1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000))
def test_the_bootstrap_has_the_variance_that_two_way_clustering_states(seed: int) -> None:
    """Product weights shrunk by the factor: their variance, computed by the sum over all pairs of hits."""
    generator = np.random.default_rng(seed)
    shares = np.where(generator.random((12, 12)) < 0.2, generator.random((12, 12)), 0.0)
    np.fill_diagonal(shares, 0)
    shares[0, 1] = 1.0
    parts = spread(tail_of(shares))
    k = parts.shrinkage
    assert 0.6 < k <= 1
    assert k**2 * parts.subjects + k**4 * min(parts.pairs, parts.subjects / 2) == pytest.approx(
        parts.subjects - min(parts.pairs, parts.subjects / 2)
    )


def test_variance_of_independent_pairs_is_that_of_a_count() -> None:
    """Hits at random among 300 subjects: the replicates vary like the count itself, not three times as much."""
    generator = np.random.default_rng(0)
    variances, counts = [], []
    for _ in range(30):
        hit = np.triu(generator.random((300, 300)) < 0.002, 1)
        tail = tail_of(hit / 44_850)
        rates = replicate_rates(tail, 0.0, generator, 400, None)
        variances.append(rates.var() * 44_850**2)
        counts.append(hit.sum())
    assert np.mean(variances) == pytest.approx(np.mean(counts), rel=0.15)


def test_variance_of_hits_that_share_a_subject_is_that_of_the_subjects() -> None:
    """A tenth of the subjects answers all their searches: one in ten is what varies."""
    generator = np.random.default_rng(0)
    shares = np.zeros((100, 100))
    shares[:, :10] = 1 / 9900
    np.fill_diagonal(shares, 0)
    rates = replicate_rates(tail_of(shares), 0.0, generator, 2000, None)
    assert rates.mean() == pytest.approx(0.1, rel=0.03)
    assert rates.std() == pytest.approx(np.sqrt(0.1 * 0.9 / 100), rel=0.15)


def test_replicates_of_a_fitted_tail_vary_about_the_fit() -> None:
    generator = np.random.default_rng(0)
    hit = np.triu(generator.random((200, 200)) < 0.02, 1)
    strengths = 0.3 + np.sort(generator.exponential(0.05, int(hit.sum())))[::-1]
    tail = tail_of(hit / 19_900, np.sqrt(1 - np.exp(-strengths)))
    pareto = fit(tail)
    threshold = float(np.sqrt(1 - np.exp(-0.5)))  # four scales above the start
    rates = replicate_rates(tail, threshold, generator, 500, pareto.start)
    assert rates.mean() == pytest.approx(pareto.rate(threshold), rel=0.1)
    assert pareto.rate(threshold) == pytest.approx(0.02 * np.exp(-4), rel=0.4)
    assert 0.1 < rates.std() / rates.mean() < 1


def test_a_tail_without_hits_above_the_threshold_has_rate_zero() -> None:
    tail = tail_of(np.triu(np.ones((5, 5)), 1) / 10)
    assert tail.rate(0.95) == 0
    assert replicate_rates(tail, 0.95, np.random.default_rng(0), 10, None).tolist() == [0.0] * 10


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
