"""What `hypersphere data check` leaves in a folder: the findings as JSON, the duplicates as CSV, and two sheets."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trainer.atomic import DiskFull, write_file
from trainer.data.curate.check import Check
from trainer.data.curate.lists import as_csv
from trainer.data.curate.sheet import Row, draw, pictures
from trainer.data.curate.view import key_at
from trainer.data.split import Split
from trainer.errors import UserError

_ROWS, _COLUMNS = 8, 8  # of samples: identities of each split, samples of each
_COPIES = 40  # pairs that are drawn


class Told(NamedTuple):
    """A sample as a person finds it again."""

    split: str
    shard: str
    key: str
    identity: str


class Copy(NamedTuple):
    """Two samples in two identities or splits that are alike, by position among all; `bits` None: equal files."""

    first: int
    second: int
    bits: int | None


def write_report(found: Check, folder: Path, seed: int = 0) -> list[Path]:
    """Write check.json, duplicates.csv and, of images, samples.png and duplicates.png; those that were written.

    Args:
        folder: made where it is missing.
        seed: chooses the samples that are drawn.

    Raises:
        UserError: a negative seed, or the folder cannot be written.
    """
    title = f"{found.manifest.kind}: {len(found.scan.good)} samples"
    files: dict[str, str | bytes] = {
        "check.json": json.dumps(_summary(found), indent=1, ensure_ascii=False) + "\n",
        "duplicates.csv": _table(found),
    }
    if found.manifest.content == "image":
        files["samples.png"] = draw(title, list(_sample_rows(found, seed)))
        if rows := list(_copy_rows(found)):
            files["duplicates.png"] = draw(f"{title}, of which these are alike", rows)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_file(folder / name, content)
    except DiskFull:
        raise
    except OSError as error:
        raise UserError(f"'{folder}' cannot be written: {error.strerror}; give another --out") from error
    return [folder / name for name in files]


def _summary(found: Check) -> dict[str, object]:
    copies = {
        "equal": {"apart": len(found.equal), "within_an_identity": found.equal_within},
        "near": {"apart": len(found.near), "within_an_identity": found.near_within},
    }
    splits = {name: asdict(balance) for name, balance in found.balance.items()}
    return {"splits": splits, "faults": found.faults, "duplicates": copies}


def _table(found: Check) -> str:
    rows: list[tuple[object, ...]] = [
        ("bits", "where", *(f"{field}_{which}" for which in "ab" for field in Told._fields))
    ]
    for copy in _copies(found):
        one, two = tell(found, copy.first), tell(found, copy.second)
        where = "across splits" if one.split != two.split else "across identities"
        rows.append(("equal" if copy.bits is None else copy.bits, where, *one, *two))
    return as_csv(rows)


def _copies(found: Check) -> Iterator[Copy]:
    for first, second in zip(found.equal.first.tolist(), found.equal.second.tolist(), strict=True):
        yield Copy(first, second, None)
    near = found.near
    for row in np.argsort(near.distance, kind="stable").tolist():
        yield Copy(int(near.first[row]), int(near.second[row]), int(near.distance[row]))


def tell(found: Check, position: int) -> Told:
    """Where a sample is, by its position among all."""
    name, inside = found.scan.place(position)
    split = found.splits[name]
    return Told(name, *key_at(split, inside), _identity(split, int(found.scan.labels[position])))


def _identity(split: Split, label: int) -> str:
    """The name of an identity, or its label where the table of names is among what is damaged."""
    with suppress(UserError, IndexError):
        return split.classes[label]
    return f"label {label}"


def _sample_rows(found: Check, seed: int) -> Iterator[Row]:
    """Some identities of each split, drawn by the seed, and some of their samples."""
    random = np.random.default_rng([seed, 0x5EE7])
    for name, split in found.splits.items():
        start = found.scan.starts[name]
        good = found.scan.good[start : start + split.samples]
        labels = np.where(good, found.scan.labels[start : start + split.samples], -1)
        present = np.unique(labels[good])
        for label in np.sort(random.permutation(present)[:_ROWS]).tolist():
            of_it = np.flatnonzero(labels == label)
            chosen = np.sort(random.permutation(of_it)[:_COLUMNS])
            text = f"{name}: {_identity(split, label)}, {len(of_it)} samples"
            yield Row(text, pictures(split, chosen.tolist()))


def _copy_rows(found: Check) -> Iterator[Row]:
    for copy, _ in zip(_copies(found), range(_COPIES), strict=False):
        drawn = []
        for position in (copy.first, copy.second):
            name, inside = found.scan.place(position)
            drawn += pictures(found.splits[name], [inside])
        one, two = tell(found, copy.first), tell(found, copy.second)
        what = "equal" if copy.bits is None else f"{copy.bits} bits apart"
        yield Row(f"{what}: {one.split}: {one.identity} and {two.split}: {two.identity}", drawn)
