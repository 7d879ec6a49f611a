"""Thresholds for a target error rate: `verify` for a false match rate, `identify` for a false positive rate at N.

Identify. Every sample is a non-mated probe of a gallery of the other subjects. At N up to the M subjects at hand, FPIR
is the exact expectation over galleries of N of them (`nonmated.search_tail`). Beyond M it is scaled,
FPIR_N = 1 - (1 - FPIR_M)^(N / M). That is exact where all probes are alike and an upper bound where they differ: with
F_p(t) the chance that probe p stays below t in one comparison, 1 - E[F_p^N] <= 1 - E[F_p^M]^(N / M) by Jensen.

Rate. With 30 expected hits or more the threshold is the empirical quantile. With fewer, it comes from a generalised
Pareto tail fitted to the highest scores (`tails.Pareto`), down to a tenth of a hit; beyond that there is no honest
answer and the error says what it would take.

Interval. Subjects are resampled in both of their roles, with the threshold held fixed and the tail fitted anew; for
identify, the variation between galleries of N subjects is added (`tails.py`). It is where the rate of one real gallery
of N, with subjects like those at hand, is expected to lie.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from trainer.errors import UserError
from trainer.evaluation.metrics import CONFIDENCE, RESOLVED_ERRORS, SHOWN_ERRORS
from trainer.evaluation.nonmated import pair_tail, search_tail, shuffled
from trainer.evaluation.report import Calibration, Threshold
from trainer.evaluation.scores import Labels, Vectors, check
from trainer.evaluation.tails import NonMated, fitted_share, grown

FEWEST_HITS = 0.1  # expected at the target; the tail is not followed further than ten times beyond the largest score
FEWEST_SUBJECTS = 10
HIGHEST_RATE = 0.2  # a threshold that is wrong more often than this is none
MAX_PROBES = 50_000
MAX_PAIR_SAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Samples that the training has not seen, and what a Threshold says of them.

    Attributes:
        vectors_ND: unit vectors.
        labels_N: the subject of each.
        model_id: of the Embedder that made them.
        source: the data set and split, in words.
    """

    vectors_ND: Vectors
    labels_N: Labels
    model_id: str
    source: str
    seed: int = 0

    def capped(self, most: int) -> "HeldOut":
        """At most so many samples: as many of every subject as fit, then fewer subjects, drawn by the seed."""
        generator = np.random.default_rng([self.seed, 5])
        order_N, place_N = shuffled(self.labels_N, generator)
        kept = np.sort(order_N[np.lexsort((generator.random(len(order_N)), place_N))[:most]])
        return replace(self, vectors_ND=self.vectors_ND[kept], labels_N=self.labels_N[kept])


def calibrate(
    held: HeldOut, *, fpir: float = 0.01, fmr: float = 1e-3, gallery_size: int, samples_per_subject: int = 1
) -> Calibration:
    """Both thresholds of an Embedder.

    Args:
        held: embeddings that it gave to identities which it was not trained on.
        fpir: target share of non-mated searches that return somebody.
        fmr: target share of non-mated comparisons that match.
        gallery_size: subjects enrolled where the threshold will be used, N.
        samples_per_subject: enrolled of each subject, whose best counts.

    Raises:
        UserError: embeddings that cannot be compared, a rate that is not allowed, or too few subjects for it.
    """
    vectors_ND, labels_N = check(held.vectors_ND, held.labels_N)
    held = replace(held, vectors_ND=vectors_ND, labels_N=labels_N)
    return Calibration(
        verify=verify_threshold(held.capped(MAX_PAIR_SAMPLES), fmr),
        identify=identify_threshold(held.capped(MAX_PROBES), fpir, gallery_size, samples_per_subject),
    )


