"""Differences between groups: FMR and FNMR of each at one threshold for all, by any attribute of the samples."""

from collections.abc import Sequence

import numpy as np

from trainer.evaluation import evidence, metrics
from trainer.evaluation.findings import Group, Groups
from trainer.evaluation.metrics import RESOLVED_ERRORS
from trainer.evaluation.scores import Labels, Roles, pair_counts

MOST_GROUPS = 50  # the largest ones


def differentials(
    roles: Roles, labels_N: Labels, codes_N: Labels, values: Sequence[str], attribute: str, far: float
) -> Groups:
    """The errors of each group at the threshold that keeps FMR at `far` among all pairs.

    Args:
        roles: the samples as they search, and as they are enrolled.
        codes_N: the group of each sample, an index into `values`; a sample without one has an empty value.
        far: is raised to what the pairs resolve, 30 false matches.
    """
    curve = metrics.verification_curve(pair_counts(roles[0], labels_N, roles[1]))
    far = max(far, min(1.0, RESOLVED_ERRORS / curve.non_mated))
    threshold = float(curve.thresholds_T[np.argmax(curve.fmr_T <= far)])
    sizes = np.bincount(codes_N, minlength=len(values))
    largest = [code for code in np.argsort(-sizes, kind="stable")[:MOST_GROUPS].tolist() if sizes[code]]
    groups = [_group(roles, labels_N, codes_N == code, values[code], threshold) for code in sorted(largest)]
    return Groups(
        attribute=attribute,
        far=far,
        threshold=threshold,
        groups=groups,
        fmr_differential=_differential([group.fmr for group in groups]),
        fnmr_differential=_differential([group.fnmr for group in groups]),
    )


def _group(roles: Roles, labels_N: Labels, mine_N: Labels, value: str, threshold: float) -> Group:
    vectors_nD, enrolled_nD, labels_n = roles[0][mine_N], roles[1][mine_N], labels_N[mine_N]
    subjects = len(np.unique(labels_n))
    counts = pair_counts(vectors_nD, labels_n, enrolled_nD)
    mated, non_mated = int(counts.mated.sum()), int(counts.non_mated.sum())
    known = {"value": value or "(none)", "subjects": subjects, "mated_pairs": mated, "non_mated_pairs": non_mated}
    if not mated or not non_mated:
        reason = "it takes two subjects, and two samples of one"
        return Group(**known, fmr=None, fmr_interval=None, fnmr=None, fnmr_interval=None, reason=reason)
    found = evidence.of_all_pairs(vectors_nD, labels_n, metrics.verification_curve(counts), threshold, enrolled_nD)
    fmr, fnmr = float(found.fmr_K[0]), float(found.fnmr_K[0])
    matches, misses = round(fmr * non_mated), round(fnmr * mated)
    reason = f"{matches} false matches and {misses} false non-matches: fewer than {RESOLVED_ERRORS} resolve no rate"
    return Group(
        **known,
        fmr=fmr,
        fmr_interval=found.fmr_interval(0),
        fnmr=fnmr,
        fnmr_interval=found.fnmr_interval(0),
        reason=reason if min(matches, misses) < RESOLVED_ERRORS else None,
    )


def _differential(rates: Sequence[float | None]) -> float | None:
    known = [rate for rate in rates if rate is not None]
    return max(known) / min(known) if len(known) > 1 and min(known) > 0 else None
