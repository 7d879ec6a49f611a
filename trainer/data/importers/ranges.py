"""Files, here or at any fsspec address, that are read range by range."""

import hashlib
import io
import os
from typing import Any, BinaryIO

from trainer.data.remote import fetch, is_remote, size_of
from trainer.errors import UserError

REQUEST = 2**23  # bytes, of a file that is read whole
_BUFFER = 2**20  # bytes: small samples come with their headers, large ones are jumped over


def read_range(address: str, start: int, stop: int) -> bytes:
    """Bytes of a file, here or elsewhere.

    Raises:
        UserError: it cannot be read, or ends before.
    """
    if is_remote(address):
        return fetch(address, start, stop)
    try:
        with open(address, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), stop - start, start)
    except OSError as error:
        raise UserError(f"'{address}' cannot be read: {error.strerror}; make it readable") from error
    if len(data) < stop - start:
        raise UserError(f"'{address}' ends before byte {stop}: it was changed meanwhile; import again")
    return data


def opened(address: str) -> BinaryIO:
    """An archive as a file that can be read from anywhere in it; best forwards, with short jumps."""
    return io.BufferedReader(Ranges(address), _BUFFER)


class Ranges(io.RawIOBase):
    """A file, here or elsewhere, that is read range by range."""

    def __init__(self, address: str) -> None:
        self.size = size_of(address) if is_remote(address) else os.path.getsize(address)
        self._address = address
        self._position = 0

    def range(self, start: int, stop: int) -> bytes:
        return read_range(self._address, start, stop)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._position = offset + (0, self._position, self.size)[whence]
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        stop = min(self._position + len(buffer), self.size)
        if stop <= self._position:
            return 0
        data = self.range(self._position, stop)
        buffer[: len(data)] = data
        self._position = stop
        return len(data)


class Hashed(Ranges):
    """A file that is read forwards, with the SHA-256 of all of it."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self._sha256 = hashlib.sha256()
        self._hashed = 0

    def range(self, start: int, stop: int) -> bytes:
        self._hash_up_to(start)
        data = super().range(start, stop)
        if stop > self._hashed:
            self._sha256.update(data[self._hashed - start :])
            self._hashed = stop
        return data

    def finish(self) -> str:
        """The digest of the whole file, whose rest is read."""
        self._hash_up_to(self.size)
        return self._sha256.hexdigest()

    def _hash_up_to(self, stop: int) -> None:
        """Read what was jumped over."""
        while self._hashed < stop:
            end = min(self._hashed + REQUEST, stop)
            self._sha256.update(super().range(self._hashed, end))
            self._hashed = end
