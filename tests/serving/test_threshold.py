import pytest

from serving.threshold import Rule, rules
from trainer.embedder import Embedder
from trainer.errors import UserError


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
    assert "calibrate for this size" not in identify.explain(2)
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
