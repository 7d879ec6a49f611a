"""Two Embedders on one protocol: the difference of their error rates on the same samples, with a paired interval.

Both see the same pairs and searches, and each replicate of the bootstrap draws the same subjects for both, so that what
makes a subject hard for both cancels out. Thresholds are chosen anew in each replicate.
"""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from trainer.errors import UserError
from trainer.evaluation import evidence, identification, intervals, metrics, verification
from trainer.evaluation.evidence import Evidence, Statistic
from trainer.evaluation.findings import Comparison, Difference
from trainer.evaluation.identification import ClosedSearches, OpenSearches
from trainer.evaluation.intervals import Numbers
from trainer.evaluation.metrics import RESOLVED_ERRORS, SHOWN_ERRORS, ErrorCurve, missed_P, threshold_at


@dataclass(frozen=True, slots=True)
class Seen:
    """What one Embedder made of a protocol; None where the protocol has no such part.

    Attributes:
        pairs: the curve of the pairs, and their evidence by subject.
    """

    name: str
    pairs: tuple[ErrorCurve, Evidence] | None
    closed: ClosedSearches | None
    opened: OpenSearches | None

    def named(self, name: str) -> "Seen":
        return replace(self, name=name)


def compare(first: Seen, second: Seen, seed: int, replicates: int) -> Comparison:
    """Differences of the error rates of two Embedders, first minus second, as far as the data support them.

    Raises:
        UserError: they were not measured on the same pairs and searches.
    """
    found: list[Difference] = []
    names = first.name, second.name
    if first.pairs is not None and second.pairs is not None:
        found += _of_pairs(names, (first.pairs, second.pairs), seed, replicates)
    if first.closed is not None and second.closed is not None:
        found += _of_closed(names, (first.closed, second.closed))
    if first.opened is not None and second.opened is not None:
        found += _of_open(names, (first.opened, second.opened), seed, replicates)
    better = [one for one in found if one.interval[1] < 0], [one for one in found if one.interval[0] > 0]
    if better[0] and better[1]:
        sentence = (
            f"Neither is better throughout: {names[0]} errs less by {_listed(better[0])}, "
            f"{names[1]} by {_listed(better[1])}."
        )
    elif better[0] or better[1]:
        winner = names[bool(better[1])]
        sentence = f"{winner} errs less by {_listed(better[0] or better[1])}; no measure favours the other."
    else:
        sentence = f"These {len(found)} measures do not tell {names[0]} and {names[1]} apart."
    return Comparison(first=first.name, second=second.name, differences=found, sentence=sentence)


def _listed(differences: list[Difference]) -> str:
    return ", ".join(one.what for one in differences)


def _of_pairs(
    names: tuple[str, str],
    both: tuple[tuple[ErrorCurve, Evidence], tuple[ErrorCurve, Evidence]],
    seed: int,
    replicates: int,
) -> list[Difference]:
    (curve, mine), (other, theirs) = both
    if not (np.array_equal(mine.mated_S, theirs.mated_S) and np.array_equal(mine.non_mated_S, theirs.non_mated_S)):
        raise _unlike(names, "pairs")
    rates = metrics.equal_error_rate(curve), metrics.equal_error_rate(other)
    measures: list[tuple[str, tuple[float, float], Statistic]] = [("EER", rates, evidence.equal_errors)]
    for far in verification.FARS:
        if curve.non_mated * far >= RESOLVED_ERRORS:
            rates = tuple(float(one.fnmr_T[np.argmax(one.fmr_T <= far)]) for one in (curve, other))  # type: ignore[assignment]
            measures.append((f"FNMR at FMR {far:g}", rates, partial(_fnmr, far)))
    found = []
    for what, rates, statistic in measures:
        moved = [one.replicates(statistic, seed, replicates) for one in (mine, theirs)]
        found.append(_difference(what, names, rates, float((moved[0] - moved[1]).std())))
    return found


def _fnmr(far: float, fmr_RK: Numbers, fnmr_RK: Numbers) -> Numbers:
    return evidence.fnmr_at(fmr_RK, fnmr_RK, np.array([far]))[:, 0]


def _of_closed(names: tuple[str, str], both: tuple[ClosedSearches, ClosedSearches]) -> list[Difference]:
    """The paired variance between subjects: of what each adds to the difference of the two."""
    if not np.array_equal(both[0].subjects_P, both[1].subjects_P):
        raise _unlike(names, "probes")
    subjects, subject_P, trials_S = np.unique(both[0].subjects_P, return_inverse=True, return_counts=True)
    if len(subjects) < 2:
        return []
    errors = [1 - metrics.rank1_P(one.mated) for one in both]
    apart_P = errors[0] - errors[1]
    residual_S = np.bincount(subject_P, weights=apart_P) - apart_P.mean() * trials_S
    spread = np.sqrt(np.square(residual_S).sum() * len(subjects) / (len(subjects) - 1)) / len(apart_P)
    rates = float(errors[0].mean()), float(errors[1].mean())
    return [_difference("rank-1 error", names, rates, float(spread))]


def _of_open(
    names: tuple[str, str], both: tuple[OpenSearches, OpenSearches], seed: int, replicates: int
) -> list[Difference]:
    if any(not np.array_equal(*columns) for columns in zip(*((one[0], one[2]) for one in both), strict=True)):
        raise _unlike(names, "probes")
    found = []
    for fpir in identification.FPIRS:
        if len(both[0].non_mated_P) * fpir < SHOWN_ERRORS:
            continue
        rates, moved = [], []
        for mated_P, mated, strangers_P, best_P in both:
            sides = (mated.mate_P, mated_P), (best_P, strangers_P)
            rates.append(float(missed_P(mated, threshold_at(best_P, fpir)).mean()))
            moved.append(metrics.fnir_replicates(*sides, fpir, seed=seed, replicates=replicates))
        spread = float((moved[0] - moved[1]).std())
        found.append(_difference(f"FNIR at FPIR {fpir:g}", names, (rates[0], rates[1]), spread))
    return found


def _unlike(names: tuple[str, str], what: str) -> UserError:
    return UserError(
        f"'{names[0]}' and '{names[1]}' were not measured on the same {what}; evaluate both on one protocol"
    )


def _difference(what: str, names: tuple[str, str], rates: tuple[float, float], spread: float) -> Difference:
    """The difference with its interval, of so large a standard error, and what it means in a sentence."""
    delta = rates[0] - rates[1]
    low, high = delta - intervals.DEVIATE * spread, delta + intervals.DEVIATE * spread
    shown = f"{rates[0]:.2%} against {rates[1]:.2%}"
    if low > 0 or high < 0:
        better, worse = names if high < 0 else names[::-1]
        near, far = sorted((abs(low), abs(high)))
        sentence = (
            f"{what}: {better} errs less than {worse}, by {abs(delta):.2%} (95 %: {near:.2%} to {far:.2%}; {shown})."
        )
    else:
        sentence = f"{what}: no difference can be told ({shown}; 95 %: {low:+.2%} to {high:+.2%})."
    return Difference(
        what=what, first=rates[0], second=rates[1], difference=delta, interval=(low, high), sentence=sentence
    )
