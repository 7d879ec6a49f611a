"""What single measurements found, as parts of a Report: retrieval, groups, several samples a subject, comparisons."""

from typing import Literal

from pydantic import Field

from trainer.strict import Strict

Ends = tuple[float, float]  # of a 95 % interval


class Retrieval(Strict):
    """Every sample is searched among all others. `map_at_r` is the mean average precision at R."""

    queries: int
    ks: list[int]
    recall: list[float] = Field(description="share of the queries with a mate among the first k")
    recall_low: list[float]
    recall_high: list[float]
    map_at_r: float
    map_interval: Ends


class Cost(Strict):
    """The minimum detection cost at a prior of mated pairs, normalised: 1 where the scores tell nothing."""

    prior: float
    cost: float
    interval: Ends


class Band(Strict):
    """The 95 % interval of FNMR at each FMR, the threshold chosen anew in each replicate."""

    fmr: list[float]
    low: list[float]
    high: list[float]


class Group(Strict):
    """The errors of one group at the common threshold; None with a reason where it has too little data.

    FMR is of pairs of two subjects of the group, FNMR of its subjects' own.
    """

    value: str
    subjects: int
    mated_pairs: int
    non_mated_pairs: int
    fmr: float | None
    fmr_interval: Ends | None
    fnmr: float | None
    fnmr_interval: Ends | None
    reason: str | None = None


class Groups(Strict):
    """Differences between the groups that an attribute makes, at one threshold for all.

    A differential is the largest of the groups' rates over the smallest (ISO/IEC 19795-10); None where a rate that the
    data resolve is 0, or fewer than two groups have one.
    """

    attribute: str
    far: float = Field(description="that the common threshold keeps among all pairs")
    threshold: float
    groups: list[Group]
    fmr_differential: float | None
    fnmr_differential: float | None


class Enrolment(Strict):
    """Searches of a gallery with several samples of each subject, put together in one way."""

    way: Literal["first", "maximum", "mean", "quality"]
    samples: int = Field(description="enrolled of each subject, at most")
    gallery_size: int
    probes: int
    rank1: float
    rank1_interval: Ends
    fpir: float | None = Field(description="None where the non-mated probes do not show it")
    fnir: float | None
    fnir_interval: Ends | None


class Growth(Strict):
    """FPIR at a fixed threshold as the gallery grows, expected over galleries of so many of the subjects at hand."""

    threshold: float
    sizes: list[int]
    fpir: list[float]
    low: list[float] = Field(description="95 % interval by the probes' subjects")
    high: list[float]


class HardPair(Strict):
    """Two rows of what was measured that are easily taken for the same subject, or for different ones."""

    first: int
    second: int
    score: float


class Hardest(Strict):
    """The false matches that score highest, and the false non-matches that score lowest; one of each two subjects."""

    matches: list[HardPair]
    non_matches: list[HardPair]


class Difference(Strict):
    """One error rate of two Embedders on the same samples; the interval is of the difference, first minus second."""

    what: str
    first: float
    second: float
    difference: float
    interval: Ends
    sentence: str


class Comparison(Strict):
    """Two Embedders on one protocol."""

    first: str = Field(description="name of the Embedder")
    second: str
    differences: list[Difference]
    sentence: str
