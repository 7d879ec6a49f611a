"""Thresholds against fresh subjects of the same population: the promised rate is reached as often as claimed."""

import numpy as np
import pytest

from benchmarks.calibration import Draw, repetition
from trainer.errors import UserError
from trainer.evaluation import calibration
from trainer.evaluation.calibration import HeldOut, calibrate, identify_threshold, verify_threshold
from trainer.evaluation.report import Calibration
from trainer.evaluation.scores import GRID

DIMENSION = 16
SCALES = np.exp(
    -2 * np.arange(DIMENSION) / DIMENSION
)  # some directions are crowded: subjects differ in their lookalikes


def population(subjects: int, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(subjects, 1, DIMENSION))
    vectors = ((centres + 1.2 * generator.normal(size=(subjects, samples, DIMENSION))) * SCALES).reshape(-1, DIMENSION)
    labels = np.repeat(np.arange(subjects), samples)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), labels


def held(vectors: np.ndarray, labels: np.ndarray, seed: int = 0) -> HeldOut:
    return HeldOut(vectors, labels, "m", "simulated", seed)


REPETITIONS = 400


@pytest.fixture(scope="module", params=["independent", "families", "anisotropic", "wolves"])
def draws(request: pytest.FixtureRequest) -> list[Draw]:
    """What 400 calibrations on 50 subjects with 5 samples promise, and what a gallery of others reaches."""
    numbers = range(REPETITIONS)
    return [draw for number in numbers for draw in repetition(request.param, 50, [5], 3000, number, (1, 2))]


@pytest.mark.parametrize("growth", [1, 2])
def test_a_real_gallery_reaches_the_interval_as_often_as_claimed(draws: list[Draw], growth: int) -> None:
    """An interval that holds 0.90 instead of 0.95 is found out with 95 % probability; one that holds all, too."""
    told = [draw for draw in draws if (draw.target, draw.rate, draw.growth) == ("FPIR", 0.05, growth)]
    assert len(told) == REPETITIONS
    reached, low, high = (
        np.array([getattr(draw, name) for draw in told], float) for name in ("reached", "low", "high")
    )
    covered, above = np.mean((low <= reached) & (reached <= high)), np.mean(reached > high)
    assert 0.925 <= covered <= 0.99
    assert above <= 0.04 + 1.64 * np.sqrt(0.04 * 0.96 / REPETITIONS)
    assert 1 / 1.2 <= np.mean(reached) / 0.05 <= 1.2


def test_what_is_below_one_expected_hit_is_refused_in_every_repetition(draws: list[Draw]) -> None:
    assert all(draw.reached is not None for draw in draws if 250 * draw.rate / draw.growth >= 1.1)
    vectors, labels = population(50, 5, 0)
    with pytest.raises(UserError, match=r"cannot tell FPIR 0.01 with 500 enrolled: 0.25 false positives are expected"):
        identify_threshold(held(vectors, labels), fpir=0.01, gallery_size=500)
    allowed, _ = identify_threshold(held(vectors, labels), fpir=0.01, gallery_size=500, least_hits=0)
    assert allowed.expected_hits == pytest.approx(0.25, rel=0.05)
    assert "extrapolated below 1 expected false positive, as was allowed" in allowed.source


def test_the_curve_has_the_thresholds_of_other_sizes() -> None:
    vectors, labels = population(100, 5, 0)
    threshold, curve = identify_threshold(held(vectors, labels), fpir=0.05, gallery_size=100)
    again = curve.at(100, 0.05)
    assert (again.value, again.low, again.high) == (threshold.value, threshold.low, threshold.high)
    alone, _ = identify_threshold(held(vectors, labels), fpir=0.05, gallery_size=300)
    assert curve.at(300, 0.05).value == pytest.approx(alone.value, abs=1e-9)


