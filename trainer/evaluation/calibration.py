"""Thresholds for a target error rate: `verify` for a false match rate, `identify` for a false positive rate at N.

Identify. Every sample is a non-mated probe of a gallery of the other subjects. At N up to the M subjects at hand, FPIR
is the exact expectation over galleries of N of them (`nonmated.search_tail`). Beyond M it is scaled,
FPIR_N = 1 - (1 - FPIR_M)^(N / M). That is exact where all probes are alike and an upper bound where they differ: with
F_p(t) the chance that probe p stays below t in one comparison, 1 - E[F_p^N] <= 1 - E[F_p^M]^(N / M) by Jensen.

Rate. With 30 expected hits or more the threshold is the empirical quantile. With fewer, it comes from a generalised
Pareto tail fitted to the highest scores (`tail.Pareto`), down to a tenth of a hit; beyond that there is no honest
answer and the error says what it would take.

Interval. Subjects are resampled in both of their roles, with the threshold held fixed and the tail fitted anew; for
identify, the variation between galleries of N subjects is added (`rates.py`). It is where the rate of one real gallery
of N, with subjects like those at hand, is expected to lie.
"""

import numpy as np
from numpy.typing import NDArray

from trainer.artifact import Calibration, Threshold
from trainer.errors import UserError
from trainer.evaluation.metrics import RESOLVED_ERRORS, SHOWN_ERRORS
from trainer.evaluation.nonmated import pair_tail, search_tail
from trainer.evaluation.rates import NonMated, RateAt, fitted_share
from trainer.evaluation.scores import Floats, Integers, Labels, Vectors, check

FEWEST_HITS = 0.1  # expected at the target; the tail is not followed further than ten times beyond the largest score
FEWEST_SUBJECTS = 10
HIGHEST_RATE = 0.2  # a threshold that is wrong more often than this is none
MAX_PROBES = 50_000
MAX_PAIR_SAMPLES = 10_000


def calibrate(
    embeddings_ND: Floats,
    labels_N: Integers,
    *,
    model_id: str,
    fpir: float = 0.01,
    fmr: float = 1e-3,
    gallery_size: int,
    seed: int = 0,
    source: str,
    samples_per_subject: int = 1,
    confidence: float = 0.95,
) -> Calibration:
    """Both thresholds of an Embedder from held-out samples that the training has not seen.

    Args:
        embeddings_ND: unit vectors.
        labels_N: the subject of each.
        model_id: of the Embedder that made them.
        fpir: target share of non-mated searches that return somebody.
        fmr: target share of non-mated comparisons that match.
        gallery_size: subjects enrolled where the threshold will be used, N.
        source: the data set and split, in words.
        samples_per_subject: enrolled of each subject, whose best counts.

    Raises:
        UserError: embeddings that cannot be compared, a rate that is not allowed, or too few subjects for it.
    """
    vectors_ND, labels_N = check(embeddings_ND, labels_N)
    kept_n = _capped(labels_N, MAX_PAIR_SAMPLES, seed)
    kept_p = _capped(labels_N, MAX_PROBES, seed)
    return Calibration(
        verify=verify_threshold(
            vectors_ND[kept_n],
            labels_N[kept_n],
            model_id=model_id,
            fmr=fmr,
            seed=seed,
            source=source,
            confidence=confidence,
        ),
        identify=identify_threshold(
            vectors_ND[kept_p],
            labels_N[kept_p],
            model_id=model_id,
            fpir=fpir,
            gallery_size=gallery_size,
            seed=seed,
            source=source,
            samples_per_subject=samples_per_subject,
            confidence=confidence,
        ),
    )


def identify_threshold(
    vectors_ND: Vectors,
    labels_N: Labels,
    *,
    model_id: str,
    fpir: float,
    gallery_size: int,
    seed: int = 0,
    source: str,
    samples_per_subject: int = 1,
    confidence: float = 0.95,
) -> Threshold:
    """The lowest similarity at which searches of `gallery_size` subjects return a stranger's lookalike at rate `fpir`.

    Raises:
        UserError: a rate or size that is not allowed, or too few subjects; the message says how many it takes.
    """
    _check_rate("FPIR", fpir)
    subjects = _check_sizes(labels_N, gallery_size, samples_per_subject)
    growth = max(1.0, gallery_size / (subjects - 1))
    expected = len(labels_N) * -np.expm1(np.log1p(-fpir) / growth)
    if expected < FEWEST_HITS:
        needed = int(np.ceil(np.sqrt(FEWEST_HITS / expected) * subjects))
        raise UserError(
            f"{len(labels_N)} non-mated probes of {subjects} subjects cannot tell FPIR {fpir:g} with {gallery_size} "
            f"enrolled; it takes about {needed} subjects like these, or a higher rate, or a smaller gallery"
        )
    tail = search_tail(vectors_ND, labels_N, gallery_size, samples_per_subject, seed)
    model = NonMated(tail, growth, float(tail.gallery_mass_S.sum()) / gallery_size, None)
    model, threshold, method = _solved(model, fpir, expected, "FPIR")
    reached = model.rate_at(threshold, confidence, seed)
    scaled = f"; scaled from {subjects - 1} to {gallery_size} enrolled by 1-(1-FPIR)^(N/M)" if growth > 1.01 else ""
    return Threshold(
        value=threshold,
        target="FPIR",
        rate=fpir,
        gallery_size=gallery_size,
        low=reached.low,
        high=reached.high,
        confidence=confidence,
        probes=tail.trials,
        subjects=subjects,
        model_id=model_id,
        source=f"{source}: {method}{scaled}{_clean_subjects('FPIR', fpir, subjects)}",
    )


