"""Protocols as files: which images are compared, and which are searched in which gallery.

FILE is one of
  pairs.txt         `a b 1` a line (1: same, 0: not; a fourth column is the fold), or LFW's own `name i j`
  lfw.bin, ...      InsightFace's pairs of encoded images (`bins`)
  protocol.yaml     templates of several images, compared or searched, as in IJB (`templates`)
  run01/            Omniglot's one-shot runs: a folder with `class_labels.txt`, or one that holds several
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError
from trainer.evaluation.bins import read_bin
from trainer.evaluation.scores import Labels

MOST_TEXT = 1 << 30  # bytes of a list
FOLDS = 10
RUN_FILE = "class_labels.txt"


@dataclass(frozen=True, slots=True)
class Search:
    """Templates that are searched for in a gallery of others."""

    gallery_G: Labels
    probes_P: Labels


@dataclass(frozen=True, slots=True)
class Lists:
    """A protocol from a file. A template is what is compared: one image, or several of one subject.

    Attributes:
        images: each encoded, or as the file names it.
        template_I, medium_I: the template of each row of images, and the medium in it (a video's frames are one).
        image_I: the image of each row.
        subject_T: of each template, an index into `subjects`.
        subjects: names.
        pairs_P2, same_P, folds_P: templates that are compared.
        searches: of one gallery each.
    """

    images: Sequence[bytes | str]
    image_I: Labels
    template_I: Labels
    medium_I: Labels
    subject_T: Labels
    subjects: Sequence[str]
    pairs_P2: Labels = field(default_factory=lambda: np.empty((0, 2), np.int64))
    same_P: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))
    folds_P: Labels = field(default_factory=lambda: np.empty(0, np.int64))
    searches: Sequence[Search] = ()


def read_text(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The lines of a list that are not empty, split at tabs, else at commas, else at blanks; with their numbers."""
    try:
        if (size := path.stat().st_size) > MOST_TEXT:
            raise UserError(f"'{path}' has {size} bytes; a list of at most {MOST_TEXT} is read")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}; name the file of a protocol") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"'{path}' is no text ({error.reason}); a list of pairs is UTF-8, a .bin ends in .bin"
        ) from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            separator = "\t" if "\t" in line else "," if "," in line else None
            yield number, [word.strip() for word in line.split(separator)]


def inside(name: str, path: Path, number: int) -> str:
    """A name of an image, once it is known to lie in the images' folder.

    Raises:
        UserError: it leads out of it.
    """
    if not name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
        raise UserError(f"'{path}', line {number}: '{name}' leads out of the images' folder; name images inside it")
    return name


def read_pairs(path: Path) -> Lists:
    """A list of pairs, or a `.bin` of them.

    Where the file has no names of identities, images that pairs call the same are one subject. Where it has no folds,
    its lines in order make ten (as the lists of LFW, CFP and AgeDB are cut).

    Raises:
        UserError: a file that cannot be read, a malformed line, or contradictions.
    """
    names: list[str] | None = None
    images: Sequence[bytes | str]
    folds: list[str] = []
    if path.suffix == ".bin":
        images, same = read_bin(path)
    else:
        rows = list(read_text(path))
        lfw = bool(rows) and len(rows[0][1]) <= 2 and all(word.isdigit() for word in rows[0][1])
        images, same, folds = _lfw(path, rows) if lfw else _plain(path, rows)
        names = [str(PurePosixPath(str(image)).parent) for image in images] if lfw else None
    if not same:
        raise UserError(f"'{path}' lists no pair; a line is `a b 1` (the same) or `a b 0`")
    unique: list[bytes | str] = list(dict.fromkeys(images))
    place = {image: index for index, image in enumerate(unique)}
    pairs_P2 = np.array([place[image] for image in images], np.int64).reshape(-1, 2)
    same_P = np.array(same, np.bool_)
    if (self_P := pairs_P2[:, 0] == pairs_P2[:, 1]).any():
        raise UserError(f"'{path}': pair {int(np.argmax(self_P)) + 1} compares an image with itself; remove the line")
    if names is None:
        subject_T = components(len(unique), pairs_P2[same_P])
        subjects = [str(unique[row])[:80] for row in np.unique(subject_T, return_index=True)[1]]
        subject_T = np.unique(subject_T, return_inverse=True)[1]
    else:
        owner = dict(zip(images, names, strict=True))
        subjects, subject_T = _coded([owner[image] for image in unique])
    wrong_P = (subject_T[pairs_P2[:, 0]] == subject_T[pairs_P2[:, 1]]) != same_P
    if wrong_P.any():
        raise UserError(
            f"'{path}': pair {int(np.argmax(wrong_P)) + 1} is called different, but other lines make both images the "
            "same subject; correct the list"
        )
    rows_I = np.arange(len(unique))
    parts = _coded(folds)[1] if folds else np.arange(len(same)) * FOLDS // len(same)
    return Lists(unique, rows_I, rows_I, rows_I, subject_T, subjects, pairs_P2, same_P, parts)


