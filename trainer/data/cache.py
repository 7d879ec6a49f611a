"""Files from far away on the local disk, whole or in parts: bounded, and shared by all processes of a machine.

A file is kept under its SHA-256, sparse, beside a map with one byte a block: 1 where the block is there. Who fetches a
block locks its byte in the map, so that others wait for it instead of fetching it too; who reads a file holds a shared
lock on it, so that it is not removed. The system drops both kinds of lock with the process that holds them: what a
killed process was fetching counts as missing, what it was reading may go.

    <folder>/<sha256>       the file; blocks that are not there are holes
    <folder>/<sha256>.map   1 when the whole file's SHA-256 was found right, then a byte a block
    <folder>/used           bytes taken, never fewer than in truth; its lock is held while room is made
"""

import errno
import fcntl
import hashlib
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError

BLOCK = 2**16  # holds a few samples: a random sample costs little more than itself and the way there and back
PART = 2**21  # bytes of one request at most, which every connection holds in memory
Ranges = Iterable[tuple[int, int]]  # offset and size
Fetch = Callable[[int, int], bytes]  # from the first byte to before the second
_KEPT_FREE = 50  # room is made for 1/50 of the limit more than asked, so that files are not counted at every request
_PAGE = 4096
_OURS = re.compile(r"[0-9a-f]{64}")  # names of what may be removed: somebody may keep other files in the folder
_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux


