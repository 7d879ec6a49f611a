"""The probability of a mate against the truth of a made-up population."""

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression

from benchmarks.calibration import population
from trainer.errors import UserError
from trainer.evaluation.probability import MateProbability, mate_probability


def pairs(subjects: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    vectors = population("independent", subjects, 4, np.random.default_rng(seed))
    labels = np.repeat(np.arange(subjects), 4)
    upper = np.triu_indices(len(labels), 1)
    return (vectors @ vectors.T)[upper], (labels[:, None] == labels)[upper]


def fitted(prior: float = 0.3) -> MateProbability:
    vectors = population("independent", 150, 4, np.random.default_rng(0))
    found = mate_probability(vectors, vectors, np.repeat(np.arange(150), 4), prior, seed=0)
    assert found is not None
    return found


@pytest.mark.parametrize("prior", [0.3, 0.01])
def test_the_probability_is_the_share_of_mates_in_fresh_pairs(prior: float) -> None:
    vectors = population("independent", 1200, 4, np.random.default_rng(0))
    model = mate_probability(vectors, vectors, np.repeat(np.arange(1200), 4), prior, seed=0)
    assert model is not None
    scores, mated = pairs(1200, 1)
    weights = np.where(mated, prior / mated.sum(), (1 - prior) / (~mated).sum())
    for low, high in ((0.3, 0.45), (0.45, 0.55), (0.55, 0.7)):
        inside = (scores >= low) & (scores < high)
        truth = np.average(mated[inside], weights=weights[inside])
        scores_, place = np.unique(np.round(scores[inside], 3), return_inverse=True)
        told = np.average(np.array([model.probability(float(s)) for s in scores_])[place], weights=weights[inside])
        assert told == pytest.approx(truth, abs=0.06)
    assert min(model.ece_platt, model.ece_isotonic) < 0.02


def test_another_prior_moves_the_odds() -> None:
    model = fitted(0.5)
    odds = [p / (1 - p) for p in (model.probability(0.5), model.probability(0.5, prior=0.1))]
    assert odds[1] == pytest.approx(odds[0] / 9)
    assert model.probability(-1.0) > 0
    assert model.probability(1.0) < 1


def test_the_isotonic_steps_are_those_of_another_implementation() -> None:
    vectors = population("independent", 60, 4, np.random.default_rng(3))
    labels = np.repeat(np.arange(60), 4)
    model = mate_probability(vectors, vectors, labels, 0.5, seed=0)
    assert model is not None
    bins = np.floor(((vectors @ vectors.T) + 1) * 2048)
    other = ~np.eye(240, dtype=bool)
    mated = (labels[:, None] == labels)[other]
    x, weights = bins[other], np.where(mated, 1 / mated.sum(), 1 / (~mated).sum())
    share = IsotonicRegression().fit(x, mated, sample_weight=weights).predict(x)
    inner = (share > 0) & (share < 1)
    told = np.array(model.ratios)[np.searchsorted(np.array(model.scores), x / 2048 - 1 + 1 / 4096, side="right") - 1]
    assert np.log(share[inner] / (1 - share[inner])) == pytest.approx(told[inner], abs=1e-4)


def test_separated_scores_stay_finite() -> None:
    vectors = np.repeat(np.eye(40, dtype=np.float32), 3, axis=0)
    model = mate_probability(vectors, vectors, np.repeat(np.arange(40), 3), 0.5, seed=0)
    assert model is not None
    assert 0.9 < model.probability(1.0) < 1
    assert 0 < model.probability(0.0) < 0.1


def test_too_few_mated_pairs_give_none() -> None:
    vectors = population("independent", 40, 1, np.random.default_rng(0))
    assert mate_probability(vectors, vectors, np.arange(40), 0.5, seed=0) is None


@pytest.mark.parametrize("prior", [0.0, 1.0, float("nan")])
def test_a_prior_that_is_none_is_refused(prior: float) -> None:
    with pytest.raises(UserError, match="leaves nothing to be found out"):
        mate_probability(np.zeros((1, 2), np.float32), np.zeros((1, 2), np.float32), np.zeros(1, int), prior, 0)
    with pytest.raises(UserError, match="leaves nothing to be found out"):
        fitted().probability(0.5, prior)