def _plain(path: Path, rows: list[tuple[int, list[str]]]) -> tuple[list[str], list[bool], list[str]]:
    images, same, folds = [], [], []
    width = len(rows[0][1]) if rows else 3
    for number, words in rows:
        if len(words) != width or width not in (3, 4) or words[2] not in ("0", "1"):
            raise UserError(
                f"'{path}', line {number}: {' '.join(words)!r} is no pair; a line is `a b 1` (the same) or `a b 0`, "
                "each with a fold as its fourth word or none"
            )
        images += [inside(word, path, number) for word in words[:2]]
        same.append(words[2] == "1")
        folds += words[3:]
    return images, same, folds


def _lfw(path: Path, rows: list[tuple[int, list[str]]]) -> tuple[list[str], list[bool], list[str]]:
    """LFW's `pairs.txt`: how many folds, and pairs of each kind in one; then `name i j` or `name i other j`."""
    head = [int(word) for word in rows[0][1]]
    size = 2 * head[-1]
    images, same = [], []
    for number, words in rows[1:]:
        if len(words) not in (3, 4) or not words[1].isdigit() or not words[-1].isdigit():
            raise UserError(f"'{path}', line {number}: {' '.join(words)!r} is neither `name i j` nor `name i other j`")
        sides = (words[0], words[1]), (words[-2] if len(words) == 4 else words[0], words[-1])
        images += [inside(f"{name}/{name}_{int(place):04d}.jpg", path, number) for name, place in sides]
        same.append(len(words) == 3)
    expected = (head[0] if len(head) == 2 else 1) * size
    if len(same) != expected:
        raise UserError(f"'{path}' lists {len(same)} pairs, but its first line announces {expected}; fetch it again")
    return images, same, [str(place // size) for place in range(len(same))] if len(head) == 2 else []


def components(count: int, edges_E2: Labels) -> Labels:
    """The lowest node that each node is connected with."""
    parent = list(range(count))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for first, second in edges_E2.tolist():
        low, high = sorted((root(first), root(second)))
        parent[high] = low
    return np.array([root(node) for node in range(count)], np.int64)


def _coded(names: Sequence[str]) -> tuple[list[str], Labels]:
    """The different names in order of first appearance, and the place of each among them."""
    unique = list(dict.fromkeys(names))
    place = {name: index for index, name in enumerate(unique)}
    return unique, np.array([place[name] for name in names], np.int64)


def read_runs(folder: Path) -> Lists:
    """Omniglot's one-shot runs: `class_labels.txt` has a test image and the training image of its class a line.

    Lake, Salakhutdinov and Tenenbaum, Science 2015: `all_runs/runNN/`, with `training/` and `test/`.

    Raises:
        UserError: no run, or a malformed one.
    """
    runs = [folder] if (folder / RUN_FILE).is_file() else sorted(path.parent for path in folder.glob(f"*/{RUN_FILE}"))
    if not runs:
        raise UserError(f"'{folder}' has no {RUN_FILE}; name a run of Omniglot's, or the folder that holds all of them")
    images: list[str] = []
    subjects: list[str] = []
    subject_T: list[int] = []
    searches = []
    for run in runs:
        pairs = [_of_run(run, number, words) for number, words in read_text(run / RUN_FILE)]
        gallery = sorted({train for _, train in pairs})
        first = len(images)
        prefix = "" if run == folder else run.name + "/"
        owner = {train: len(subjects) + place for place, train in enumerate(gallery)}
        subjects += [prefix + train for train in gallery]
        images += [prefix + name for name in (*gallery, *(test for test, _ in pairs))]
        subject_T += [owner[train] for train in (*gallery, *(train for _, train in pairs))]
        middle = first + len(gallery)
        searches.append(Search(np.arange(first, middle), np.arange(middle, len(images))))
    rows_I = np.arange(len(images))
    return Lists(images, rows_I, rows_I, rows_I, np.array(subject_T, np.int64), subjects, searches=searches)


def _of_run(run: Path, number: int, words: list[str]) -> tuple[str, str]:
    """The test and the training image of a line, as seen from the run's folder, whatever stands before `runNN/`."""
    found = [re.fullmatch(r"(?:.*/)?((?:test|training)/[^/]+)", word) for word in words]
    if len(words) != 2 or not found[0] or not found[1]:
        raise UserError(
            f"'{run / RUN_FILE}', line {number}: {' '.join(words)!r} is not a test and a training image, "
            "`run01/test/item01.png run01/training/class01.png`"
        )
    return inside(found[0][1], run / RUN_FILE, number), inside(found[1][1], run / RUN_FILE, number)