@pytest.mark.parametrize("fmr", [1e-2, 1e-4])
def test_the_reached_fmr_lies_in_the_interval_as_often_as_claimed(fmr: float) -> None:
    fresh, _ = population(2000, 1, 1)
    others, _ = population(2000, 1, 2)
    scores = np.sort((fresh @ others.T).ravel())
    inside, reached = 0, []
    for repetition_ in range(60):
        vectors, labels = population(80, 4, 100 + repetition_)
        threshold = verify_threshold(held(vectors, labels, repetition_), fmr=fmr)
        reached.append(1 - np.searchsorted(scores, threshold.value) / len(scores))
        inside += threshold.low <= reached[-1] <= threshold.high
    assert inside >= 53  # claimed 57 of 60
    assert np.mean(reached) == pytest.approx(fmr, rel=0.2)


def test_a_calibration_says_what_it_is_for() -> None:
    vectors, labels = population(60, 6, 0)
    found = calibrate(
        HeldOut(vectors, labels, "digest", "val of made-up people", seed=1), fpir=0.1, fmr=1e-3, gallery_size=50
    )
    assert Calibration.model_validate_json(found.model_dump_json()) == found
    verify, identify = found.verify, found.identify
    assert (verify.target, verify.rate, verify.gallery_size) == ("FMR", 1e-3, 1)
    assert (identify.target, identify.rate, identify.gallery_size) == ("FPIR", 0.1, 50)
    assert (identify.probes, identify.subjects, identify.model_id) == (360, 60, "digest")
    assert identify.source.startswith("val of made-up people: generalised Pareto tail of 360 non-mated probes of 60 ")
    assert "36 false positives expected" in identify.source
    assert identify.misfit is not None
    assert found.curve is not None
    for threshold in (verify, identify):
        assert threshold.low < threshold.rate < threshold.high
        assert threshold.value == np.float32(threshold.value)
        assert (threshold.value / GRID).is_integer()
    again = calibrate(
        HeldOut(vectors, labels, "digest", "val of made-up people", seed=1), fpir=0.1, fmr=1e-3, gallery_size=50
    )
    assert again == found


def test_with_many_pairs_the_threshold_is_nearly_the_quantile() -> None:
    vectors, labels = population(300, 4, 0)
    threshold = verify_threshold(held(vectors, labels), fmr=0.01)
    scores = (vectors @ vectors.T)[labels[:, None] != labels]
    assert np.mean(scores >= threshold.value) == pytest.approx(0.01, rel=0.08)
    assert threshold.low > 0.0075


def test_more_subjects_more_samples_and_lower_rates_raise_the_threshold() -> None:
    vectors, labels = population(120, 6, 0)

    def value(gallery_size: int, fpir: float, samples: int = 1) -> float:
        return identify_threshold(held(vectors, labels), fpir, gallery_size, samples)[0].value

    by_size = [value(size, 0.1) for size in (5, 30, 119, 1000, 5000)]
    assert by_size == sorted(by_size)
    assert value(119, 0.02) > value(119, 0.1)
    assert value(119, 0.1, samples=3) > value(119, 0.1)


def test_few_subjects_carry_the_rule_of_three() -> None:
    vectors, labels = population(60, 20, 0)
    few, _ = identify_threshold(held(vectors, labels), fpir=0.03, gallery_size=50)
    assert "rule of three: 60 subjects without one error would show FPIR <= 0.05" in few.source
    enough, _ = identify_threshold(held(vectors, labels), fpir=0.05, gallery_size=50)
    assert "rule of three" not in enough.source


def test_few_subjects_and_copies_are_named() -> None:
    vectors, labels = population(40, 4, 0)
    vectors[0] = vectors[5]
    found, _ = identify_threshold(held(vectors, labels), fpir=0.1, gallery_size=40)
    assert "40 subjects are few: the interval was simulated with 50 and more" in found.source
    assert "2 comparisons of different subjects have score 1: duplicates or wrong labels" in found.source


def test_one_sample_of_each_subject_is_enough() -> None:
    vectors, labels = population(80, 1, 0)
    found = calibrate(held(vectors, labels), fpir=0.1, fmr=0.01, gallery_size=80)
    assert found.identify.low < 0.1 < found.identify.high


