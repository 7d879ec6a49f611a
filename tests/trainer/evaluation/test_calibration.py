"""Thresholds against fresh subjects of the same population: the promised rate is reached as often as claimed."""

import numpy as np
import pytest

from trainer.errors import UserError
from trainer.evaluation import calibration, tails
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


def reached_fpir(threshold: float, gallery_size: int, seed: int, probes: int = 10_000) -> float:
    gallery, _ = population(gallery_size, 1, seed)
    strangers, _ = population(probes, 1, seed + 1)
    best = [(strangers[i : i + 1000] @ gallery.T).max(axis=1) for i in range(0, probes, 1000)]
    return float(np.mean(np.concatenate(best) >= threshold))


@pytest.fixture
def few_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tails, "REPLICATES", 200)


@pytest.mark.usefixtures("few_replicates")
@pytest.mark.parametrize(
    ("gallery_size", "fpir", "method"),
    [
        pytest.param(60, 0.1, "empirical", id="smaller gallery, counted"),
        pytest.param(100, 0.01, "Pareto", id="same gallery, fitted"),
        pytest.param(500, 0.05, "Pareto", id="larger gallery, fitted and scaled"),
    ],
)
def test_the_reached_fpir_lies_in_the_interval_as_often_as_claimed(gallery_size: int, fpir: float, method: str) -> None:
    repetitions = 40
    inside, reached = 0, []
    for repetition in range(repetitions):
        vectors, labels = population(101, 5, 10 * repetition)
        threshold = identify_threshold(held(vectors, labels, repetition), fpir=fpir, gallery_size=gallery_size)
        assert method in threshold.source
        reached.append(reached_fpir(threshold.value, gallery_size, 10_000 + 10 * repetition))
        inside += threshold.low <= reached[-1] <= threshold.high
    assert inside >= 33  # claimed 38 of 40; chance alone goes below 33 once in 200 times
    assert np.mean(reached) == pytest.approx(fpir, rel=0.25)


@pytest.mark.usefixtures("few_replicates")
def test_a_threshold_for_a_thousand_comes_from_two_hundred() -> None:
    for_1000, for_200 = [], []
    for repetition in range(8):
        vectors, labels = population(200, 8, 10 * repetition)
        scaled = identify_threshold(held(vectors, labels, repetition), fpir=0.02, gallery_size=1000)
        plain = identify_threshold(held(vectors, labels, repetition), fpir=0.02, gallery_size=200)
        assert "scaled from 199 to 1000" in scaled.source
        assert scaled.value > plain.value
        for_1000.append(reached_fpir(scaled.value, 1000, 10_000 + 10 * repetition))
        for_200.append(reached_fpir(plain.value, 1000, 10_000 + 10 * repetition))
    assert np.mean(for_1000) == pytest.approx(0.02, rel=0.2)
    assert np.mean(for_200) > 0.06  # what comes of a threshold that was calibrated for a smaller gallery


@pytest.mark.usefixtures("few_replicates")
@pytest.mark.parametrize("fmr", [1e-2, 1e-4])
def test_the_reached_fmr_lies_in_the_interval_as_often_as_claimed(fmr: float) -> None:
    fresh, _ = population(2000, 1, 1)
    others, _ = population(2000, 1, 2)
    scores = np.sort((fresh @ others.T).ravel())
    inside, reached = 0, []
    for repetition in range(30):
        vectors, labels = population(80, 4, 100 + repetition)
        threshold = verify_threshold(held(vectors, labels, repetition), fmr=fmr)
        reached.append(1 - np.searchsorted(scores, threshold.value) / len(scores))
        inside += threshold.low <= reached[-1] <= threshold.high
    assert inside >= 25  # claimed 28.5 of 30
    assert np.mean(reached) == pytest.approx(fmr, rel=0.3)


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
    assert identify.source == "val of made-up people: empirical quantile of 360 non-mated probes"
    for threshold in (verify, identify):
        assert threshold.low < threshold.rate < threshold.high
        assert threshold.value == np.float32(threshold.value)
        assert (threshold.value / GRID).is_integer()
    again = calibrate(
        HeldOut(vectors, labels, "digest", "val of made-up people", seed=1), fpir=0.1, fmr=1e-3, gallery_size=50
    )
    assert again == found


