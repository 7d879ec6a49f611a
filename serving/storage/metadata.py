"""Metadata of subjects and samples: a small flat JSON object, and how it is found again without being read."""

import json
from collections.abc import Iterator, Mapping

from serving.storage.rows import digest

Value = str | int | float | bool
Metadata = Mapping[str, Value]
MAX_KEYS, MAX_KEY_CHARACTERS, MAX_BYTES = 32, 64, 4096
MAX_WHOLE = 2**53  # beyond it, many programs read another number


class MetadataRefused(ValueError):
    """It is not what metadata may be; the message says why."""


def encode(metadata: Metadata) -> bytes:
    """JSON, as it is stored; nothing where there is none.

    Raises:
        MetadataRefused: too many keys, too long, or a value that is no text, finite number, or truth value.
    """
    if len(metadata) > MAX_KEYS:
        raise MetadataRefused(f"metadata has {len(metadata)} keys; at most {MAX_KEYS} are allowed")
    for key, value in metadata.items():
        _refuse_item(key, value)
    try:
        content = json.dumps(dict(metadata), ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise MetadataRefused("metadata has a text with half a surrogate pair, which is no character") from error
    if len(content) > MAX_BYTES:
        raise MetadataRefused(f"metadata takes {len(content)} bytes as JSON; at most {MAX_BYTES} are allowed")
    return content if metadata else b""


def decode(content: bytes | str | None) -> dict[str, Value]:
    """What `encode` was given. Raises ValueError where it is no JSON object."""
    found = json.loads(content) if content else {}
    if not isinstance(found, dict):
        raise MetadataRefused(f"metadata is a {type(found).__name__}, not an object")
    return found


def _refuse_item(key: object, value: object) -> None:
    if not isinstance(key, str) or not 1 <= len(key) <= MAX_KEY_CHARACTERS:
        raise MetadataRefused(
            f"metadata has the key {key!r:.80}; a key is a text of 1 to {MAX_KEY_CHARACTERS} characters"
        )
    if not isinstance(value, str | int | float):
        kind = type(value).__name__
        raise MetadataRefused(f"metadata '{key}' is a {kind}; a value is a text, a number, true or false")
    if not isinstance(value, str) and not abs(value) <= MAX_WHOLE:  # written so that NaN is refused
        raise MetadataRefused(f"metadata '{key}' is {value!r:.40}; a number is finite and at most 2^53 large")


def attributes(secret: bytes, metadata: Metadata) -> Iterator[int]:
    """A number of each key with its value, that tells neither without the store's secret. 1 and 1.0 are one value."""
    for key, value in metadata.items():
        whole = isinstance(value, float) and value.is_integer()
        text = json.dumps([key, int(value) if whole else value]).encode()
        yield int.from_bytes(digest(secret, b"attribute", text)[:8], "big", signed=True)
