"""Cursors of lists: where the next page starts, signed by the store, for one list and one filter."""

import base64
import hmac
import json
import struct
from collections.abc import Callable

from serving.errors import invalid
from serving.storage.changes import Metadata

_POSITION = struct.Struct("<q")


class Cursors:
    """Those of one list: `sign` makes bytes of a value that nobody else can make, and `where` is the list's filter."""

    def __init__(self, sign: Callable[[bytes], bytes], where: Metadata | None) -> None:
        self._sign, self._where = sign, json.dumps(where, sort_keys=True).encode()

    def write(self, position: int) -> str:
        packed = _POSITION.pack(position)
        return base64.urlsafe_b64encode(packed + self._sign(packed + self._where)).decode()

    def read(self, cursor: str | None) -> int:
        """The position; 0, the start, without a cursor. Raises ApiError 422."""
        if cursor is None:
            return 0
        try:
            content = base64.b64decode(cursor, altchars=b"-_", validate=True)
        except ValueError:
            content = b""
        packed, signature = content[: _POSITION.size], content[_POSITION.size :]
        if len(packed) < _POSITION.size or not hmac.compare_digest(signature, self._sign(packed + self._where)):
            told = "this is not a cursor of this list; take next_cursor of the page before, or leave it out"
            raise invalid(("cursor", told))
        position: int = _POSITION.unpack(packed)[0]
        return position
