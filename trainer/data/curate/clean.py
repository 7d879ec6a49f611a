"""A data set without the samples whose label is likely wrong; the lists and sheets of them that a person looks at."""

import csv
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.atomic import write_file
from trainer.data.curate.lists import as_csv
from trainer.data.curate.noise import ALIKE, DISTANCE, Suspects, Twins, find_suspects, find_twins
from trainer.data.curate.sheet import Row, draw, pictures
from trainer.data.curate.view import Piece, View, fresh_view, identities_of, key_at
from trainer.data.manifest import Manifest
from trainer.data.reader import Progress
from trainer.data.split import Split
from trainer.data.tables import positions_of, samples_of_class
from trainer.errors import UserError

SUSPECTS, TWINS = "suspects", "twins"
_SHEET_ROWS = 40
_SHOWN = 4  # samples of an identity in a row of a sheet
_FITS, _STRANGE = "like the nearest", "like neither"
Embed = Callable[[Split], tuple[NDArray[np.float32], NDArray[np.int64]]]


@dataclass(frozen=True, slots=True)
class Found:
    """What is likely wrong in a split: positions that are left out, and pairs of labels that are one person."""

    suspects: NDArray[np.int64]
    twins: list[tuple[int, int]]


def clean(
    address: str | Path,
    out: Path,
    embed: Embed,
    *,
    split: str = "train",
    deviations: float = DISTANCE,
    alike: float = ALIKE,
    join: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Found:
    """Write a data set at `out` without the samples of a split whose label is likely wrong; no shard is rewritten.

    Beside its manifest lie suspects.csv and twins.csv, the most likely first, and, of images, a sheet of each. The
    other splits stay as they are.

    Args:
        address: of the data set.
        out: new folder.
        embed: unit vectors and labels of all samples of a split, in order of position.
        deviations, alike: see `find_suspects` and `find_twins`.
        join: make classes that are likely one person one identity, with the name of the first.

    Raises:
        UserError: no such split, an option that is not allowed, or `out` exists.
    """
    manifest = Manifest.read(address)
    part = manifest.split(split)
    told = {f"cleaned_{split}": f"without suspects beyond {deviations:g} deviations, twins above {alike:g}"}
    with fresh_view(out, overwrite, manifest, told) as view:
        vectors_ND, labels_N = embed(part)
        suspects = find_suspects(vectors_ND, labels_N, part.identities, deviations, progress)
        kept = np.ones(part.samples, bool)
        kept[suspects.positions] = False
        twins = find_twins(vectors_ND, labels_N, part.identities, kept, alike, progress)
        found = Found(suspects.positions, list(zip(twins.first.tolist(), twins.second.tolist(), strict=True)))
        _write_lists(view.folder, part, labels_N, suspects, twins)
        if manifest.content == "image":
            _draw_sheets(view.folder, part, labels_N, found, suspects)
        _write_split(view, manifest, part, found, join)
    return found


def clean_by_lists(
    address: str | Path, lists: Path, out: Path, *, split: str = "train", join: bool = False, overwrite: bool = False
) -> Found:
    """As `clean`, but by the lists that an earlier call left in the folder `lists` and a person may have shortened.

    Raises:
        UserError: as `clean`; or a list is missing, malformed, or of another data set.
    """
    manifest = Manifest.read(address)
    part = manifest.split(split)
    found = Found(_read_suspects(lists, part), _read_twins(lists, part))
    told = {f"cleaned_{split}": f"by the lists in {os.path.basename(os.path.abspath(lists))}"}
    files = [lists / f"{name}.csv" for name in (SUSPECTS, TWINS)]
    with fresh_view(out, overwrite, manifest, told, needed=files) as view:
        _write_split(view, manifest, part, found, join)
    return found


def _write_split(view: View, manifest: Manifest, split: Split, found: Found, join: bool) -> None:
    kept = np.ones(split.samples, bool)
    kept[found.suspects] = False
    relabel = joined(split.identities, found.twins) if join else np.arange(len(split.classes))
    view.add(split.name, [Piece(split, kept, relabel)], identities_of(split))
    view.carry(manifest, [name for name in manifest.splits if name != split.name])


def joined(classes: int, pairs: Iterable[tuple[int, int]]) -> NDArray[np.int64]:
    """For each label the smallest one that it is joined to, over any number of pairs."""
    lowest = np.arange(classes)

    def root(label: int) -> int:
        while lowest[label] != label:
            lowest[label] = lowest[lowest[label]]  # halves the way for the next one
            label = int(lowest[label])
        return label

    for one, two in pairs:
        low, high = sorted((root(one), root(two)))
        lowest[high] = low
    return np.array([root(label) for label in range(classes)]) if classes else lowest


def _write_lists(folder: Path, split: Split, labels_N: NDArray[np.int64], suspects: Suspects, twins: Twins) -> None:
    classes, counts = split.classes, split.classes.counts()
    rows: list[Sequence[object]] = [
        ("position", "shard", "key", "identity", "cosine", "deviations", "nearest", "cosine_to_nearest", "looks")
    ]
    for place, position in enumerate(suspects.positions.tolist()):
        identity, nearest = classes[int(labels_N[position])], classes[int(suspects.nearest[place])]
        numbers = f"{suspects.own[place]:.4f}", f"{suspects.deviations[place]:.1f}"
        looks = _FITS if suspects.fits[place] else _STRANGE
        rows.append(
            (position, *key_at(split, position), identity, *numbers, nearest, f"{suspects.other[place]:.4f}", looks)
        )
    write_file(folder / f"{SUSPECTS}.csv", as_csv(rows))
    rows = [("label_a", "identity_a", "samples_a", "label_b", "identity_b", "samples_b", "similarity")]
    for one, two, similarity in zip(twins.first.tolist(), twins.second.tolist(), twins.similarity, strict=True):
        both = (one, classes[one], counts[one], two, classes[two], counts[two])
        rows.append((*both, f"{similarity:.4f}"))
    write_file(folder / f"{TWINS}.csv", as_csv(rows))


def _draw_sheets(folder: Path, split: Split, labels_N: NDArray[np.int64], found: Found, suspects: Suspects) -> None:
    """Each suspect beside samples of its identity and of the nearest one; samples of two identities that are alike."""
    rows = []
    for place, position in enumerate(found.suspects[:_SHEET_ROWS].tolist()):
        own, nearest = int(labels_N[position]), int(suspects.nearest[place])
        text = f"{key_at(split, position)[1]} in {split.classes[own]}; {'' if suspects.fits[place] else 'not '}"
        text += f"like {split.classes[nearest]} (right)"
        shown = [*pictures(split, [position]), None, *_examples(split, own, found), None]
        rows.append(Row(text, [*shown, *_examples(split, nearest, found)]))
    write_file(folder / f"{SUSPECTS}.png", draw(f"{len(found.suspects)} samples that do not look like the rest", rows))
    rows = []
    for one, two in found.twins[:_SHEET_ROWS]:
        text = f"{split.classes[one]} and {split.classes[two]}"
        rows.append(Row(text, [*_examples(split, one, found), None, *_examples(split, two, found)]))
    write_file(folder / f"{TWINS}.png", draw(f"{len(found.twins)} pairs of identities that may be one", rows))


def _examples(split: Split, label: int, found: Found) -> list[NDArray[np.uint8] | None]:
    """The first samples of an identity that are no suspects; gaps where it has too few."""
    count, end = samples_of_class(split.classes, label, split.samples)
    positions = positions_of(split.classes[label], np.asarray(split.by_class[end - count : end]), split.samples)
    positions = positions[~np.isin(positions, found.suspects)][:_SHOWN]
    gaps: list[NDArray[np.uint8] | None] = [None] * (_SHOWN - len(positions))
    return [*pictures(split, positions.tolist()), *gaps]


def _read_suspects(folder: Path, split: Split) -> NDArray[np.int64]:
    positions = []
    for number, row in _read_csv(folder / f"{SUSPECTS}.csv", ("position", "shard", "key")):
        position = int(row["position"]) if row["position"].isdecimal() else split.samples
        if position >= split.samples or key_at(split, position) != (row["shard"], row["key"]):
            raise UserError(
                f"line {number} of '{folder / f'{SUSPECTS}.csv'}' names the sample '{row['key']}' at position "
                f"{row['position']}, which the split '{split.name}' does not have there; give the lists of this set"
            )
        positions.append(position)
    return np.array(positions, np.int64)


def _read_twins(folder: Path, split: Split) -> list[tuple[int, int]]:
    pairs = []
    for number, row in _read_csv(folder / f"{TWINS}.csv", ("label_a", "identity_a", "label_b", "identity_b")):
        pair = []
        for which in "ab":
            text = row[f"label_{which}"]
            label = int(text) if text.isdecimal() else split.identities
            if label >= split.identities or split.classes[label] != row[f"identity_{which}"]:
                raise UserError(
                    f"line {number} of '{folder / f'{TWINS}.csv'}' names '{row[f'identity_{which}']}' with label "
                    f"{text}, which the split '{split.name}' does not have; give the lists of this set"
                )
            pair.append(label)
        pairs.append((pair[0], pair[1]))
    return pairs


def _read_csv(path: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """The lines of a list, with their numbers in the file."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows = [(reader.line_num, row) for row in reader]
            missing = [column for column in columns if column not in (reader.fieldnames or ())]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"'{path}' cannot be read: {error}; name the folder that 'data clean' wrote") from error
    if missing or any(row[column] is None for _, row in rows for column in columns):
        wanted = ", ".join(columns)
        raise UserError(f"'{path}' lacks a column or a value of {wanted}; take whole lines out of it and no more")
    return rows