def verify_threshold(
    vectors_ND: Vectors,
    labels_N: Labels,
    *,
    model_id: str,
    fmr: float,
    seed: int = 0,
    source: str,
    confidence: float = 0.95,
) -> Threshold:
    """The lowest similarity at which two samples of different subjects match at rate `fmr`.

    Raises:
        UserError: a rate that is not allowed, or too few pairs; the message says how many it takes.
    """
    _check_rate("FMR", fmr)
    subjects = _check_sizes(labels_N, 1, 1)
    counts_S = np.unique(labels_N, return_counts=True)[1].astype(np.float64)
    pairs = float(counts_S.sum() ** 2 - np.square(counts_S).sum()) / 2
    if pairs * fmr < FEWEST_HITS:
        raise UserError(
            f"{pairs:.0f} non-mated pairs of {subjects} subjects cannot tell FMR {fmr:g}; it takes "
            f"{FEWEST_HITS / fmr:.0f} pairs, that is about {np.sqrt(FEWEST_HITS / fmr / pairs) * subjects:.0f} subjects"
        )
    tail = pair_tail(vectors_ND, labels_N, max(fmr, fitted_share(pairs)))
    model, threshold, method = _solved(NonMated(tail, 1.0, 0.0, None), fmr, pairs * fmr, "FMR")
    reached = model.rate_at(threshold, confidence, seed)
    return Threshold(
        value=threshold,
        target="FMR",
        rate=fmr,
        low=reached.low,
        high=reached.high,
        confidence=confidence,
        probes=len(labels_N),
        subjects=subjects,
        model_id=model_id,
        source=f"{source}: {method}{_clean_subjects('FMR', fmr, subjects * (subjects - 1) // 2, 'pairs of subjects')}",
    )


def fpir_at(
    embeddings_ND: Floats,
    labels_N: Integers,
    threshold: float,
    gallery_size: int,
    *,
    seed: int = 0,
    samples_per_subject: int = 1,
    confidence: float = 0.95,
) -> RateAt:
    """What FPIR a threshold has at another gallery size: how it drifts as the gallery grows.

    Raises:
        UserError: embeddings that cannot be compared, or a size that is not allowed.
    """
    vectors_ND, labels_N = check(embeddings_ND, labels_N)
    kept_p = _capped(labels_N, MAX_PROBES, seed)
    vectors_ND, labels_N = vectors_ND[kept_p], labels_N[kept_p]
    subjects = _check_sizes(labels_N, gallery_size, samples_per_subject)
    tail = search_tail(vectors_ND, labels_N, gallery_size, samples_per_subject, seed)
    galleries = float(tail.gallery_mass_S.sum()) / gallery_size
    model = NonMated(tail, max(1.0, gallery_size / (subjects - 1)), galleries, None)
    if tail.rate(threshold) * tail.trials < RESOLVED_ERRORS:
        model = model.extended()
    return model.rate_at(threshold, confidence, seed)


def _solved(model: NonMated, rate: float, expected: float, name: str) -> tuple[NonMated, float, str]:
    """The model that the expected hits allow, its threshold, and the method in words."""
    trials = f"{model.tail.trials} non-mated {'pairs' if name == 'FMR' else 'probes'}"
    method = f"empirical quantile of {trials}"
    if expected < RESOLVED_ERRORS:
        model = model.extended()
        method = f"generalised Pareto tail of {trials}, {expected:.2g} expected at the target"
        method += "; extrapolated beyond the highest score" if expected < 1 else ""
    threshold = model.threshold(rate)
    if threshold >= 1:
        raise UserError(
            f"no similarity keeps {name} at {rate:g}: too many of {trials} reach 1; "
            "look for duplicates, wrong labels or collapsed embeddings, or choose a higher rate"
        )
    return model, threshold, method


def _clean_subjects(name: str, rate: float, independent: int, what: str = "subjects") -> str:
    if independent * rate >= SHOWN_ERRORS:
        return ""
    return (
        f"; rule of three: {independent} {what} without one error would show {name} <= {SHOWN_ERRORS / independent:.2g}"
    )


def _capped(labels_N: Labels, most: int, seed: int) -> NDArray[np.int64]:
    """Rows of at most so many samples: as many of every subject as fit, then fewer subjects, drawn by the seed."""
    generator = np.random.default_rng([seed, 5])
    order_N = generator.permutation(len(labels_N))
    order_N = order_N[np.argsort(labels_N[order_N], kind="stable")]
    sorted_N = labels_N[order_N]
    place_N = np.arange(len(sorted_N)) - np.searchsorted(sorted_N, sorted_N)
    return np.sort(order_N[np.lexsort((generator.random(len(order_N)), place_N))[:most]])


def _check_rate(name: str, rate: float) -> None:
    if not 0 < rate <= HIGHEST_RATE:
        raise UserError(f"{name} {rate:g} is not a target; choose a rate above 0 and at most {HIGHEST_RATE:g}")


def _check_sizes(labels_N: Labels, gallery_size: int, samples_per_subject: int) -> int:
    if gallery_size < 1 or samples_per_subject < 1:
        raise UserError(
            f"a gallery of {gallery_size} subjects with {samples_per_subject} samples each cannot be searched; "
            "both are 1 or more"
        )
    subjects = len(np.unique(labels_N))
    if subjects < FEWEST_SUBJECTS:
        raise UserError(
            f"{subjects} subjects are too few to calibrate on; take {FEWEST_SUBJECTS} or more, "
            f"and {SHOWN_ERRORS} / rate of them to show a rate by counting"
        )
    return subjects
