"""What evaluation and calibration found, as JSON: the Report with all that tables and plots show, and Thresholds."""

from math import isqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from trainer.evaluation.curve import Curve
from trainer.evaluation.findings import Band, Cost, Ends, Enrolment, Groups, Growth, Retrieval
from trainer.evaluation.probability import MateProbability
from trainer.evaluation.scores import GRID, STEPS, PairCounts
from trainer.strict import Strict

CURVE_POINTS = 200  # kept along each axis of a curve
HISTOGRAM_BINS = 200  # from the lowest score that occurs to the highest; fewer where pairs are few


class TarAtFar(Strict):
    """True accept rate at a false accept rate; None with a reason where the pairs do not resolve it."""

    far: float
    tar: float | None
    low: float | None = None
    high: float | None = None
    threshold: float | None
    reason: str | None = None


class Histogram(Strict):
    """Density of scores: `mated[i]` is the share of mated pairs in edges[i] ... edges[i + 1], per unit of score."""

    edges: list[float]
    mated: list[float]
    non_mated: list[float]


class TenFold(Strict):
    """LFW-style accuracy: mean over ten folds that share no identity, and its standard error."""

    accuracy: float
    standard_error: float
    pairs: int


class AllPairs(Strict):
    """1:1, over all pairs of the samples used, or over those of a list."""

    samples: int
    subjects: int
    mated_pairs: int
    non_mated_pairs: int
    eer: float
    eer_interval: Ends
    auc: float
    auc_interval: Ends
    costs: list[Cost]
    tar_at_far: list[TarAtFar]
    band: Band
    ten_fold: TenFold | None = Field(description="None where ten folds without a common identity cannot be made")
    thresholds: list[float]
    fmr: list[float]
    fnmr: list[float]
    histogram: Histogram


class Confusion(Strict):
    """An identity taken for another, in searches of the one-shot gallery."""

    identity: str
    taken_for: str
    probes: int = Field(description="of `identity` whose best rival was `taken_for`, ahead of the mate")
    of: int


class OneShot(Strict):
    """Closed set: one enrolled sample per identity, all others are probes, every identity in one gallery."""

    gallery_size: int
    probes: int
    rank1: float = Field(description="with the first sample of each identity enrolled, or over all runs")
    low: float = Field(description="95 % interval of rank1, by subject")
    high: float
    cmc: list[float] = Field(description="share of probes whose mate is among the first 1, 2, ... candidates")
    rank1_draws: list[float] = Field(description="rank1 with other enrolled samples, or of each run of a protocol")
    rank1_mean: float
    rank1_std: float
    confusions: list[Confusion]


class FnirAtFpir(Strict):
    """FNIR at an FPIR; None with a reason where the non-mated probes do not show it.

    `fnir` wants the mate at or above the threshold at any rank, `fnir_rank1` wants it first as well. The interval is of
    `fnir`, bootstrapped over subjects, with the threshold chosen anew in each replicate.
    """

    fpir: float
    fnir: float | None
    fnir_rank1: float | None
    low: float | None
    high: float | None
    threshold: float | None
    reason: str | None = None


class OpenSet(Strict):
    """Open set: a share of the identities is not enrolled; their samples must come back as unknown."""

    unenrolled_share: float
    gallery_size: int
    unenrolled: int
    mated_probes: int
    non_mated_probes: int
    points: list[FnirAtFpir]
    thresholds: list[float]
    fpir: list[float]
    fnir: list[float]


class Geometry(Strict):
    """Angles in degrees about the normalised means of the identities."""

    intra_mean: float = Field(description="mean angle between a sample and its identity's centre")
    inter_smallest: float = Field(description="smallest angle between two centres")
    inter_nearest_mean: float = Field(description="mean angle between a centre and the nearest other one")