def identify_threshold(held: HeldOut, fpir: float, gallery_size: int, samples_per_subject: int = 1) -> Threshold:
    """The lowest similarity at which searches of `gallery_size` subjects return a stranger's lookalike at rate `fpir`.

    Raises:
        UserError: a rate or size that is not allowed, or too few subjects; the message says how many it takes.
    """
    subjects, probes = _checked("FPIR", fpir, held.labels_N), len(held.labels_N)
    if gallery_size < 1 or samples_per_subject < 1:
        raise UserError(
            f"a gallery of {gallery_size} subjects with {samples_per_subject} samples each cannot be searched; "
            "both are 1 or more"
        )
    growth = max(1.0, gallery_size / (subjects - 1))
    expected = probes * grown(fpir, 1 / growth)
    if expected < FEWEST_HITS:
        needed = int(np.ceil(np.sqrt(FEWEST_HITS / expected) * subjects))
        raise UserError(
            f"{probes} non-mated probes of {subjects} subjects cannot tell FPIR {fpir:g} with {gallery_size} "
            f"enrolled; it takes about {needed} subjects like these, or a higher rate, or a smaller gallery"
        )
    tail = search_tail(held.vectors_ND, held.labels_N, gallery_size, samples_per_subject, held.seed)
    model = NonMated(tail, growth, float(tail.gallery_mass_S.sum()) / gallery_size)
    scaled = f"; scaled from {subjects - 1} to {gallery_size} enrolled by 1-(1-FPIR)^(N/M)" if growth > 1.01 else ""
    remarks = scaled + _rule_of_three("FPIR", fpir, subjects, "subjects")
    found = _threshold(held, model, "FPIR", fpir, expected)
    return found.model_copy(update={"gallery_size": gallery_size, "source": found.source + remarks})


def verify_threshold(held: HeldOut, fmr: float) -> Threshold:
    """The lowest similarity at which two samples of different subjects match at rate `fmr`.

    Raises:
        UserError: a rate that is not allowed, or too few pairs; the message says how many it takes.
    """
    subjects = _checked("FMR", fmr, held.labels_N)
    counts_S = np.unique(held.labels_N, return_counts=True)[1].astype(np.float64)
    pairs = float(counts_S.sum() ** 2 - np.square(counts_S).sum()) / 2
    if pairs * fmr < FEWEST_HITS:
        raise UserError(
            f"{pairs:.0f} non-mated pairs of {subjects} subjects cannot tell FMR {fmr:g}; it takes "
            f"{FEWEST_HITS / fmr:.0f} pairs, that is about {np.sqrt(FEWEST_HITS / fmr / pairs) * subjects:.0f} subjects"
        )
    model = NonMated(pair_tail(held.vectors_ND, held.labels_N, max(fmr, fitted_share(pairs))), 1.0, 0.0)
    found = _threshold(held, model, "FMR", fmr, pairs * fmr)
    remarks = _rule_of_three("FMR", fmr, subjects * (subjects - 1) // 2, "pairs of subjects")
    return found.model_copy(update={"source": found.source + remarks})


def _threshold(
    held: HeldOut, model: NonMated, target: Literal["FMR", "FPIR"], rate: float, expected: float
) -> Threshold:
    """The Threshold of a model of the non-mated scores, with `expected` hits at the target."""
    trials = f"{model.tail.trials} non-mated {'pairs' if target == 'FMR' else 'probes'}"
    method = f"empirical quantile of {trials}"
    if expected < RESOLVED_ERRORS:
        model = model.extended()
        method = f"generalised Pareto tail of {trials}, {expected:.2g} expected at the target"
        method += "; extrapolated beyond the highest score" if expected < 1 else ""
    value = model.threshold(rate)
    if value >= 1:
        raise UserError(
            f"no similarity keeps {target} at {rate:g}: too many of {trials} reach 1; "
            "look for duplicates, wrong labels or collapsed embeddings, or choose a higher rate"
        )
    low, high = model.interval(value, held.seed)
    return Threshold(
        value=value,
        target=target,
        rate=rate,
        gallery_size=1,
        low=low,
        high=high,
        confidence=CONFIDENCE,
        probes=len(held.labels_N),
        subjects=len(np.unique(held.labels_N)),
        model_id=held.model_id,
        source=f"{held.source}: {method}",
    )


def _rule_of_three(name: str, rate: float, independent: int, what: str) -> str:
    if independent * rate >= SHOWN_ERRORS:
        return ""
    shown = f"{name} <= {SHOWN_ERRORS / independent:.2g}"
    return f"; rule of three: {independent} {what} without one error would show {shown}"


def _checked(name: str, rate: float, labels_N: Labels) -> int:
    """The number of subjects, once it and the rate are known to be usable."""
    if not 0 < rate <= HIGHEST_RATE:
        raise UserError(f"{name} {rate:g} is not a target; choose a rate above 0 and at most {HIGHEST_RATE:g}")
    subjects = len(np.unique(labels_N))
    if subjects < FEWEST_SUBJECTS:
        raise UserError(
            f"{subjects} subjects are too few to calibrate on; take {FEWEST_SUBJECTS} or more, "
            f"and {SHOWN_ERRORS} / rate of them to show a rate by counting"
        )
    return subjects
