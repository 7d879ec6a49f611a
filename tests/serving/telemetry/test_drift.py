import math
import threading

import numpy as np
import pytest

from serving.telemetry.drift import BINS, FEWEST, WINDOW, Drift
from trainer.evaluation.curve import Curve, score_of, strength

ZERO = ((0.0,) * 3,) * 3
CURVE = Curve(
    target="FPIR", start=0.3, share=0.01, scale=0.08, shape=0.02, clumping=0.4, by_subjects=ZERO, by_pairs=ZERO,
    by_prior=(0.0, 0.0), dominance=0.1, subjects_vary=0.1, gallery_varies=0.1, freedom=50, subjects=500, trials=2000,
)  # fmt: skip
SIZE, THRESHOLD = 300, 0.62


def best_scores(count: int, size: int, seed: int = 0, lift: float = 0.0) -> np.ndarray:
    """Of strangers in a gallery of so many, drawn from the curve by inverting (3), (2) and (1) of `curve.py`."""
    fpir = np.random.default_rng(seed).random(count)
    found = []
    for rate in fpir:
        hits = math.expm1(-CURVE.clumping * math.log1p(-rate)) / CURVE.clumping
        decay = -math.log(hits / size / CURVE.share)
        found.append(score_of(float(strength(CURVE.start)) + CURVE.excess(decay)) if decay > 0 else 0.0)
    return np.array(found) + lift


def watched(scores: np.ndarray, size: int = SIZE, curve: Curve | None = CURVE) -> Drift:
    drift = Drift(curve)
    for score in scores:
        drift.observe(float(score), THRESHOLD, size)
    return drift


def test_strangers_like_those_of_the_calibration_do_not_drift() -> None:
    found = [watched(best_scores(3000, SIZE, seed)) for seed in range(10)]
    assert np.mean([one.stability() for one in found]) == pytest.approx((BINS - 1) / WINDOW, rel=0.5)
    assert max(abs(one.shift()) for one in found) < 1.63 / math.sqrt(WINDOW) + 0.02


def test_a_gallery_that_grows_is_no_drift() -> None:
    drift = Drift(CURVE)
    for size, part in ((30, 0), (300, 1), (3000, 2)):
        for score in best_scores(2500, size, seed=part):
            drift.observe(float(score), THRESHOLD, size)
    assert drift.searches == WINDOW
    assert drift.stability() < 0.05


def test_higher_scores_are_seen_with_their_sign() -> None:
    higher, lower = watched(best_scores(3000, SIZE, lift=0.05)), watched(best_scores(3000, SIZE, lift=-0.05))
    assert higher.stability() > 0.1
    assert higher.shift() < -0.1
    assert lower.shift() > 0.1


def test_the_last_searches_count() -> None:
    drift = watched(best_scores(4000, SIZE, lift=0.1))
    assert drift.stability() > 0.25
    for score in best_scores(6000, SIZE):
        drift.observe(float(score), THRESHOLD, SIZE)
    assert drift.stability() < 0.05


def test_what_cannot_be_compared_is_left_out() -> None:
    drift = watched(np.array([0.29, THRESHOLD, 0.9, -1.0]))
    assert drift.searches == 0
    assert watched(best_scores(500, SIZE), size=0).searches == 0
    assert watched(best_scores(500, SIZE), curve=None).searches == 0
    few = watched(np.full(FEWEST - 1, 0.4))
    assert few.searches == FEWEST - 1
    assert math.isnan(few.stability())
    assert math.isnan(few.shift())


def test_threads_lose_nothing() -> None:
    drift = Drift(CURVE)
    scores = best_scores(400, SIZE)
    scores = scores[(scores >= CURVE.start) & (scores < THRESHOLD)]
    threads = [
        threading.Thread(target=lambda: [drift.observe(float(one), THRESHOLD, SIZE) for one in scores])
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert drift.searches == min(WINDOW, 8 * len(scores))
    assert drift._counts.sum() == drift.searches
