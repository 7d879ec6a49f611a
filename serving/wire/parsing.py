"""From what a client sent to values, or one sentence about what is wrong with it: JSON, fields, names, keys.

Two names that look alike must not be two people. New names are held to more than old ones: whatever an older version
enrolled can still be verified and erased.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from serving.errors import ApiError, invalid
from serving.images.looking import Which
from serving.storage.changes import IdempotencyKey

MAX_KEYS = 16  # of a JSON document, known or not
# For the documentation; `idempotency_key` and `enrollable` check the same, the latter more. Left out of names: slashes,
# control characters, what cannot be seen or turns the reading direction, and U+FFFD, which stands for bytes that are
# not UTF-8.
KEY_PATTERN = r"^[\x21-\x7e]{1,255}$"
_UNSEEN = r"\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffd"
_INNER = rf"[^/\\\x00-\x1f\x7f-\x9f{_UNSEEN}]"
_EDGE = rf"[^\s/\\\x00-\x1f\x7f-\x9f{_UNSEEN}]"
PATTERN = rf"^(?!\.{{1,2}}$){_EDGE}({_INNER}{{0,126}}{_EDGE})?$"
_KNOWN = re.compile(r"[^\s/\\\x00-\x1f\x7f\ufffd]([^/\\\x00-\x1f\x7f\ufffd]{0,126}[^\s/\\\x00-\x1f\x7f\ufffd])?")
# Unicode's categories of characters without a shape of their own: control, format, surrogate, private, unassigned,
# line and paragraph separators.
_SHAPELESS = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_ALIKE = {"LATIN", "GREEK", "CYRILLIC"}  # scripts that share the shapes of many letters
# Letters, marks and symbols that are not seen all the same: Unicode's Default_Ignorable_Code_Point of other categories
# (DerivedCoreProperties.txt), the empty Braille pattern and the null note head.
_BLANK = re.compile(
    "[\\u034f\\u115f\\u1160\\u17b4\\u17b5\\u180b-\\u180f\\u2800\\u3164\\ufe00-\\ufe0f\\uffa0\\U0001d159\\U000e0100-\\U000e01ef]"
)
JSON, RAW = "application/json", "application/octet-stream"
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Sent:
    """The body of a request: a form's files by part name, or a document; and the other fields of the form, or those of
    the query where the document is bytes."""

    files: dict[str, list[bytes]] = field(default_factory=dict)
    fields: dict[str, str] = field(default_factory=dict)
    document: bytes | None = None
    kind: str = JSON  # of the document


def read_json(model: type[Model], document: bytes) -> Model:
    """A JSON document as a request. Its size was bounded before; pydantic makes an object of every unknown key.

    Raises:
        ApiError: 400 for what is not JSON, 422 for what the schema does not allow.
    """
    try:
        tree = from_json(document)
    except ValueError as error:
        raise ApiError(400, "not_json", f"the body is not JSON ({error})") from error
    if isinstance(tree, dict) and len(tree) > MAX_KEYS:
        raise invalid(("", f"{len(tree)} keys were sent; at most {MAX_KEYS} are read"))
    return as_request(model, tree)


def as_request(model: type[Model], tree: object) -> Model:
    """Raises ApiError 422 for what the schema does not allow."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        faults = error.errors(include_input=False, include_url=False, include_context=False)
        told = [(".".join(map(str, fault["loc"])), fault["msg"].removeprefix("Value error, ")) for fault in faults]
        raise invalid(*told) from error


def face_of(sent: Sent, default: Which = "only") -> Which:
    """Which face of a photograph is meant: a form's field `face`."""
    match sent.fields.get("face", default):
        case "only":
            return "only"
        case "largest":
            return "largest"
        case "all" if default == "all":
            return "all"
        case other:
            also = ", all" if default == "all" else ""
            raise invalid(("face", f"'{other[:20]}' is no choice here; allowed: only, largest{also}"))


def known(subject_id: str) -> str:
    """`subject_id`, if a subject can have it. Raises ApiError 422."""
    if not _KNOWN.fullmatch(subject_id):
        raise _refused("1 to 128 characters are allowed, without slashes, control characters, or space at the ends")
    return subject_id


def enrollable(subject_id: str) -> str:
    """`subject_id`, if a new subject may have it. Raises ApiError 422.

    Names are compared by their code points, so each must be in the one form to which Unicode's NFKC brings all that
    look like it (UAX #15): 'Å' in one character, no full-width letters, no ligatures. A word is in one script, since
    many letters of Latin, Greek and Cyrillic look the same; a whole word in the other script is not noticed.
    """
    known(subject_id)
    if subject_id in (".", ".."):
        raise _refused(f"'{subject_id}' means a folder in a path; give another name")
    for character in subject_id:
        if unicodedata.category(character) in _SHAPELESS or _BLANK.match(character):
            raise _refused(f"U+{ord(character):04X} cannot be seen or changes how the rest is read; leave it out")
    if "  " in subject_id:
        raise _refused("two spaces in a row look like one; send one")
    for word in re.findall(r"[^\W\d_]+", subject_id):
        scripts = {unicodedata.name(letter, "").partition(" ")[0] for letter in word} & _ALIKE
        if len(scripts) > 1:
            told = " and ".join(sorted(script.capitalize() for script in scripts))
            raise _refused(f"'{word[:40]}' mixes {told} letters, which look alike; write it in one script")
    composed = unicodedata.normalize("NFKC", subject_id)
    if composed != subject_id:
        raise _refused(f"another spelling of the name looks the same; send its NFKC form, '{composed[:128]}'")
    return subject_id


def _refused(problem: str) -> ApiError:
    return invalid(("subject_id", problem))


def idempotency_key(key: str | None, method: str, subject_id: str, parts: Sequence[bytes]) -> IdempotencyKey | None:
    """The key with a digest of what it stands for: method, subject and the content of the parts in their order."""
    if key is None:
        return None
    if not re.fullmatch(KEY_PATTERN, key):
        raise invalid(("Idempotency-Key", "1 to 255 visible ASCII characters are allowed"))
    digest = hashlib.sha256(f"{method}\0{subject_id}\0".encode())
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return IdempotencyKey(key, digest.digest())
