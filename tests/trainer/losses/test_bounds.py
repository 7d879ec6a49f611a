"""Each bound is reached by the arrangement that it is about, and by nothing better."""

import math

import numpy as np
import pytest

from tests.trainer.losses.simplex import simplex
from trainer.errors import UserError
from trainer.losses.bounds import coco_scale, cosface_scale, cosine_margin, l2_softmax_scale


def softmax_of_first(logits: list[float]) -> float:
    return math.exp(logits[0]) / sum(math.exp(logit) for logit in logits)


@pytest.mark.parametrize(("classes", "dimension"), [(2, 1), (2, 5), (3, 2), (10, 9), (10, 32)])
def test_the_simplex_is_regular(classes: int, dimension: int) -> None:
    corners = simplex(classes, dimension)
    cosines = corners @ corners.T
    assert corners.shape == (classes, dimension)
    assert np.diag(cosines) == pytest.approx(np.ones(classes))
    assert cosines[~np.eye(classes, dtype=bool)] == pytest.approx(np.full(classes * (classes - 1), -1 / (classes - 1)))
    assert corners.sum(axis=0) == pytest.approx(np.zeros(dimension), abs=1e-12)


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
@pytest.mark.parametrize("probability", [0.5, 0.9, 0.999])
def test_a_simplex_reaches_the_probability_at_the_cosface_scale(classes: int, probability: float) -> None:
    scale = cosface_scale(classes, probability)
    logits = [scale] + [-scale / (classes - 1)] * (classes - 1)
    assert softmax_of_first(logits) == pytest.approx(probability)


def test_no_arrangement_beats_the_cosface_scale() -> None:
    generator = np.random.default_rng(0)
    scale = cosface_scale(8, 0.9)
    for _ in range(200):
        centres = generator.normal(size=(8, 7))
        centres /= np.linalg.norm(centres, axis=1, keepdims=True)
        logits = scale * centres @ centres.T  # features on their centres, the best that they can do on average
        probabilities = [softmax_of_first([row[i], *np.delete(row, i)]) for i, row in enumerate(logits)]
        assert np.exp(np.mean(np.log(probabilities))) < 0.9


@pytest.mark.parametrize("classes", [3, 100, 10_000])
@pytest.mark.parametrize("probability", [0.9, 0.99])
def test_orthogonal_classes_reach_the_probability_at_the_l2_softmax_scale(classes: int, probability: float) -> None:
    scale = l2_softmax_scale(classes, probability)
    assert softmax_of_first([scale] + [0.0] * (classes - 2)) == pytest.approx(probability)
    one_opposite = softmax_of_first([scale, -scale] + [0.0] * (classes - 2))
    assert one_opposite == pytest.approx(probability, abs=(1 - probability) ** 2 / (classes - 2) ** 2 * 2)


def test_published_scale() -> None:
    """The L2-softmax paper's figure: at 0.9 some 13 000 classes need a scale of about 12."""
    assert l2_softmax_scale(13_403, 0.9) == pytest.approx(11.7, abs=0.1)


@pytest.mark.parametrize("classes", [2, 3, 4, 9])
def test_a_circle_reaches_the_cosine_margin(classes: int) -> None:
    angles = 2 * np.pi * np.arange(classes) / classes
    centres = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    cosines = (centres @ centres.T)[~np.eye(classes, dtype=bool)]
    assert cosine_margin(classes, 2) == pytest.approx(1 - cosines.max())


@pytest.mark.parametrize(("classes", "dimension"), [(3, 3), (4, 3), (11, 10), (5, 64)])
def test_a_simplex_reaches_the_cosine_margin(classes: int, dimension: int) -> None:
    corners = simplex(classes, dimension)
    cosines = (corners @ corners.T)[~np.eye(classes, dtype=bool)]
    assert (
        cosine_margin(classes, dimension) == pytest.approx(1 - cosines.max()) == pytest.approx(classes / (classes - 1))
    )


@pytest.mark.parametrize(("classes", "dimension"), [(5, 3), (6, 3), (20, 10)])
def test_axes_and_their_opposites_reach_the_cosine_margin_of_more_classes(classes: int, dimension: int) -> None:
    axes = np.concatenate([np.eye(dimension), -np.eye(dimension)])[:classes]
    cosines = (axes @ axes.T)[~np.eye(classes, dtype=bool)]
    assert cosine_margin(classes, dimension) == 1 - cosines.max() < classes / (classes - 1)


def test_random_arrangements_stay_below_the_cosine_margin() -> None:
    generator = np.random.default_rng(2)
    for classes, dimension in [(4, 2), (4, 3), (5, 3), (12, 4)]:
        for _ in range(300):
            centres = generator.normal(size=(classes, dimension))
            centres /= np.linalg.norm(centres, axis=1, keepdims=True)
            largest = (centres @ centres.T)[~np.eye(classes, dtype=bool)].max()
            assert 1 - largest <= cosine_margin(classes, dimension) + 1e-12


@pytest.mark.parametrize("classes", [2, 10, 10_000])
@pytest.mark.parametrize("loss", [1e-4, 0.1, 1.0])
def test_opposite_centres_reach_the_loss_at_the_coco_scale(classes: int, loss: float) -> None:
    scale = coco_scale(classes, loss)
    reached = math.log1p((classes - 1) * math.exp(-2 * scale))
    assert reached == pytest.approx(loss)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: l2_softmax_scale(2, 0.9), "2 classes; it takes 3 or more"),
        (lambda: cosface_scale(1, 0.9), "1 classes; it takes 2 or more"),
        (lambda: cosface_scale(10, 1.0), "probability 1 cannot be reached"),
        (lambda: cosface_scale(10, float("nan")), "probability nan"),
        (lambda: cosine_margin(10, 1), "dimension 1 has no angles"),
        (lambda: coco_scale(10, 0.0), "loss 0 cannot be reached"),
    ],
)
def test_values_without_a_bound_are_errors(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(UserError, match=message):
        call()
