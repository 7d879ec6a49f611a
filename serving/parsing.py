"""From what a client sent to values, or one sentence about what is wrong with it."""

import base64
import binascii
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from serving.errors import ApiError, invalid_fields
from serving.schemas import Request, TopK
from serving.store import IdempotencyKey

KEY_PATTERN = r"^[\x21-\x7e]{1,255}$"
MAX_KEYS = 16  # of a JSON document, known or not
_TOP_K: TypeAdapter[int] = TypeAdapter(TopK)
_FLAG: TypeAdapter[bool] = TypeAdapter(bool)
Body = TypeVar("Body", bound=Request)


@dataclass(frozen=True)
class Form:
    """A multipart request: files by part name, and the other fields."""

    files: dict[str, list[bytes]]
    fields: dict[str, str]


Sent = Form | bytes  # bytes: a JSON document


def read_json(model: type[Body], document: bytes) -> Body:
    """A JSON document as a request. Its size was bounded before; pydantic makes an object of every unknown key.

    Raises:
        ApiError: 400 for what is not JSON, 422 for what the schema does not allow.
    """
    try:
        tree = from_json(document)
    except ValueError as error:
        raise ApiError(400, "not_json", f"the body is not JSON ({error})") from error
    if isinstance(tree, dict) and len(tree) > MAX_KEYS:
        raise invalid(f"{len(tree)} keys were sent; at most {MAX_KEYS} are read", "")
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        faults = error.errors(include_input=False, include_url=False, include_context=False)
        told = [(".".join(map(str, fault["loc"])), fault["msg"].removeprefix("Value error, ")) for fault in faults]
        raise invalid_fields(told) from error


def invalid(problem: str, where: str) -> ApiError:
    return invalid_fields([(where, problem)])


def read_top_k(text: str) -> int:
    try:
        return _TOP_K.validate_python(text)
    except ValidationError as error:
        raise invalid(f"'{text[:20]}' is not a whole number from 1 to 100", "top_k") from error


def read_flag(fields: dict[str, str], name: str) -> bool:
    try:
        return _FLAG.validate_python(fields.get(name, "false"))
    except ValidationError as error:
        raise invalid(f"'{fields[name][:20]}' is neither true nor false", name) from error


def idempotency_key(key: str | None, method: str, subject_id: str, parts: Sequence[bytes]) -> IdempotencyKey | None:
    """The key with a digest of what it stands for: method, subject and the content of the parts in their order."""
    if key is None:
        return None
    if not re.fullmatch(KEY_PATTERN, key):
        raise invalid("1 to 255 visible ASCII characters are allowed", "Idempotency-Key")
    digest = hashlib.sha256(f"{method}\0{subject_id}\0".encode())
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return IdempotencyKey(key, digest.digest())


def write_cursor(position: int) -> str:
    return base64.urlsafe_b64encode(b"p%d" % position).decode().rstrip("=")


def read_cursor(cursor: str | None) -> int:
    if cursor is None:
        return 0
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        text = b""
    if not re.fullmatch(rb"p[0-9]{1,18}", text):
        raise invalid("this is not a cursor; take next_cursor of the page before, or leave it out", "cursor")
    return int(text[1:])
