"""Thresholds for a target error rate: `verify` for a false match rate, `identify` for a false positive rate at N.

What is calibrated is the rate in one real gallery of N subjects, drawn like those at hand, that is searched by endless
strangers from where they came from. A threshold is set so that this rate, expected over what is not known, is the
target. Its interval is where the rate of that one gallery lies, at 95 % confidence.

Every sample at hand searches galleries of all other subjects (`nonmated.py`). To the highest scores, those of a hundred
pairs of subjects or of twice as many as lie above the threshold, a tail is fitted with all that can be wrong about it
(`tails.py`); the Curve that results gives the threshold for any gallery size and rate (`curve.py`). Below one false
positive to expect among the probes at hand the answer is refused, or marked as extrapolated where that is allowed.
"""

from dataclasses import dataclass, replace
from math import ceil, log1p, sqrt

import numpy as np

from trainer.errors import UserError
from trainer.evaluation.curve import CONFIDENCE, HIGHEST_RATE, LEAST_HITS, Curve, Reached
from trainer.evaluation.metrics import SHOWN_ERRORS
from trainer.evaluation.nonmated import Hits, highest, shuffled
from trainer.evaluation.normalise import Normaliser, roles_of
from trainer.evaluation.probability import mate_probability
from trainer.evaluation.report import Calibration, Threshold
from trainer.evaluation.scores import Labels, Roles, Vectors, check
from trainer.evaluation.tails import Tail, fit