def test_the_empirical_threshold_is_the_lowest_that_keeps_the_rate() -> None:
    vectors, labels = population(60, 6, 0)
    threshold = verify_threshold(held(vectors, labels), fmr=0.01).value
    scores = [float(vectors[i] @ vectors[j]) for i in range(360) for j in range(i) if labels[i] != labels[j]]
    assert sum(s >= threshold for s in scores) <= 0.01 * len(scores)
    assert sum(s >= threshold - 2 * GRID for s in scores) > 0.01 * len(scores)


def test_more_subjects_more_samples_and_lower_rates_raise_the_threshold() -> None:
    vectors, labels = population(120, 6, 0)

    def value(gallery_size: int, fpir: float, samples: int = 1) -> float:
        return identify_threshold(held(vectors, labels), fpir, gallery_size, samples).value

    by_size = [value(size, 0.1) for size in (5, 30, 119, 1000, 10_000)]
    assert by_size == sorted(by_size)
    assert value(119, 0.02) > value(119, 0.1)
    assert value(119, 0.1, samples=3) > value(119, 0.1)


def test_few_subjects_carry_the_rule_of_three() -> None:
    vectors, labels = population(60, 20, 0)
    few = identify_threshold(held(vectors, labels), fpir=0.03, gallery_size=50)
    assert "rule of three: 60 subjects without one error would show FPIR <= 0.05" in few.source
    enough = identify_threshold(held(vectors, labels), fpir=0.05, gallery_size=50)
    assert "rule of three" not in enough.source


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
            "120 non-mated probes of 40 subjects cannot tell FPIR 0.0001 with 1000000 enrolled; it takes",
        ),
    ],
)
def test_what_cannot_be_calibrated_is_an_error(fpir: float, gallery_size: int, samples: int, message: str) -> None:
    vectors, labels = population(40, 3, 0)
    with pytest.raises(UserError, match=message):
        identify_threshold(held(vectors, labels), fpir, gallery_size, samples)


def test_the_subjects_that_an_error_asks_for_are_enough() -> None:
    vectors, labels = population(40, 3, 0)
    with pytest.raises(UserError, match="it takes about 91 subjects"):
        identify_threshold(held(vectors, labels), fpir=0.01, gallery_size=2400)
    more, more_labels = population(91, 3, 0)
    threshold = identify_threshold(held(more, more_labels), fpir=0.01, gallery_size=2400)
    assert "extrapolated beyond the highest score" in threshold.source


def test_too_few_pairs_for_an_fmr_are_an_error() -> None:
    vectors, labels = population(40, 3, 0)
    with pytest.raises(
        UserError, match="7020 non-mated pairs of 40 subjects cannot tell FMR 1e-07; it takes 1000000 pairs"
    ):
        verify_threshold(held(vectors, labels), fmr=1e-7)


def test_a_cap_keeps_as_many_samples_of_every_subject(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, labels = population(30, 8, 0)
    monkeypatch.setattr(calibration, "MAX_PROBES", 100)
    monkeypatch.setattr(calibration, "MAX_PAIR_SAMPLES", 60)
    found = calibrate(held(vectors, labels), fpir=0.1, fmr=0.01, gallery_size=20)
    assert (found.identify.probes, found.identify.subjects) == (100, 30)
    assert (found.verify.probes, found.verify.subjects) == (60, 30)
    assert "1740 non-mated pairs" in found.verify.source  # two samples of each: 60 x 58 / 2


def test_too_few_subjects_are_an_error() -> None:
    vectors, labels = population(9, 30, 0)
    with pytest.raises(UserError, match="9 subjects are too few"):
        calibrate(held(vectors, labels), gallery_size=5)


@pytest.mark.parametrize("gallery_size", [10, 49, 500])
def test_collapsed_embeddings_have_no_threshold(gallery_size: int) -> None:
    vectors = np.zeros((500, 4), np.float32)
    vectors[:, 0] = 1
    with pytest.raises(UserError, match=r"no similarity keeps FPIR at 0.1: too many of 500 non-mated probes reach 1"):
        identify_threshold(held(vectors, np.arange(500) // 10), fpir=0.1, gallery_size=gallery_size)