class Cache:
    """A folder of at most `limit` bytes; several processes may use it at once, with equal limits."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    def open(self, digest: str, size: int | None) -> "CachedFile":
        """The file with this SHA-256, which may have nothing in it yet; for a `with` block.

        Args:
            digest: SHA-256 of the whole.
            size: in bytes; None: not known, which allows only `fill_unsized`.

        Raises:
            UserError: the folder cannot be written to.
        """
        path = os.path.join(self.folder, digest)
        file = None
        try:
            try:
                file = _open_locked(path)
            except FileNotFoundError:
                self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # the data may be private
                file = _open_locked(path)
            return CachedFile(self, file, path, size)
        except OSError as error:
            if file is not None:
                file.close()
            raise self.unusable(error) from error

    def unusable(self, error: OSError) -> UserError:
        """What to tell when the folder or a file in it cannot be written or read."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return UserError(
                f"the disk of the cache '{self.folder}' is full; lower data.cache_bytes (now {self.limit}), or set "
                "data.cache_dir to a folder on a larger disk"
            )
        return UserError(
            f"the cache '{self.folder}' cannot be used: {error.strerror}; set data.cache_dir to a folder that can be "
            "written to"
        )

    @contextmanager
    def room(self, size: int) -> Iterator[None]:
        """For a block that takes `size` more bytes of the disk: counts them and a page of the map, and removes what was
        used longest ago where they are too many. The lock is held throughout, as what is not taken yet cannot be seen.

        Raises:
            UserError: there is not so much room, even when all goes that nobody reads now.
        """
        size += _PAGE
        with (self.folder / "used").open("a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            known = os.pread(file.fileno(), 8, 0)
            used = int.from_bytes(known, "little") if len(known) == 8 else self.limit
            if used + size > self.limit:
                used = self._make_room(size)
            os.ftruncate(file.fileno(), 0)
            file.write((used + size).to_bytes(8, "little"))
            yield

    def _make_room(self, size: int) -> int:
        """Bytes that are taken after files have been removed."""
        paths = [path for path in self.folder.iterdir() if _OURS.fullmatch(path.name)]
        found = sorted((path.stat().st_mtime_ns, path, _taken(path)) for path in paths)
        used = sum(taken for _, _, taken in found)
        for _, path, taken in found:
            if used + size <= self.limit - self.limit // _KEPT_FREE:
                break
            if _remove(path):
                used -= taken
        if used + size > self.limit:
            raise UserError(
                f"the cache '{self.folder}' may hold {self.limit} bytes, of which {used} are in use now, and {size} "
                "more are needed; raise data.cache_bytes"
            )
        return used


class CachedFile:
    """One file of the cache; not removed as long as it is open. `size` is 0 while nobody knows it."""

    def __init__(self, cache: Cache, file: FileIO, path: str, size: int | None) -> None:
        self.file = file
        self.path = path
        self._cache = cache
        found = os.fstat(file.fileno()).st_size
        self.size = found if size is None else size
        if self.size != found:
            os.ftruncate(file.fileno(), self.size)
        os.utime(file.fileno())  # the time of last use

    def __enter__(self) -> "CachedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def missing(self, ranges: Ranges | None) -> list[tuple[int, int]]:
        """Runs of blocks (first, stop) to fetch for these ranges (None: for all), each of at most PART bytes."""
        blocks = _blocks(self.size)
        spans = [(0, blocks)] if ranges is None else [(at // BLOCK, _blocks(at + size)) for at, size in ranges]
        with self._map() as handle:
            there = os.pread(handle, blocks, 1).ljust(blocks, b"\0")
        if not any(b"\0" in there[first:stop] for first, stop in spans):
            return []
        wanted = np.zeros(blocks, bool)
        for first, stop in spans:
            wanted[first:stop] = True
        wanted &= np.frombuffer(there, np.uint8) == 0
        return [
            (first, min(first + PART // BLOCK, stop))
            for start, stop in _runs(wanted)
            for first in range(start, stop, PART // BLOCK)
        ]

    def fill(self, first: int, stop: int, fetch: Fetch) -> None:
        """Fetch those blocks from `first` to before `stop` that are missing, after who is fetching them already.

        Raises:
            UserError: what `fetch` raises; or there is no room.
        """
        with self._map() as handle:
            _lock(handle, 1 + first, stop - first)
            there = os.pread(handle, stop - first, 1 + first).ljust(stop - first, b"\0")
            for start, end in _runs(np.frombuffer(there, np.uint8) == 0):
                begin, past = (first + start) * BLOCK, min((first + end) * BLOCK, self.size)
                self._write(fetch, begin, past)
                os.pwrite(handle, b"\1" * (end - start), 1 + first + start)

    def fill_unsized(self, fetch: Callable[[], bytes]) -> None:
        """Fetch the whole of a small file whose size is not known, if nobody else has done it meanwhile.

        Raises:
            UserError: what `fetch` raises; or there is no room.
        """
        with self._map() as handle:
            _lock(handle, 0, 0)
            self.size = os.fstat(self.file.fileno()).st_size
            if os.pread(handle, 1, 0) == b"\1":
                return
            data = fetch()
            os.ftruncate(self.file.fileno(), len(data))
            self.size = len(data)
            self._write(lambda start, stop: data[start:stop], 0, len(data))
            os.pwrite(handle, b"\1" * _blocks(len(data)), 1)

    def forget(self, ranges: Ranges | None = None) -> None:
        """Count the blocks of these ranges (None: all) as missing: what they hold is wrong."""
        with self._map() as handle:
            _lock(handle, 0, 0)
            os.pwrite(handle, b"\0", 0)
            for offset, size in [(0, self.size)] if ranges is None else ranges:
                first = offset // BLOCK
                os.pwrite(handle, bytes(_blocks(offset + size) - first), 1 + first)

    def verified(self) -> bool:
        """Whether the file has the SHA-256 that it is named by; the answer yes is kept."""
        with self._map() as handle:
            if os.pread(handle, 1, 0) == b"\1":
                return True
            with FileIO(self.path) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != os.path.basename(self.path):
                    return False
            os.fdatasync(self.file.fileno())  # so that the map never says more than the disk, should the power fail
            os.pwrite(handle, b"\1", 0)
            return True

    def _write(self, fetch: Fetch, start: int, stop: int) -> None:
        """Fetch and write. The room is taken first: it counts from then on, and a full disk costs no transfer."""
        try:
            with self._cache.room(stop - start):
                os.posix_fallocate(self.file.fileno(), start, stop - start)
            os.pwrite(self.file.fileno(), fetch(start, stop), start)
        except OSError as error:
            raise self._cache.unusable(error) from error

    @contextmanager
    def _map(self) -> Iterator[int]:
        """The map, opened anew: its locks belong to this opening, and so keep threads apart as well as processes."""
        try:
            handle = os.open(f"{self.path}.map", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise self._cache.unusable(error) from error
        try:
            yield handle
        finally:
            os.close(handle)


def _open_locked(path: str) -> FileIO:
    """The file, made if it is not there, with a shared lock."""
    while True:
        file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
        fcntl.flock(file, fcntl.LOCK_SH)
        try:
            if os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:
                return file
        except FileNotFoundError:
            pass
        file.close()  # removed between our open and our lock


def _remove(path: Path) -> bool:
    """Remove a file and its map, unless somebody has it open."""
    with FileIO(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        Path(f"{path}.map").unlink(missing_ok=True)  # first: a file without its map is an empty one
        path.unlink()
    return True


def _taken(path: Path) -> int:
    """Bytes of the disk that a file and its map take."""
    of_map = Path(f"{path}.map")
    return 512 * (path.stat().st_blocks + (of_map.stat().st_blocks if of_map.exists() else 0))


def _lock(handle: int, start: int, size: int) -> None:
    """Wait for bytes of the map (size 0: for all from `start` on), and hold them until it is closed."""
    wanted = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, start, size, 0)
    fcntl.fcntl(handle, fcntl.F_OFD_SETLKW, wanted)


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


def _runs(wanted: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """First and past-the-last index of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], wanted.astype(np.int8), [0]])))
    return [(int(first), int(stop)) for first, stop in edges.reshape(-1, 2)]
