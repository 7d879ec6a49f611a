"""Importers: what each kind of source hands over. The engine (`run`) does everything else.

A kind is a module with an `IMPORTER`, and one line in `KINDS`: by its name all processes find the same functions.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from trainer.errors import UserError

Progress = Callable[[str, int, int], None]  # stage, done, total (0: not known)
Read = Callable[[str], bytes]
"""place -> payload; called from several threads. Raises UserError for a sample that cannot be read: it is left out."""
HeldOut = Callable[[Sequence[str]], Iterable[int]]
"""All identities, sorted -> numbers (0..) of those that form the validation split."""
Content = Literal["image", "vector", "spectrogram"]
KINDS = {
    "omniglot": "trainer.data.importers.omniglot",
    "folder": "trainer.data.importers.folder",
    "glyphs": "trainer.data.importers.glyphs",
    "recordio": "trainer.data.importers.recordio",
    "list": "trainer.data.importers.lists",
    "arrays": "trainer.data.importers.arrays",
    "speech": "trainer.data.importers.speech",
    "tars": "trainer.data.importers.tars",
}
_NOT_A_NUMBER = ("nan", "NaN", "NAN")  # as programs write it; "Nan" is a name


class Entry(NamedTuple):
    """One sample of a source.

    Attributes:
        identity: its class.
        name: tells a person where it came from; stored with the sample.
        place: where `Read` finds it, in words of the kind's own (a path, an offset, an address).
        split: "train", "val" or another, where the source says so; None leaves it to `Listing.held_out`. All samples
            of an identity are in one split.
        attributes: more of the sample, by the names in `Listing.attributes`; a name that is left out has no value.
        size: bytes of the payload, where the source knows them cheaply; shards are cut by it.
        stamp: changes when the payload does (time and size of a file). An interrupted import goes on only where all
            stamps are as they were.
    """

    identity: str
    name: str
    place: str
    split: str | None = None
    attributes: dict[str, str | int | float | bool | None] | None = None
    size: int | None = None
    stamp: str = ""


class PassedOver(NamedTuple):
    """Something in the source that is no sample (a link that leads nowhere, a folder, a device), and why."""

    name: str
    reason: str


@dataclass(slots=True)
class Listing:
    """What a source holds.

    Attributes:
        entries: iterated once, in an order that depends on the input alone; made as they are asked for, so that a
            hundred million of them need no memory. The other fields may be filled until the last one is out.
        source: what the processes that write shards pass to `read_<kind>`: the address, resolved.
        held_out: which identities form the validation split, of those whose entries name no split; None: the share of
            them that the options say.
        provenance: for the manifest; nothing that changes from one run to the next.
        drop_duplicates: leave out payloads that are byte for byte an earlier one of the same identity.
        content: what a payload is: an image in any format that `trainer.data.image` reads, else a file that
            `trainer.data.arrays` reads.
        shape: of each vector or spectrogram; None for images.
        attributes: names of the attributes and their Arrow types by alias ("string", "int64", "double", "bool").
        passed_over: what was left out of the listing, to be told and stored.
        prepare: called after the last entry, with a folder that goes when the import ends: makes there what
            `read_<kind>` gets instead of `source`, and returns its path. For sources that cannot be read in any order.
        threads: payloads that one process reads at a time; more than 1 for reads that wait on a network.
    """

    entries: Iterable[Entry]
    source: str
    held_out: HeldOut | None = None
    provenance: dict[str, str] = field(default_factory=dict)
    drop_duplicates: bool = False
    content: Content = "image"
    shape: tuple[int, ...] | None = None
    attributes: dict[str, str] = field(default_factory=dict)
    passed_over: list[PassedOver] = field(default_factory=list)
    prepare: Callable[[Path], str] | None = None
    threads: int = 1


class Importer(NamedTuple):
    """What a kind does.

    Attributes:
        list: walks a source once, in the importing process; None as `source` where the user named none.
        read: opens it for reading payloads, once in each process that writes shards.
    """

    list: Callable[[str | None, "ImportOptions", Progress], Listing]
    read: Callable[[str, "ImportOptions"], Read]


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """How to import; see `hypersphere data import --help`. Kinds add their own options here, with defaults.

    All but `max_bad`, `overwrite` and `jobs` decide about the result's bytes.
    """

    holdout_alphabets: int | None = None
    holdout_share: float = 0.1
    max_bad: float = 0.01
    min_samples: int = 1
    seed: int = 0
    samples_per_shard: int = 10_000
    overwrite: bool = False
    jobs: int | None = None  # processes; None: as many as there are cores
    check: bool = True  # decode every payload
    max_side: int | None = None  # pixels; larger images are stored smaller
    in_place: bool = False  # tars: write no shards, but indexes of those that are there
    label_field: str = "cls"  # tars: the label is in `.cls`, or in this field of `.json`
    labels: str | None = None  # arrays: the file with a label for each row
    detector: str | None = None  # folder of the one that finds the face to be stored, aligned

    def __post_init__(self) -> None:
        for name, value, allowed, valid in (
            ("--max-bad", self.max_bad, "a share from 0 to 1", 0 <= self.max_bad <= 1),
            ("--holdout-share", self.holdout_share, "a share from 0 to 1", 0 <= self.holdout_share <= 1),
            ("--min-samples", self.min_samples, "1 or more", self.min_samples >= 1),
            ("--seed", self.seed, "0 or more", self.seed >= 0),
            ("--samples-per-shard", self.samples_per_shard, "1 or more", self.samples_per_shard >= 1),
            ("--jobs", self.jobs, "1 or more", self.jobs is None or self.jobs >= 1),
            ("--max-side", self.max_side, "8 pixels or more", self.max_side is None or self.max_side >= 8),
        ):
            if not valid:
                raise UserError(f"{name} {value} is not allowed; give {allowed}")
        if self.detector is not None and (self.in_place or self.max_side is not None or not self.check):
            raise UserError("--detector stores crops of one size; leave --in-place, --max-side and --no-check out")


def share_held_out(share: float, seed: int) -> HeldOut:
    """Choose `share` (0 to 1) of the identities, rounded, by the seed, so that neither split has just one identity.

    A split of one identity teaches and measures nothing: so at least two are held out and two are left, and of fewer
    than four none is held out. A share of 0 holds out none, one of 1 all.
    """

    def numbers(identities: Sequence[str]) -> Iterable[int]:
        total = len(identities)
        count = round(share * total)
        if 0 < share < 1:
            count = min(max(2, count), total - 2) if total >= 4 else 0
        return _draw(total, count, seed)

    return numbers


def choose(names: list[str], count: int, seed: int) -> list[str]:
    """`count` of the names, by the seed; independent of the order in which the names come."""
    ordered = sorted(names)
    return sorted(ordered[i] for i in _draw(len(ordered), count, seed))


def _draw(total: int, count: int, seed: int) -> list[int]:
    picked: list[int] = np.random.default_rng([seed, 0x401D]).permutation(total)[:count].tolist()
    return picked


def importer_of(kind: str) -> Importer:
    """What a kind's module says of it. The others are not imported: all together start as slowly as the rest."""
    found: Importer = import_module(KINDS[kind]).IMPORTER
    return found


class WrongLabel(ValueError):
    """Something that is no label; the message says what it is."""


def identity_of(label: object) -> str:
    """The name of the identity: text as it is; numbers with leading zeros, so that names sort as the numbers do.

    Raises:
        WrongLabel: the label is missing, empty, negative, or a number that is not whole.
    """
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, int) and not isinstance(label, bool):
        if label < 0:
            raise WrongLabel(f"the negative label {label}")
        return f"{label:08d}"
    if label is None or (isinstance(label, str) and not label.strip()):
        raise WrongLabel("no label")
    if isinstance(label, str) and label not in _NOT_A_NUMBER:
        return label
    raise WrongLabel(f"the label {str(label)[:100]}, which is neither text nor a whole number")