FEWEST_SUBJECTS = 10
SIMULATED_SUBJECTS = 50  # with fewer, the simulations do not tell how far the interval holds
FITTED_PAIRS = 100.0  # of subjects: a tail is fitted to their scores
MOST_OF_ALL = 0.05  # share of all comparisons, beyond which the highest scores are no tail
MISFIT = 0.01  # a fit that is less probable is warned about
MOST_HITS = 2_000_000
MAX_PROBES = 50_000
MOST_PAIRED = 5_000  # samples whose pairs give the probability of a mate
DUPLICATE = 1 - 1e-6


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Samples that the training has not seen, and what a Threshold says of them.

    Attributes:
        vectors_ND: unit vectors.
        labels_N: the subject of each.
        model_id: of the Embedder that made them.
        source: the data set and split, in words.
        normaliser: of the scores; None: they are cosines.
    """

    vectors_ND: Vectors
    labels_N: Labels
    model_id: str
    source: str
    seed: int = 0
    normaliser: Normaliser | None = None

    def roles(self) -> Roles:
        """As `normalise.roles_of`."""
        return roles_of(self.vectors_ND, self.normaliser)

    def capped(self, most: int) -> "HeldOut":
        """At most so many samples: as many of every subject as fit, then fewer subjects, drawn by the seed."""
        generator = np.random.default_rng([self.seed, 5])
        order_N, place_N = shuffled(self.labels_N, generator)
        kept = np.sort(order_N[np.lexsort((generator.random(len(order_N)), place_N))[:most]])
        return replace(self, vectors_ND=self.vectors_ND[kept], labels_N=self.labels_N[kept])


def calibrate(
    held: HeldOut,
    *,
    fpir: float = 0.01,
    fmr: float = 1e-3,
    gallery_size: int,
    samples_per_subject: int = 1,
    least_hits: float = LEAST_HITS,
    prior: float = 0.5,
) -> Calibration:
    """Both thresholds of an Embedder, and the Curve for galleries of other sizes.

    Args:
        held: embeddings that it gave to identities which it was not trained on.
        fpir: target share of non-mated searches that return somebody.
        fmr: target share of non-mated comparisons that match.
        gallery_size: subjects enrolled where the threshold will be used, N.
        samples_per_subject: enrolled of each subject, whose best counts.
        least_hits: false positives to expect among the samples; 0 allows any extrapolation.
        prior: probability of a mate before the score is known.

    Raises:
        UserError: embeddings that cannot be compared, a rate that is not allowed, or too few subjects for it.
    """
    vectors_ND, labels_N = check(held.vectors_ND, held.labels_N)
    held = replace(held, vectors_ND=vectors_ND, labels_N=labels_N)
    verify = verify_threshold(held, fmr, least_hits)
    identify, curve = identify_threshold(held, fpir, gallery_size, samples_per_subject, least_hits)
    few = held.capped(MOST_PAIRED)
    probability = mate_probability(*few.roles(), few.labels_N, prior, held.seed)
    return Calibration(verify=verify, identify=identify, curve=curve, probability=probability)


def identify_threshold(
    held: HeldOut, fpir: float, gallery_size: int, samples_per_subject: int = 1, least_hits: float = LEAST_HITS
) -> tuple[Threshold, Curve]:
    """The lowest similarity at which searches of `gallery_size` subjects return a stranger's lookalike at rate `fpir`.

    Raises:
        UserError: a rate or size that is not allowed, or too few subjects; the message says how many it takes.
    """
    if gallery_size < 1 or samples_per_subject < 1:
        raise UserError(
            f"a gallery of {gallery_size} subjects with {samples_per_subject} samples each cannot be searched; "
            "both are 1 or more"
        )
    _refuse("FPIR", fpir, held.labels_N)
    share = -log1p(-fpir) / gallery_size
    held = held.capped(min(MAX_PROBES, int(sqrt(MOST_HITS / (2 * share)))))
    hits, pairs = _hits(held, share, samples_per_subject)
    tail = fit(hits, pairs, "FPIR")
    return _threshold(held, hits, tail, fpir, gallery_size, least_hits), tail.curve


def verify_threshold(held: HeldOut, fmr: float, least_hits: float = LEAST_HITS) -> Threshold:
    """The lowest similarity at which two samples of different subjects match at rate `fmr`.

    Raises:
        UserError: a rate that is not allowed, or too few pairs; the message says how many it takes.
    """
    _refuse("FMR", fmr, held.labels_N)
    held = held.capped(min(MAX_PROBES, int(sqrt(MOST_HITS / (2 * fmr)))))
    hits, pairs = _hits(held, fmr, 1)
    return _threshold(held, hits, fit(hits, pairs, "FMR"), fmr, 1, least_hits)


def _hits(held: HeldOut, share: float, samples_per_subject: int) -> tuple[Hits, float]:
    """The highest scores, and how many pairs of subjects a tail that reaches down to FMR `share` takes in."""
    subjects = len(np.unique(held.labels_N))
    all_pairs = subjects * (subjects - 1) / 2
    pairs = max(min(FITTED_PAIRS, MOST_OF_ALL * all_pairs), 2 * share * all_pairs)
    searching_NE, enrolled_NE = held.roles()
    hits = highest(searching_NE, held.labels_N, samples_per_subject, pairs, held.seed, enrolled_NE)
    return hits, pairs


def _threshold(held: HeldOut, hits: Hits, tail: Tail, rate: float, gallery_size: int, least_hits: float) -> Threshold:
    """The Threshold of a tail, with what is to be known about it in words."""
    curve = tail.curve
    found = curve.at(gallery_size, rate, least_hits)
    said = _words(tail, rate, gallery_size, found)
    same = int(np.count_nonzero(hits.scores_E >= DUPLICATE))
    if found.value >= 1 or same * gallery_size > rate * hits.comparisons:
        raise UserError(
            f"no similarity keeps {curve.target} at {rate:g}: too many of {curve.trials} non-mated "
            f"{_trials(curve)} reach 1; look for duplicates, wrong labels or collapsed embeddings, or choose a higher "
            "rate"
        )
    if same:
        said.append(f"{same} comparisons of different subjects have score 1: duplicates or wrong labels")
    return Threshold(
        value=found.value,
        target=curve.target,
        rate=rate,
        gallery_size=gallery_size,
        low=found.low,
        high=found.high,
        confidence=CONFIDENCE,
        probes=len(held.labels_N),
        subjects=curve.subjects,
        model_id=held.model_id,
        misfit=tail.misfit,
        expected_hits=found.expected_hits,
        source=f"{held.source}: " + "; ".join(said),
    )


def _words(tail: Tail, rate: float, gallery_size: int, found: Reached) -> list[str]:
    """How the threshold came about, and each reason to doubt it."""
    curve, said = tail.curve, []
    said.append(
        f"generalised Pareto tail of {curve.trials} non-mated {_trials(curve)} of {curve.subjects} subjects, "
        f"{found.expected_hits:.3g} false positives expected"
    )
    if found.expected_hits < LEAST_HITS:
        said.append(f"extrapolated below {LEAST_HITS:g} expected false positive, as was allowed: it rests on the model")
    if curve.target == "FPIR" and gallery_size > 1.01 * (curve.subjects - 1):
        said.append(f"extended from {curve.subjects - 1} to {gallery_size} enrolled")
    if tail.misfit < MISFIT:
        said.append(
            f"the scores part from the fitted tail (p = {tail.misfit:.1g}): take the interval for a lower bound"
        )
    if curve.subjects < SIMULATED_SUBJECTS:
        said.append(f"{curve.subjects} subjects are few: the interval was simulated with {SIMULATED_SUBJECTS} and more")
    independent = curve.subjects if curve.target == "FPIR" else curve.subjects * (curve.subjects - 1) // 2
    if independent * rate < SHOWN_ERRORS:
        what = "subjects" if curve.target == "FPIR" else "pairs of subjects"
        shown = f"{curve.target} <= {SHOWN_ERRORS / independent:.2g}"
        said.append(f"rule of three: {independent} {what} without one error would show {shown}")
    return said


def _trials(curve: Curve) -> str:
    return "probes" if curve.target == "FPIR" else "pairs"


def _refuse(name: str, rate: float, labels_N: Labels) -> None:
    """Raises UserError unless the rate and the number of subjects are usable."""
    if not 0 < rate <= HIGHEST_RATE:
        raise UserError(f"{name} {rate:g} is not a target; choose a rate above 0 and at most {HIGHEST_RATE:g}")
    subjects = len(np.unique(labels_N))
    if subjects < FEWEST_SUBJECTS:
        raise UserError(
            f"{subjects} subjects are too few to calibrate on; take {FEWEST_SUBJECTS} or more, "
            f"and {ceil(SHOWN_ERRORS)} / rate of them to show a rate by counting"
        )
