import numpy as np
import pytest
from numpy.typing import NDArray

from trainer.data.curate.noise import find_suspects, find_twins
from trainer.errors import UserError

CLASSES, EACH, DIMENSION = 30, 12, 24


def persons(scatter: float = 0.15, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Unit vectors around 30 directions, and their labels."""
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((CLASSES, DIMENSION))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    labels = np.repeat(np.arange(CLASSES), EACH)
    vectors = centres[labels] + scatter * generator.standard_normal((len(labels), DIMENSION))
    return unit(vectors), labels


def unit(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_planted_labels_are_found_and_the_right_one_is_named() -> None:
    vectors, labels = persons()
    wrong = np.arange(5, len(labels), 36)
    given = labels.copy()
    given[wrong] = (labels[wrong] + 7) % CLASSES
    found = find_suspects(vectors, given, CLASSES)
    assert sorted(found.positions.tolist()) == wrong.tolist()
    assert found.nearest.tolist() == labels[found.positions].tolist()
    assert found.fits.all()
    assert (found.deviations > 5).all()
    assert (np.diff(found.own - found.other) >= 0).all()  # the most likely first


def test_the_cosines_are_those_of_the_plain_loop() -> None:
    vectors, labels = persons()
    given = labels.copy()
    given[40] = 0
    found = find_suspects(vectors, given, CLASSES)
    (position,) = found.positions.tolist()
    others = np.array([row for row in range(len(labels)) if given[row] == 0 and row != 40])
    mean = vectors[others].mean(axis=0)
    assert position == 40
    assert found.own[0] == pytest.approx(float(vectors[40] @ mean / np.linalg.norm(mean)), abs=1e-5)
    kept = np.array([row for row in range(len(labels)) if given[row] == found.nearest[0] and row != 40])
    mean = vectors[kept].mean(axis=0)
    assert found.other[0] == pytest.approx(float(vectors[40] @ mean / np.linalg.norm(mean)), abs=1e-5)


def test_a_stranger_fits_nowhere() -> None:
    vectors, labels = persons()
    vectors[100] = unit(np.random.default_rng(5).standard_normal((1, DIMENSION)))[0]
    found = find_suspects(vectors, labels, CLASSES)
    assert found.positions.tolist() == [100]
    assert not found.fits[0]


def test_the_odd_picture_of_the_right_person_is_no_suspect() -> None:
    vectors, labels = persons()
    own = vectors[labels == 3].mean(axis=0)
    away = np.linalg.svd(np.stack([vectors[labels == label].mean(axis=0) for label in range(CLASSES)]))[2][-1]
    vectors[38] = unit((0.6 * own / np.linalg.norm(own) + 0.8 * away / np.linalg.norm(away))[np.newaxis])[0]
    assert len(find_suspects(vectors, labels, CLASSES).positions) == 0


def test_alone_in_its_class_a_sample_is_no_suspect() -> None:
    vectors, labels = persons()
    labels = np.append(labels, CLASSES)
    vectors = np.concatenate([vectors, vectors[:1]])
    assert len(find_suspects(vectors, labels, CLASSES + 1).positions) == 0


def test_without_noise_next_to_nothing_is_suspected() -> None:
    vectors, labels = persons(scatter=0.25)
    assert len(find_suspects(vectors, labels, CLASSES).positions) <= 3


def test_classes_that_are_one_person_are_found_whatever_their_size() -> None:
    vectors, labels = persons()
    given = labels.copy()
    planted = {(2, CLASSES): 6, (9, CLASSES + 1): 3, (20, CLASSES + 2): 10}
    for (whole, part), samples in planted.items():
        given[np.flatnonzero(labels == whole)[:samples]] = part
    found = find_twins(vectors, given, CLASSES + 3, np.ones(len(given), bool))
    assert set(zip(found.first.tolist(), found.second.tolist(), strict=True)) == set(planted)
    assert (np.diff(found.similarity) <= 0).all()
    # the plain cosine of the means sinks with the number of samples: none of these reaches 0.9
    for pair in planted:
        one, two = (vectors[given == label].mean(axis=0) for label in pair)
        assert one @ two < 0.9 * np.linalg.norm(one) * np.linalg.norm(two)


def test_samples_that_are_left_out_do_not_count() -> None:
    vectors, labels = persons()
    kept = labels != 4
    vectors[labels == 4] = vectors[labels == 5]
    assert len(find_twins(vectors, labels, CLASSES, np.ones(len(labels), bool)).first) == 1
    assert len(find_twins(vectors, labels, CLASSES, kept).first) == 0


@pytest.mark.parametrize("deviations", [0, -1, float("nan")])
def test_a_distance_that_is_none_is_refused(deviations: float) -> None:
    vectors, labels = persons()
    with pytest.raises(UserError, match=r"--distance .* is not allowed; give a number above 0"):
        find_suspects(vectors, labels, CLASSES, deviations)


@pytest.mark.parametrize("alike", [0, 3, float("nan")])
def test_a_similarity_that_is_none_is_refused(alike: float) -> None:
    vectors, labels = persons()
    with pytest.raises(UserError, match=r"--alike .* is not allowed"):
        find_twins(vectors, labels, CLASSES, np.ones(len(labels), bool), alike)
