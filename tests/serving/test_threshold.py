import pytest

from serving.threshold import Rule, rules
from trainer.embedder import Embedder
from trainer.errors import UserError
from trainer.evaluation.curve import Curve


def test_rules_come_from_the_calibration(embedder):
    verify, identify = rules(Embedder.open(embedder).manifest, None, None)
    assert (verify.value, verify.rate, verify.interval, verify.gallery_size) == (0.6, 0.01, (0.005, 0.02), None)
    assert (identify.value, identify.rate, identify.gallery_size) == (0.7, 0.01, 4)
    assert verify.source == "calibrated for FMR 0.01: a test"
    assert identify.source == "calibrated for FPIR 0.01: a test"


def test_the_threshold_itself_matches():
    assert Rule(0.5, "").matches(0.5)
    assert not Rule(0.5, "").matches(0.4999999)


def test_another_gallery_size_is_said(embedder):
    _, identify = rules(Embedder.open(embedder).manifest, None, None)
    assert identify.explain(4) == "calibrated for FPIR 0.01: a test"
    assert "calibrated for 4 subjects and the gallery holds 400" in identify.explain(400)
    assert "calibrate for this size" in identify.explain(400)
    assert "FPIR is at least about 0.005" in identify.explain(2)
    # Independent comparisons: FMR from 0.01 = 1 - (1 - FMR)^4, and FPIR at 400 from it.
    fmr = 1 - 0.99 ** (1 / 4)
    assert identify.rate_at(400) == pytest.approx(1 - (1 - fmr) ** 400)
    assert identify.rate_at(4) == pytest.approx(0.01)


def test_without_a_calibration_nothing_is_guessed(make_embedder):
    manifest = Embedder.open(make_embedder(calibrated=False)).manifest
    with pytest.raises(UserError, match="no threshold to verify by; run 'hypersphere calibrate'"):
        rules(manifest, None, None)
    with pytest.raises(UserError, match="no threshold to identify by"):
        rules(manifest, 0.5, None)
    verify, identify = rules(manifest, 0.5, 0.6)
    assert (verify.value, identify.value) == (0.5, 0.6)
    assert identify.explain(10) == "set by the operator, not calibrated: its error rates are not known"
    assert identify.rate_at(10) is None


def test_the_operator_goes_before_the_calibration(embedder):
    verify, identify = rules(Embedder.open(embedder).manifest, None, 0.9)
    assert (verify.value, identify.value, identify.rate) == (0.6, 0.9, None)


@pytest.mark.parametrize("value", [1.5, -1.01, float("nan")])
def test_impossible_values_are_refused(embedder, value):
    with pytest.raises(UserError, match="is not a cosine similarity"):
        rules(Embedder.open(embedder).manifest, value, None)


def test_a_threshold_of_another_model_is_refused(embedder):
    manifest = Embedder.open(embedder).manifest
    foreign = manifest.calibration.verify.model_copy(update={"model_id": "f" * 32})
    mixed = manifest.model_copy(update={"calibration": manifest.calibration.model_copy(update={"verify": foreign})})
    with pytest.raises(
        UserError, match=f"calibrated for model {'f' * 32}, but the embedder is model {manifest.model_id}"
    ):
        rules(mixed, None, None)


def test_a_threshold_of_the_other_use_is_refused(embedder):
    manifest = Embedder.open(embedder).manifest
    swapped = manifest.calibration.model_copy(update={"identify": manifest.calibration.verify})
    with pytest.raises(UserError, match="identify needs one for FPIR"):
        rules(manifest.model_copy(update={"calibration": swapped}), None, None)


CURVE = Curve(
    target="FPIR",
    start=0.4,
    share=0.01,
    scale=0.06,
    shape=0.0,
    clumping=0.2,
    by_subjects=((0.02, 0.0, 0.0), (0.0, 0.02, 0.0), (0.0, 0.0, 0.01)),
    by_pairs=((0.01, 0.0, 0.0), (0.0, 0.01, 0.0), (0.0, 0.0, 0.005)),
    by_prior=(0.0, 0.05),
    dominance=0.1,
    subjects_vary=0.2,
    gallery_varies=0.1,
    freedom=40,
    subjects=300,
    trials=900,
)


def with_curve(manifest):
    """The manifest with a calibration for FPIR 0.01 at 100 subjects, and its curve."""
    at = CURVE.at(100, 0.01)
    told = {"value": at.value, "low": at.low, "high": at.high, "gallery_size": 100}
    identify = manifest.calibration.identify.model_copy(update=told)
    calibration = manifest.calibration.model_copy(update={"identify": identify, "curve": CURVE})
    return manifest.model_copy(update={"calibration": calibration})


def test_a_gallery_takes_the_threshold_of_the_size_that_it_has(embedder):
    _, rule = rules(with_curve(Embedder.open(embedder).manifest), None, None)
    assert rule.at(100) is rule
    for size in (1, 30, 400):
        live, expected = rule.at(size), CURVE.at(size, 0.01)
        assert (live.value, live.interval, live.gallery_size) == (expected.value, (expected.low, expected.high), size)
        assert live.explain(size) == f"calibrated for FPIR 0.01: a test; by its curve for FPIR 0.01 at {size} enrolled"
    assert rule.at(30).value < rule.value < rule.at(400).value
    assert rule.at(0) == rule.at(1)


def test_beyond_what_the_calibration_knows_the_source_says_so(embedder):
    _, rule = rules(with_curve(Embedder.open(embedder).manifest), None, None)
    largest = CURVE.largest(0.01)
    assert "extrapolated" not in rule.at(largest).source
    assert "extrapolated: 0.5 false positives expected" in rule.at(2 * largest).source


def test_a_request_may_choose_a_rate_that_the_calibration_knows(embedder):
    _, rule = rules(with_curve(Embedder.open(embedder).manifest), None, None)
    strict = rule.at(100, 0.003)
    assert (strict.rate, strict.value) == (0.003, CURVE.at(100, 0.003).value)
    assert strict.value > rule.value
    with pytest.raises(
        UserError, match=r"cannot tell FPIR 1e-05 with 100 enrolled: 0.009 false positives are expected"
    ):
        rule.at(100, 1e-5)
    with pytest.raises(UserError, match=r"FPIR 0.5 is not a target"):
        rule.at(100, 0.5)


def test_without_a_curve_no_rate_can_be_chosen(embedder):
    _, rule = rules(Embedder.open(embedder).manifest, None, None)
    assert rule.at(400) is rule
    assert rule.at(400, rule.rate) is rule
    with pytest.raises(UserError, match="no FPIR can be chosen"):
        rule.at(400, 0.003)
    with pytest.raises(UserError, match="no FPIR can be chosen: set by the operator"):
        rules(Embedder.open(embedder).manifest, 0.5, 0.5)[1].at(4, 0.003)


def test_the_power_is_a_lower_bound_in_a_smaller_gallery(embedder):
    _, rule = rules(Embedder.open(embedder).manifest, None, None)
    assert "at most about" in rule.explain(5)
    assert "at least about" in rule.explain(3)
