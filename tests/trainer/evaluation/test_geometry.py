"""Neural collapse and angles: exact on constructed frames, and equal to loops on random features."""

import numpy as np
import pytest

from tests.trainer.losses.simplex import simplex
from trainer.errors import UserError
from trainer.evaluation import geometry
from trainer.evaluation.geometry import angles, neural_collapse


def collapsed(classes: int, dimension: int, samples: int, centre: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Every sample on its corner of a simplex of radius 3, the whole moved by `centre`."""
    return np.repeat(3 * simplex(classes, dimension) + centre, samples, axis=0), np.repeat(np.arange(classes), samples)


def spread_features(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(6), 9)
    features = generator.normal(size=(6, 4))[labels] + 0.5 * generator.normal(size=(54, 4))
    return features, labels, generator.normal(size=(6, 4))


@pytest.mark.parametrize(("classes", "dimension", "centre"), [(2, 4, 0.0), (5, 4, 0.7), (10, 16, -2.0)])
def test_a_simplex_is_fully_collapsed(classes: int, dimension: int, centre: float) -> None:
    features, labels = collapsed(classes, dimension, 4, centre)
    w = 7 * simplex(classes, dimension)
    found = neural_collapse(features, labels, w, -w @ np.full(dimension, centre))
    for name, value in found.items():
        expected = 1 if name.endswith("agreement") else 0
        assert value == pytest.approx(expected, abs=1e-9), name


def test_random_features_are_not_collapsed() -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(20), 10)
    found = neural_collapse(generator.normal(size=(200, 32)), labels, generator.normal(size=(20, 32)))
    assert found["within_between"] > 1
    assert found["equiangular_features"] > 0.1
    assert found["self_duality"] == pytest.approx(np.sqrt(2), abs=0.2)  # two directions that know nothing of each other
    assert found["nearest_centre_agreement"] < 0.3


def test_within_between_is_the_trace_of_the_paper() -> None:
    features, labels, _ = spread_features()
    means = np.array([features[labels == c].mean(axis=0) for c in range(6)])
    within = sum(np.outer(d, d) for d in features - means[labels]) / len(features)
    between = sum(np.outer(d, d) for d in means - means.mean(axis=0)) / 6
    expected = np.trace(within @ np.linalg.pinv(between)) / 6
    assert neural_collapse(features, labels)["within_between"] == pytest.approx(expected)


def test_within_between_uses_the_pseudo_inverse_where_classes_span_less_than_the_space() -> None:
    generator = np.random.default_rng(3)
    labels = np.repeat(np.arange(3), 8)
    features = 3 * simplex(3, 10)[labels] + 0.1 * generator.normal(size=(24, 10))
    means = np.array([features[labels == c].mean(axis=0) for c in range(3)])
    within = (features - means[labels]).T @ (features - means[labels]) / 24
    between = (means - means.mean(axis=0)).T @ (means - means.mean(axis=0)) / 3
    expected = np.trace(within @ np.linalg.pinv(between, rcond=1e-10)) / 3
    assert neural_collapse(features, labels)["within_between"] == pytest.approx(expected)


@pytest.mark.parametrize("rows", [1, 4, 1024])
def test_the_other_measures_are_those_of_the_loops(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(geometry, "ROWS", rows)
    features, labels, centres = spread_features()
    bias = np.linspace(-1, 1, 6)
    found = neural_collapse(features, labels, centres, bias)
    means = np.array([features[labels == c].mean(axis=0) for c in range(6)])
    centred = means - features[:].reshape(6, 9, 4).mean(axis=(0, 1))
    for kind, vectors in (("features", centred), ("centres", centres)):
        norms = [np.linalg.norm(v) for v in vectors]
        cosines = [vectors[i] @ vectors[j] / norms[i] / norms[j] for i in range(6) for j in range(6) if i != j]
        assert found[f"equinorm_{kind}"] == pytest.approx(np.std(norms) / np.mean(norms))
        assert found[f"equiangular_{kind}"] == pytest.approx(np.std(cosines))
        assert found[f"maximal_angle_{kind}"] == pytest.approx(np.mean(np.abs(np.array(cosines) + 1 / 5)))
    difference = centres / np.linalg.norm(centres) - centred / np.linalg.norm(centred)
    assert found["self_duality"] == pytest.approx(np.sqrt(np.square(difference).sum()))
    same = 0
    for x in features:
        decided = max(range(6), key=lambda c: centres[c] @ x + bias[c])
        same += decided == min(range(6), key=lambda c: np.linalg.norm(x - means[c]))
    assert found["nearest_centre_agreement"] == pytest.approx(same / 54)


def test_features_of_one_point_are_not_separated_at_all() -> None:
    found = neural_collapse(np.ones((6, 3)), np.repeat([0, 1], 3))
    assert found["within_between"] == float("inf")


def test_measures_without_centres_are_left_out() -> None:
    features, labels, _ = spread_features()
    assert set(neural_collapse(features, labels)) == {
        "within_between",
        "equinorm_features",
        "equiangular_features",
        "maximal_angle_features",
    }


def test_float32_features_are_measured_in_double_precision() -> None:
    features, labels = collapsed(5, 8, 3)
    found = neural_collapse(features.astype(np.float32), labels, simplex(5, 8).astype(np.float32))
    assert found["equiangular_features"] < 1e-6
    assert found["self_duality"] == pytest.approx(0, abs=1e-6)


def test_what_has_no_collapse_is_an_error() -> None:
    features, labels, centres = spread_features()
    with pytest.raises(UserError, match="two classes or more"):
        neural_collapse(features, np.zeros(54, int))
    with pytest.raises(UserError, match=r"class centres of shape \(5, 4\) do not fit 6 classes"):
        neural_collapse(features, labels, centres[:5])
    with pytest.raises(UserError, match="labels 1 to 6"):
        neural_collapse(features, labels + 1, centres)


@pytest.mark.parametrize("rows", [2, 1024])
def test_angles_are_those_of_the_loops(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(geometry, "ROWS", rows)
    features, labels, _ = spread_features()
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    centres = np.array([unit[labels == c].mean(axis=0) for c in range(6)])
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    found = angles(features, labels)
    degrees = [np.degrees(np.arccos(u @ centres[c])) for u, c in zip(unit, labels, strict=True)]
    between = {(i, j): np.degrees(np.arccos(centres[i] @ centres[j])) for i in range(6) for j in range(6) if i != j}
    assert found.intra_N == pytest.approx(degrees)
    assert found.intra_mean == pytest.approx(np.mean(degrees))
    assert found.nearest_C == pytest.approx([min(between[i, j] for j in range(6) if i != j) for i in range(6)])
    assert found.inter_smallest == pytest.approx(min(between.values()))
    assert found.inter_histogram.sum() == 15
    assert (
        found.inter_histogram.tolist()
        == np.histogram([between[i, j] for i, j in between if i < j], 180, (0, 180))[0].tolist()
    )
    assert len(found.intra_N) == 54


def test_tiny_angles_keep_their_digits() -> None:
    features = np.array([[1, 1e-9], [1, -1e-9], [-1, 0.0]])
    assert angles(features, np.array([0, 0, 1])).intra_N[:2] == pytest.approx(np.degrees([1e-9, 1e-9]))


def test_what_has_no_angle_is_an_error() -> None:
    with pytest.raises(UserError, match="feature 1 has length 0"):
        angles(np.array([[1.0, 0], [0, 0], [0, 1]]), np.array([0, 0, 1]))
    with pytest.raises(UserError, match="mean of class 0 has length 0"):
        angles(np.array([[1.0, 0], [-1, 0], [0, 1]]), np.array([0, 0, 1]))
    with pytest.raises(UserError, match="two classes or more"):
        angles(np.eye(3), np.zeros(3, int))