@pytest.mark.parametrize(
    ("fpir", "gallery_size", "samples", "message"),
    [
        (0.0, 10, 1, "FPIR 0 is not a target; choose a rate above 0 and at most 0.2"),
        (0.5, 10, 1, "FPIR 0.5 is not a target"),
        (float("nan"), 10, 1, "FPIR nan is not a target"),
        (0.1, 0, 1, "a gallery of 0 subjects"),
        (0.1, 10, 0, "with 0 samples each"),
        (
            1e-4,
            1_000_000,
            1,
            "120 non-mated probes of 40 subjects cannot tell FPIR 0.0001 with 1000000 enrolled: .* are expected",
        ),
    ],
)
def test_what_cannot_be_calibrated_is_an_error(fpir: float, gallery_size: int, samples: int, message: str) -> None:
    vectors, labels = population(40, 3, 0)
    with pytest.raises(UserError, match=message):
        identify_threshold(held(vectors, labels), fpir, gallery_size, samples)


def test_the_subjects_that_an_error_asks_for_are_enough() -> None:
    vectors, labels = population(40, 3, 0)
    with pytest.raises(UserError, match=r"take about (9\d) subjects") as refused:
        identify_threshold(held(vectors, labels), fpir=0.03, gallery_size=800)
    more, more_labels = population(int(str(refused.value).split("take about ")[1].split()[0]), 3, 0)
    threshold, _ = identify_threshold(held(more, more_labels), fpir=0.03, gallery_size=800)
    assert "extended from" in threshold.source


def test_too_few_pairs_for_an_fmr_are_an_error() -> None:
    vectors, labels = population(40, 3, 0)
    with pytest.raises(UserError, match=r"7020 non-mated pairs of 40 subjects cannot tell FMR 1e-07: 0.0007 false"):
        verify_threshold(held(vectors, labels), fmr=1e-7)


def test_a_cap_keeps_as_many_samples_of_every_subject(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, labels = population(30, 8, 0)
    monkeypatch.setattr(calibration, "MAX_PROBES", 90)
    found = calibrate(held(vectors, labels), fpir=0.1, fmr=0.01, gallery_size=20)
    assert (found.identify.probes, found.identify.subjects) == (90, 30)
    assert (found.verify.probes, found.verify.subjects) == (90, 30)
    assert "of 90 non-mated probes" in found.identify.source


def test_too_few_subjects_are_an_error() -> None:
    vectors, labels = population(9, 30, 0)
    with pytest.raises(UserError, match="9 subjects are too few"):
        calibrate(held(vectors, labels), gallery_size=5)


@pytest.mark.parametrize("gallery_size", [10, 49, 500])
def test_collapsed_embeddings_have_no_threshold(gallery_size: int) -> None:
    vectors = np.zeros((500, 4), np.float32)
    vectors[:, 0] = 1
    with pytest.raises(UserError, match=r"highest non-mated scores are all 1: no threshold tells them apart"):
        identify_threshold(held(vectors, np.arange(500) // 10), fpir=0.1, gallery_size=gallery_size)


def test_a_vector_that_is_none_is_named() -> None:
    vectors, labels = population(20, 3, 0)
    vectors[7] = np.nan
    with pytest.raises(UserError, match="embedding 7 has norm nan"):
        calibrate(held(vectors, labels), gallery_size=20)


def test_more_copies_than_the_rate_allows_have_no_threshold() -> None:
    vectors, labels = population(60, 4, 0)
    for subject in range(0, 30, 2):
        vectors[4 * subject : 4 * subject + 4] = vectors[4 * subject + 4 : 4 * subject + 8]
    with pytest.raises(UserError, match=r"no similarity keeps FPIR at 0.05: too many of 240 non-mated probes reach 1"):
        identify_threshold(held(vectors, labels), fpir=0.05, gallery_size=60)
