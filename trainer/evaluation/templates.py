"""Protocols with templates of several images, as in IJB: `protocol.yaml` names the lists.

templates: [enroll.csv, verify.csv]   tables of TEMPLATE_ID, SUBJECT_ID, FILENAME and, if there is one, SIGHTING_ID or
                                      MEDIA_ID; or, without a heading, `image template medium`
pairs: match.csv                      1:1: two templates a line, and 1 or 0 where the templates have no subjects
galleries: [gallery_G1.csv, ...]      1:N: tables of the templates that are enrolled, one gallery each
probes: probe_mixed.csv               ... and of those that are searched in each gallery
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import yaml
from pydantic import ValidationError

from trainer.errors import UserError
from trainer.evaluation.lists import FOLDS, Lists, Search, components, inside, read_text
from trainer.evaluation.scores import Labels
from trainer.strict import Strict

_MOST_YAML = 1 << 20
_MEDIA = ("sighting_id", "media_id", "medium")


class ProtocolFile(Strict):
    """`protocol.yaml`; the lists lie beside it."""

    templates: tuple[str, ...] = ()
    pairs: str | None = None
    galleries: tuple[str, ...] = ()
    probes: str | None = None


@dataclass(slots=True)
class _Table:
    """All templates of all lists, by name; a template may have a subject."""

    images: dict[str, int] = field(default_factory=dict)
    templates: dict[str, int] = field(default_factory=dict)
    subject: dict[int, str] = field(default_factory=dict)
    rows: dict[tuple[int, int], str] = field(default_factory=dict)  # (template, image): medium

    def read(self, path: Path) -> Labels:
        """Add a table; its templates in order of first appearance."""
        rows = list(read_text(path))
        head = [word.lower() for word in rows[0][1]] if rows else []
        named = "template_id" in head
        if not rows or (not named and len(head) != 3) or (named and not {"subject_id", "filename"} <= set(head)):
            raise UserError(
                f"'{path}' is no table of templates; its first line names TEMPLATE_ID, SUBJECT_ID and FILENAME, "
                "or each line is `image template medium`"
            )
        media = next((name for name in _MEDIA if name in head), None)
        mine: dict[int, None] = {}
        for number, words in rows[named:]:
            if len(words) != len(head):
                raise UserError(f"'{path}', line {number}: {len(words)} words, but the first line has {len(head)}")
            row = dict(zip(head if named else ("filename", "template_id", "medium"), words, strict=True))
            template = self.templates.setdefault(row["template_id"], len(self.templates))
            image = self.images.setdefault(inside(row["filename"], path, number), len(self.images))
            self.rows[template, image] = row.get(media or "medium") or row["filename"]
            self._own(template, row, path, number)
            mine[template] = None
        return np.array(list(mine), np.int64)

    def _own(self, template: int, row: dict[str, str], path: Path, number: int) -> None:
        if (name := row.get("subject_id")) is not None and self.subject.setdefault(template, name) != name:
            raise UserError(
                f"'{path}', line {number}: template {row['template_id']} belongs to subject {name}, but to "
                f"{self.subject[template]} elsewhere; correct the lists"
            )


def read_templates(path: Path) -> Lists:
    """The protocol of a `protocol.yaml`.

    Raises:
        UserError: a file that is missing or malformed, an unknown template, or nothing to compare.
    """
    found = _read(path)
    table = _Table()
    for name in found.templates:
        table.read(path.parent / name)
    galleries = [table.read(path.parent / name) for name in found.galleries]
    probes_P = table.read(path.parent / found.probes) if found.probes else np.empty(0, np.int64)
    if found.pairs is None and not (galleries and len(probes_P)):
        raise UserError(f"'{path}' compares nothing; name `pairs`, or `galleries` and `probes`")
    names = {place: name for name, place in table.templates.items()}
    owners = [table.subject.get(place, f"template {names[place]}") for place in range(len(names))]
    subjects = list(dict.fromkeys(owners))
    code = {name: place for place, name in enumerate(subjects)}
    (template_I, image_I), media = np.array(list(table.rows), np.int64).T, list(table.rows.values())
    medium = {name: place for place, name in enumerate(dict.fromkeys(media))}
    lists = Lists(
        images=list(table.images),
        image_I=image_I,
        template_I=template_I,
        medium_I=np.array([medium[name] for name in media], np.int64),
        subject_T=np.array([code[name] for name in owners], np.int64),
        subjects=subjects,
        searches=[Search(gallery_G, probes_P) for gallery_G in galleries],
    )
    if searched := [one for one in lists.searches if np.intersect1d(one.gallery_G, one.probes_P).size]:
        both = int(np.intersect1d(searched[0].gallery_G, searched[0].probes_P)[0])
        raise UserError(f"'{path}': template {names[both]} is enrolled and a probe as well; take it out of one list")
    return lists if found.pairs is None else _paired(lists, table, path.parent / found.pairs)


def _read(path: Path) -> ProtocolFile:
    try:
        with path.open("rb") as file:
            tree = yaml.safe_load(file.read(_MOST_YAML))
        if isinstance(tree, dict) and isinstance(tree.get("templates"), str):
            tree["templates"] = [tree["templates"]]
        return ProtocolFile.model_validate(tree)
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}; name the file of a protocol") from error
    except (yaml.YAMLError, ValidationError, RecursionError) as error:
        fault = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error).partition("\n")[0]
        raise UserError(
            f"'{path}' is no protocol: {fault}; it may name templates, pairs, galleries and probes"
        ) from error


def _paired(lists: Lists, table: _Table, path: Path) -> Lists:
    pairs: list[tuple[int, int]] = []
    labels: list[str] = []
    for number, words in read_text(path):
        if len(words) not in (2, 3) or words[2:] not in ([], ["0"], ["1"]):
            raise UserError(f"'{path}', line {number}: {' '.join(words)!r} is not two templates, and 1 or 0 at most")
        if unknown := [word for word in words[:2] if word not in table.templates]:
            raise UserError(
                f"'{path}', line {number}: template {unknown[0]} is in no table; add its list to `templates`"
            )
        pairs.append((table.templates[words[0]], table.templates[words[1]]))
        labels += words[2:]
    pairs_P2 = np.array(pairs, np.int64).reshape(-1, 2)
    if labels and len(labels) != len(pairs):
        raise UserError(
            f"'{path}' says of some pairs whether they are the same and not of others; say it of all or none"
        )
    if not labels and len(table.subject) < len(table.templates):
        raise UserError(
            f"'{path}' does not say which pairs are the same, and the templates have no SUBJECT_ID; add either"
        )
    folds_P = np.arange(len(pairs)) * FOLDS // max(len(pairs), 1)
    subject_T, subjects = lists.subject_T, list(lists.subjects)
    own_P = np.equal(*subject_T[pairs_P2].T)
    same_P = np.array([label == "1" for label in labels]) if labels else own_P
    if len(table.subject) < len(table.templates):  # templates that pairs call the same are one subject
        root_T = components(len(subject_T), pairs_P2[same_P])
        roots, subject_T = np.unique(root_T, return_inverse=True)
        subjects = [lists.subjects[lists.subject_T[root]] for root in roots.tolist()]
        own_P = np.equal(*subject_T[pairs_P2].T)
    if (wrong_P := own_P != same_P).any():
        how = "not the same, but is of one subject" if own_P[wrong_P][0] else "the same, but is of two subjects"
        raise UserError(f"'{path}': pair {int(np.argmax(wrong_P)) + 1} is called {how}; correct the lists")
    return replace(lists, pairs_P2=pairs_P2, same_P=same_P, folds_P=folds_P, subject_T=subject_T, subjects=subjects)
