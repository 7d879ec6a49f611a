"""What searches of a gallery found, as parts of a Report: closed set (who is it?) and open set (is it anybody?)."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from trainer.evaluation import intervals, metrics, report, verification
from trainer.evaluation.scores import Labels, MatedSearches, Vectors

RANKS = 20  # of the CMC
CONFUSIONS = 20
FPIRS = (0.003, 0.01, 0.1)


class ClosedSearches(NamedTuple):
    """Searches by enrolled subjects: the subject of each probe, and what it found."""

    subjects_P: Labels
    mated: MatedSearches


class OpenSearches(NamedTuple):
    """Searches by enrolled subjects and by strangers, of one gallery: the best score that each stranger found."""

    subjects_P: Labels
    mated: MatedSearches
    strangers_P: Labels
    non_mated_P: Vectors


def closed_set(
    found: ClosedSearches, gallery_size: int, others: Sequence[float], class_names: Sequence[str]
) -> report.OneShot:
    """Rank-1, CMC and confusions.

    Args:
        others: rank-1 with other enrolled samples, or of each run.
    """
    hits_P = metrics.rank1_P(found.mated)
    low, high = intervals.of_mean(hits_P, found.subjects_P)
    every = [float(hits_P.mean()), *others]
    return report.OneShot(
        gallery_size=gallery_size,
        probes=len(found.subjects_P),
        rank1=every[0],
        low=low,
        high=high,
        cmc=report.rounded(metrics.match_characteristic(found.mated, min(RANKS, gallery_size))),
        rank1_draws=list(others),
        rank1_mean=float(np.mean(every)),
        rank1_std=float(np.std(every, ddof=1)) if others else 0.0,
        confusions=_confusions(found, class_names),
    )


def open_set(found: OpenSearches, gallery_size: int, unenrolled: int, share: float, seed: int) -> report.OpenSet:
    """FNIR at FPIRs, and the curve of both.

    Args:
        unenrolled, share: subjects that are not in the gallery, and which share of all they are.
    """
    sides = (found.mated.mate_P, found.subjects_P), (found.non_mated_P, found.strangers_P)
    points = [metrics.fnir_at_fpir(found.mated, found.non_mated_P, fpir) for fpir in FPIRS]
    points = [intervals.of_fnir(*sides, point, seed=seed, replicates=verification.REPLICATES) for point in points]
    thresholds_T, fpir_T, fnir_T = metrics.identification_curve(found.mated.mate_P, found.non_mated_P)
    kept = report.thinned(fpir_T, fnir_T)
    return report.OpenSet(
        unenrolled_share=share,
        gallery_size=gallery_size,
        unenrolled=unenrolled,
        mated_probes=len(found.subjects_P),
        non_mated_probes=len(found.strangers_P),
        points=points,
        thresholds=report.rounded(thresholds_T[kept], 9),
        fpir=report.rounded(fpir_T[kept]),
        fnir=report.rounded(fnir_T[kept]),
    )


def _confusions(found: ClosedSearches, class_names: Sequence[str]) -> list[report.Confusion]:
    """The identities most often taken for one other, by number of probes."""
    wrong_P = found.mated.ahead_P > 0
    mine, rivals = found.subjects_P[wrong_P].tolist(), found.mated.rival_P[wrong_P].tolist()
    probes = Counter(found.subjects_P.tolist())
    worst = sorted(Counter(zip(mine, rivals, strict=True)).items(), key=lambda item: (-item[1], item[0]))[:CONFUSIONS]
    return [
        report.Confusion(identity=class_names[one], taken_for=class_names[other], probes=count, of=probes[one])
        for (one, other), count in worst
    ]
