"""Import from WebDataset tars of others, here or at any fsspec address: their samples go into shards of our own."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from glob import glob
from itertools import islice
from typing import Any

from braceexpand import braceexpand

from trainer.data.arrays import content_of
from trainer.data.importers import (
    Content,
    Entry,
    Importer,
    ImportOptions,
    Listing,
    PassedOver,
    Progress,
    Read,
    WrongLabel,
    identity_of,
)
from trainer.data.importers.folder import check_name
from trainer.data.importers.ranges import opened, read_range
from trainer.data.remote import is_remote, matching, shown
from trainer.data.tar import TarSample, samples_of
from trainer.errors import UserError

MAX_ARCHIVES = 1_000_000
_NAMED = 20  # missing archives that a message names
_PEEKED = 100  # samples whose .json says what the attributes are called
_MAX_FIELDS = 1000  # of all samples, that are told apart
_RANGE = re.compile(r"(-?\d+|[A-Za-z])\.\.(-?\d+|[A-Za-z])(?:\.\.-?(\d+))?")
_CONNECTIONS = 16  # that each process reads payloads from elsewhere with


def list_tars(source: str | None, options: ImportOptions, progress: Progress) -> Listing:
    """An identity is what `.cls` says, a number or text, or a field of `.json`; other fields are attributes.

    Args:
        source: a .tar, a folder that holds some, or a pattern such as faces-{000000..000147}.tar or faces-*.tar, here
            or at any fsspec address.

    Raises:
        UserError: an archive is missing, cut off, damaged or compressed, or holds paths that climb out of it; or a
            sample has no label.
    """
    source = source or ""
    addresses = [address if is_remote(address) else os.path.abspath(address) for address in archives_of(source)]
    content, shape, attributes = peek(addresses[0], options.label_field)
    remote = any(map(is_remote, addresses))
    passed_over: list[PassedOver] = []
    return Listing(
        entries=_entries(addresses, options.label_field, attributes, passed_over),
        source=source if is_remote(source) else os.path.abspath(source),
        provenance={
            "source": os.path.basename(shown(source).rstrip("/")),
        },
        content=content,
        shape=shape,
        attributes=dict.fromkeys(attributes, "string"),
        threads=_CONNECTIONS if remote else 1,
        passed_over=passed_over,
    )


def read_tars(source: str, options: ImportOptions) -> Read:
    """A place is the offset of the payload in an archive, its size, and the archive's address."""

    def read(place: str) -> bytes:
        offset, size, address = place.split(" ", 2)
        return read_range(address, int(offset), int(offset) + int(size))

    return read


IMPORTER = Importer(list_tars, read_tars)


def archives_of(source: str) -> list[str]:
    """The addresses of the archives, in order.

    Raises:
        UserError: there are none, too many, or some that are missing.
    """
    if not source:
        raise UserError(
            "--kind tars needs a SOURCE; give a .tar, a folder that holds some, or name-{000000..000147}.tar"
        )
    if not is_remote(source) and os.path.isdir(source):
        found = sorted(os.path.join(source, name) for name in os.listdir(source) if name.endswith(".tar"))
        if not found:
            raise UserError(f"SOURCE '{source}' holds no .tar; give a folder that holds some")
        for path in found:
            check_name(path)
        return found
    if os.path.isfile(source):  # whatever braces its name has
        return [source]
    patterns = _expanded(source)
    found = [name for pattern in patterns for name in (_matching(pattern) if "*" in pattern else [pattern])]
    if len(found) > MAX_ARCHIVES:
        raise _too_many(source)
    if not found:
        raise UserError(f"no archive matches '{shown(source)}'; give a .tar, or a pattern that some match")
    missing = [path for path in found if not is_remote(path) and not os.path.isfile(path)]
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise UserError(
            f"{len(missing)} of {len(found)} archives are missing: {', '.join(missing[:_NAMED])}{more}; "
            "give a .tar, a folder that holds some, or a pattern such as name-{000000..000147}.tar"
        )
    return found


def _expanded(source: str) -> list[str]:
    """The names in a pattern with braces, as many as may be: they are counted before any is made."""
    try:
        if _count(source) > MAX_ARCHIVES:
            raise _too_many(source)
        return list(braceexpand(source))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"SOURCE '{shown(source)}' is not a pattern of names ({error}); mend its braces") from error