class Report(Strict):
    """What `evaluate` found; None where the protocol has no such part."""

    format: Literal[2] = 2
    source: str
    model_id: str | None
    seed: int
    identities: int
    samples: int
    dimension: int
    verification: AllPairs | None
    one_shot: OneShot | None
    open_set: OpenSet | None
    geometry: Geometry | None
    enrolments: list[Enrolment] = Field([])
    retrieval: Retrieval | None = None
    growth: Growth | None = None
    groups: list[Groups] = Field([])
    remarks: list[str] = Field([], description="what a reader has to know: doubts about the data")

    def to_json(self) -> str:
        """The report as JSON; `Report.model_validate_json` reads it back."""
        return self.model_dump_json(indent=2) + "\n"

    def scalars(self) -> dict[str, float]:
        """The headline figures by name, for a table or a tracker; those that cannot be resolved are left out."""
        found: dict[str, float | None] = {}
        if (shot := self.one_shot) is not None:
            found |= {"rank1": shot.rank1, "rank1_mean": shot.rank1_mean}
        if (pairs := self.verification) is not None:
            found |= {"eer": pairs.eer, "auc": pairs.auc}
            found |= {f"tar_at_far_{point.far:g}": point.tar for point in pairs.tar_at_far}
            found |= {f"min_cost_{one.prior:g}": one.cost for one in pairs.costs}
            found["ten_fold_accuracy"] = None if pairs.ten_fold is None else pairs.ten_fold.accuracy
        if self.open_set is not None:
            known = [point for point in self.open_set.points if point.fnir is not None]
            found |= {f"fnir_at_fpir_{point.fpir:g}": point.fnir for point in known}
            found |= {f"tpir_at_fpir_{point.fpir:g}": 1 - (point.fnir or 0.0) for point in known}
        if self.geometry is not None:
            found["intra_angle_mean"] = self.geometry.intra_mean
            found["inter_angle_smallest"] = self.geometry.inter_smallest
        if self.retrieval is not None:
            found |= {"map_at_r": self.retrieval.map_at_r, "recall_at_1": self.retrieval.recall[0]}
        return {name: value for name, value in found.items() if value is not None}


class Threshold(Strict):
    """A similarity at or above which two vectors, or a probe and a candidate, are called the same identity.

    `target` names the error rate it was calibrated for: FMR (one comparison) or FPIR (one search of a gallery of
    `gallery_size` subjects). `low` and `high` bound the error rate that one such gallery
    reaches, at `confidence`.
    """

    value: float = Field(ge=-1.0, le=1.0001)
    target: Literal["FMR", "FPIR"]
    rate: float = Field(gt=0, lt=1)
    gallery_size: int = Field(1, ge=1)
    low: float = Field(ge=0, le=1)
    high: float = Field(ge=0, le=1)
    confidence: float = Field(0.95, gt=0, lt=1)
    probes: int = Field(ge=1, description="non-mated probes it was measured on")
    subjects: int = Field(ge=1, description="subjects those probes belong to")
    model_id: str
    expected_hits: float | None = Field(None, ge=0, description="false positives to expect among the probes")
    misfit: float | None = Field(None, ge=0, le=1, description="probability of scores so far from the fitted tail")
    source: str = Field(description="where it came from, in words: the data set and split, and the method")


class Calibration(Strict):
    """Thresholds by use: `verify` for 1:1, `identify` for 1:N; `curve` gives those of galleries of other sizes."""

    verify: Threshold
    identify: Threshold
    curve: Curve | None = Field(None, description="None in a calibration of an older version")
    probability: MateProbability | None = Field(None, description="of 1:1; None where mated pairs are too few")


def rounded(values: NDArray[np.floating], digits: int = 6) -> list[float]:
    """Values with so many significant digits, for a file that people open."""
    return [float(f"{value:.{digits}g}") for value in values]


def thinned(falling_T: NDArray[np.float64], rising_T: NDArray[np.float64]) -> NDArray[np.int64]:
    """Positions along a curve that draw it alike on linear and logarithmic axes: up to some 800 of any number.

    Args:
        falling_T: false positive rates, descending.
        rising_T: false negative rates, ascending.
    """
    kept = {0, len(falling_T) - 1}
    for ascending_T, flip in ((rising_T, False), (falling_T[::-1], True)):
        smallest = max(float(ascending_T[ascending_T > 0].min(initial=1.0)), 1e-9)
        levels = np.concatenate([np.geomspace(smallest, 1, CURVE_POINTS), np.linspace(0, 1, CURVE_POINTS)])
        found = np.minimum(np.searchsorted(ascending_T, levels), len(ascending_T) - 1)
        kept.update((len(ascending_T) - 1 - found if flip else found).tolist())
    return np.array(sorted(kept))


def histogram_of(counts: PairCounts) -> Histogram:
    """Densities of the mated and non-mated scores, over the range that occurs."""
    cells = np.flatnonzero(counts.mated + counts.non_mated)
    bins = min(HISTOGRAM_BINS, 20 + isqrt(int(counts.mated.sum())))
    width = max(1, -(-int(cells[-1] + 1 - cells[0]) // bins))
    starts = np.arange(cells[0], cells[-1] + 1, width)
    edges = (np.append(starts, starts[-1] + width) - STEPS) * GRID
    mated, non_mated = (
        np.add.reduceat(c[: cells[-1] + 1], starts) / c.sum() / (width * GRID) for c in (counts.mated, counts.non_mated)
    )
    return Histogram(edges=rounded(edges, 9), mated=rounded(mated), non_mated=rounded(non_mated))
