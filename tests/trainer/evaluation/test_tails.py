"""The fitted tail: the highest scores by brute force, the fit, and the variance of a rate that has two subjects."""

import numpy as np
import pytest

from trainer.errors import UserError
from trainer.evaluation import nonmated
from trainer.evaluation.nonmated import Hits, highest
from trainer.evaluation.tails import fit, information, scores_of


def unit(rows: int, dimension: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("block", [64, 1 << 22])
def test_the_hits_are_the_highest_scores_with_other_subjects(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.evaluation.scores.BLOCK", block)
    labels = np.sort(np.random.default_rng(0).integers(0, 12, 40))
    vectors = unit(40, 4, 0)
    hits = highest(vectors, labels, 40, 20, seed=0)  # all samples are enrolled: the best of each subject counts
    names = np.unique(labels)
    best = {
        (p, b): max(float(vectors[p] @ vectors[i]) for i in range(40) if labels[i] == names[b])
        for p in range(40)
        for b in range(len(names))
        if names[b] != labels[p]
    }
    expected = sorted(best.values(), reverse=True)
    assert len(hits.scores_E) == hits.pairs_of(20) == 2 * 20 * 40 // len(names) + 1
    assert hits.scores_E == pytest.approx(expected[: len(hits.scores_E)], abs=1e-6)
    for score, probe, first, second in zip(hits.scores_E, hits.probe_E, hits.first_E, hits.second_E, strict=True):
        assert best[probe, second] == pytest.approx(score, abs=1e-6)
        assert names[first] == labels[probe]
    assert hits.comparisons == len(best)


def test_each_gallery_enrols_another_sample_of_every_subject() -> None:
    vectors, labels = unit(60, 3, 1), np.repeat(np.arange(20), 3)
    hits = highest(vectors, labels, 1, 190, seed=0)
    assert hits.galleries == 3
    assert len(hits.scores_E) == hits.comparisons == 3 * 60 * 19
    all_pairs = [float(vectors[i] @ vectors[j]) for i in range(60) for j in range(60) if labels[i] != labels[j]]
    assert hits.scores_E == pytest.approx(sorted(all_pairs, reverse=True), abs=1e-6)


def test_many_probes_search_one_gallery(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nonmated, "ONE_ROUND", 60)
    assert highest(unit(60, 3, 1), np.repeat(np.arange(20), 3), 1, 50, seed=0).galleries == 1


def hits_of(scores: np.ndarray, first: np.ndarray, second: np.ndarray, subjects: int) -> Hits:
    """Scores of pairs, each of which is found from both sides."""
    order = np.argsort(-scores, kind="stable")
    probe = np.stack([first[order], second[order]], axis=1).ravel()
    other = np.stack([second[order], first[order]], axis=1).ravel()
    turn = np.zeros(len(probe), np.int64)
    return Hits(np.repeat(scores[order], 2), probe, probe, other, turn, np.ones(subjects, np.int64), 1, 1)


def pareto_hits(shape: float, generator: np.random.Generator, count: int, subjects: int = 300) -> Hits:
    uniform = generator.random(count)
    excess = 0.06 * (-np.log(uniform) if shape == 0 else (uniform**-shape - 1) / shape)
    pairs = np.stack(np.triu_indices(subjects, 1))[:, generator.choice(subjects * (subjects - 1) // 2, count, False)]
    return hits_of(np.sqrt(-np.expm1(-(0.2 + excess))), pairs[0], pairs[1], subjects)


@pytest.mark.parametrize("shape", [-0.3, -0.1, 0.0, 0.2])
def test_many_hits_give_the_pareto_tail_that_they_are_from(shape: float) -> None:
    tail = fit(pareto_hits(shape, np.random.default_rng(0), 40_000), 40_000, "FPIR")
    assert tail.curve.shape == pytest.approx(shape, abs=0.02)
    assert tail.curve.scale == pytest.approx(0.06, rel=0.03)
    assert tail.curve.share == pytest.approx(40_000 / (300 * 299 / 2))
    assert tail.misfit > 0.01


def test_few_hits_leave_the_shape_to_the_prior() -> None:
    shapes = [fit(pareto_hits(0.4, np.random.default_rng(k), 20), 20, "FPIR").curve.shape for k in range(20)]
    assert np.mean(shapes) < 0.15


def test_the_score_is_the_derivative_of_the_density() -> None:
    z = np.array([0.1, 0.7, 2.5])

    def log_density(log_scale: float, shape: float) -> np.ndarray:
        inside = 1 + shape * z / np.exp(log_scale)
        return -log_scale - (1 / shape + 1) * np.log(inside)

    step = 1e-5
    for shape in (-0.2, 0.15):
        by_scale = (log_density(step, shape) - log_density(-step, shape)) / (2 * step)
        by_shape = (log_density(0.0, shape + step) - log_density(0.0, shape - step)) / (2 * step)
        assert scores_of(z, shape) == pytest.approx(np.column_stack([by_scale, by_shape]), abs=1e-6)
    assert scores_of(z, 1e-6) == pytest.approx(scores_of(z, 2e-4), abs=2e-3)


def test_the_information_is_the_variance_of_the_score() -> None:
    uniform = np.random.default_rng(0).random(400_000)
    for shape in (-0.2, 0.0, 0.2):
        z = -np.log(uniform) if shape == 0 else (uniform**-shape - 1) / shape
        assert np.cov(scores_of(z, shape).T) == pytest.approx(information(shape), rel=0.1)


def test_variance_of_independent_pairs_is_that_of_a_count() -> None:
    """Not three times as much, as resampling both roles alone would say."""
    found = []
    for seed in range(30):
        curve = fit(pareto_hits(0.0, np.random.default_rng(seed), 200), 200, "FPIR").curve
        g = np.array([1.0, 0.0, 0.0])
        found.append(g @ np.array(curve.by_subjects) @ g - g @ np.array(curve.by_pairs) @ g)
    assert np.mean(found) == pytest.approx(1 / 200, rel=0.15)


def test_the_stated_variance_is_the_variance_of_fits() -> None:
    """Of log FMR far beyond the start, over fits to independent hits of one tail, with the prior's part."""
    logs, stated = [], []
    for seed in range(200):
        curve = fit(pareto_hits(0.02, np.random.default_rng(seed), 150), 150, "FPIR").curve
        excess = 0.06 * 4
        logs.append(np.log(curve.rate_at(np.sqrt(-np.expm1(-(0.2 + excess))), 1)))
        sampling, _, _ = curve.variances(excess, 1)
        stated.append(sampling)
    # the number of hits is fixed in these fits, and lies lower by the start's place: its part of 1 / 150 is missing
    assert np.mean(stated) == pytest.approx(np.var(logs), rel=0.3)


def test_a_subject_that_answers_all_is_seen_in_the_variance() -> None:
    generator = np.random.default_rng(0)
    first, second = (part.copy() for part in np.triu_indices(100, 1))
    wolves = (first < 10) != (second < 10)
    scores = np.sqrt(-np.expm1(-(0.2 + generator.exponential(0.06, len(first)) + 0.12 * wolves)))
    even = fit(hits_of(scores, *generator.permuted(np.stack([first, second]), axis=1), 100), 300, "FPIR").curve
    wild = fit(hits_of(scores, first, second, 100), 300, "FPIR").curve
    assert wild.subjects_vary > 5 * even.subjects_vary
    assert wild.gallery_varies > 5 * even.gallery_varies
    assert wild.clumping > even.clumping
    assert wild.variances(0.0, 100)[0] > 2 * even.variances(0.0, 100)[0]


def test_scores_of_two_kinds_do_not_fit() -> None:
    hits = pareto_hits(0.0, np.random.default_rng(0), 2000)
    hits.scores_E[:400] = np.linspace(0.9999, 0.999, 400)  # a fifth are copies
    assert fit(hits, 2000, "FPIR").misfit < 1e-6


def test_equal_scores_are_named() -> None:
    hits = pareto_hits(0.0, np.random.default_rng(0), 500)
    hits.scores_E[:] = 0.5
    with pytest.raises(
        UserError, match=r"the 1000 highest non-mated scores are all 0.5: no threshold tells them apart"
    ):
        fit(hits, 500, "FPIR")