def _count(pattern: str) -> int:
    """How many names the braces make. Alternatives add up, neighbours multiply."""
    open_braces: list[tuple[int, int, int]] = []  # where it opened; the count of the text before it, and of its
    done, here = 0, 1  # finished alternatives in the same braces, and the present one's count
    start = 0
    for part in re.finditer(r"\\.|[{},]", pattern):
        if part[0] == "{":
            open_braces.append((start, done, here))
            start, done, here = part.end(), 0, 1
        elif part[0] == "," and open_braces:
            done, here = done + here, 1
        elif part[0] == "}" and open_braces:
            inside = _RANGE.fullmatch(pattern, start, part.start())
            inner = _length(*inside.groups()) if inside else done + here
            start, done, here = open_braces.pop()
            here *= inner
    return done + here


def _length(first: str, last: str, step: str | None) -> int:
    numbers = [int(end) if end.lstrip("-").isdigit() else ord(end) for end in (first, last)]
    return abs(numbers[1] - numbers[0]) // max(1, int(step or 1)) + 1


def _too_many(source: str) -> UserError:
    return UserError(f"SOURCE '{shown(source)}' names more than {MAX_ARCHIVES} archives; give fewer at a time")


def _matching(pattern: str) -> list[str]:
    return matching(pattern) if is_remote(pattern) else sorted(glob(pattern))


def peek(address: str, label_field: str) -> tuple[Content, tuple[int, ...] | None, list[str]]:
    """What the first samples tell of all: what a payload is, its shape if it is no image, names of the attributes."""
    names: dict[str, None] = {}
    first: TarSample | None = None
    with opened(address) as file:
        for sample in islice(samples_of(file, shown(address), payloads=False), _PEEKED):
            first = first or sample
            names |= dict.fromkeys(fields_of(sample, label_field))
    if first is None or first.suffix != "npy":
        return "image", None, list(names)
    payload = read_range(address, first.offset, first.offset + first.size)
    return *content_of(payload, f"{shown(address)}: {first.key}"), list(names)


def identity_in(sample: TarSample, label_field: str, archive: str) -> str:
    """The identity of a sample.

    Raises:
        UserError: there is no label, or none that can be one.
    """
    label: object
    if label_field == "cls":
        label = sample.label if sample.label is not None or sample.cls is None else _decode(sample.cls)
    else:
        label = _json(sample).get(label_field)
    try:
        return _whole(identity_of(label))
    except WrongLabel as error:
        where = ".cls" if label_field == "cls" else f"the field '{label_field}' of .json"
        held = ", ".join(map(repr, list(_json(sample))[:10])) or "none"
        raise UserError(
            f"sample '{sample.key}' of '{archive}' has {error} in {where}; name the field of its .json that holds it "
            f"with --label-field (its fields: {held})"
        ) from error


def fields_of(sample: TarSample, label_field: str) -> dict[str, str]:
    """The attributes of a sample: the fields of its `.json` but for the label and the key, as text."""
    found = {name: value for name, value in _json(sample).items() if name not in ("key", label_field)}
    return {
        _whole(name): _whole(value) if isinstance(value, str) else json.dumps(value) for name, value in found.items()
    }


def unknown(fields: Iterable[str], known: set[str]) -> list[str]:
    """Fields that were not known, and are from now on."""
    found = [field for field in fields if field not in known] if len(known) < _MAX_FIELDS else []
    known.update(found)
    return found


def late(field: str, name: str) -> PassedOver:
    """What to tell of a field that is no attribute; `name`: of the first sample that has it."""
    return PassedOver(f"{name}: the field '{field}'", f"comes first after {_PEEKED} samples, and so is no attribute")


def _entries(
    addresses: list[str], label_field: str, attributes: list[str], passed_over: list[PassedOver]
) -> Iterator[Entry]:
    known = set(attributes)
    for address in addresses:
        archive = shown(address)
        stamp = "" if is_remote(address) else str(os.stat(address).st_mtime_ns)
        with opened(address) as file:
            for sample in samples_of(file, archive, payloads=False):
                fields = fields_of(sample, label_field) if sample.text else {}
                name = f"{os.path.basename(archive)}/{sample.key}"
                passed_over += (late(field, name) for field in unknown(fields, known))
                yield Entry(
                    identity_in(sample, label_field, archive),
                    name,
                    f"{sample.offset} {sample.size} {address}",
                    attributes={name: fields.get(name) for name in attributes} or None,
                    size=sample.size,
                    stamp=stamp,
                )


def _json(sample: TarSample) -> dict[str, Any]:
    """What `.json` says; nothing where there is none, or it is damaged or no object."""
    try:
        found = json.loads(sample.text) if sample.text else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _whole(text: str) -> str:
    """Text that every file can hold: JSON may have half a character, such as \\ud800, which is written out."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")
