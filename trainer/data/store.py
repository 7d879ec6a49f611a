"""Where a data set lies: a folder, or any fsspec address; its files by name, on the local disk when they are needed.

Files of a folder are used where they lie. Files from elsewhere come into a cache, in the parts that are asked for:
shards block by block, which the CRC-32 of each sample checks when it is read; tables and indexes whole, which their
SHA-256 checks on arrival.
"""

import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache, partial
from io import FileIO
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator

from trainer.data.cache import Cache, CachedFile, Ranges
from trainer.data.remote import OutOfReach, checked, fetch, fetch_small, is_remote, join, shown
from trainer.errors import UserError

DEFAULT_CACHE_BYTES = 50 * 10**9
_CONNECTIONS = 32  # of each process, for what is needed now; and as many for what will be needed
_HELD = 8  # paths given out last, whose files are not removed: their callers may be about to open them
_PAUSE_S = 60  # after a lasting failure, until a file is asked for with all patience again
_REMEDY = "run 'hypersphere data verify', and import the data again or fetch this file anew"


def _address(value: object) -> Path | str:
    if not isinstance(value, str | Path):
        raise ValueError(f"{value!r} is neither a folder nor an address such as s3://bucket/faces")
    text = checked(value).removeprefix("file://")
    return text if is_remote(text) else Path(text)


Address = Annotated[Path | str, BeforeValidator(_address)]  # a folder is a Path, any other address a string


class File(NamedTuple):
    """A file of a data set as its manifest describes it; `url` says where it lies if not beside the manifest."""

    name: str
    size: int | None = None
    sha256: str | None = None
    url: str | None = None


class CacheConfig(NamedTuple):
    """Where files from elsewhere are kept on this machine, and how many bytes of them at most."""

    folder: Path | None = None
    limit: int = DEFAULT_CACHE_BYTES

    def open(self) -> Cache:
        """The cache; without a folder, that of this user."""
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        return Cache(self.folder or home / "hypersphere", self.limit)


class DataStore:
    """The files of one data set. May be copied to other processes, by pickling or forking.

    Attributes:
        address: for messages, without password and token.
        scratch: a folder for what is made once from the shards, such as the indexes of an old data set; None: there is
            none.
        cache_limit: in bytes.
    """

    def __init__(self, address: str | Path, cache: CacheConfig | None = None) -> None:
        self._base = checked(address).removeprefix("file://")
        self.address = shown(self._base)
        self._config = cache or CacheConfig()
        self.cache_limit = self._config.limit
        self._cache = self._config.open()
        local = not is_remote(self._base) and os.access(self._base, os.W_OK)
        self.scratch = Path(self._base) if local else None
        self._broken: set[File] = set()
        self._failed: dict[File, tuple[float, UserError]] = {}  # until when what failed last counts
        self._held: deque[int] = deque()
        weakref.finalize(self, _close_all, self._held)

    def __reduce__(self) -> tuple[Any, ...]:
        return DataStore, (self._base, self._config)

    def read_bytes(self, name: str, most: int) -> bytes:
        """A small file, whole.

        Raises:
            OSError: a local file cannot be read; FileNotFoundError where there is none.
            UserError: a file from elsewhere cannot be read, a local one is no plain file, or it has more than `most`
                bytes.
        """
        place = self._place(name, None)
        if isinstance(place, str):
            data = fetch_small(place, most)
        else:
            with _plain(place).open("rb") as file:
                # No more than it has: `read` makes room for all that it is asked for.
                data = file.read(min(os.fstat(file.fileno()).st_size, most) + 1)
        if len(data) > most:
            raise UserError(f"'{self.address}/{name}' has more than {most} bytes, and is not read; {_REMEDY}")
        return data

    def is_local(self, file: "File") -> bool:
        """Whether the file is used where it lies."""
        return isinstance(self._place(file.name, file.url), Path)

    def _place(self, name: str, url: str | None) -> Path | str:
        """The local path, or the address, of the file `name` beside the manifest, or at `url`."""
        if url is not None and is_remote(url) and not url.startswith("file://"):
            return url
        name = (url or name).removeprefix("file://")
        return join(self._base, name) if is_remote(self._base) else Path(self._base, name)

    def path(self, name: str, size: int | None = None, sha256: str | None = None, url: str | None = None) -> Path:
        """A local path of the whole file; of one from elsewhere, after its SHA-256 was found right.

        Raises:
            UserError: it cannot be read, or is another file than the manifest says, twice; or the cache has no room.
        """
        place = self._place(name, url)
        if isinstance(place, Path):
            return _plain(place)
        for _ in range(2):
            with self._cache.open(_digest(name, sha256), size) as file:
                if size is None:
                    file.fill_unsized(partial(fetch, place))
                else:
                    _wait(self._begin(file, File(name, size, sha256, url), None))
                if file.verified():
                    self._hold(file)
                    return Path(file.path)
                file.forget()
        raise UserError(
            f"'{shown(place)}' does not have the SHA-256 {sha256} of the manifest: it was cut off or changed; {_REMEDY}"
        )

    @contextmanager
    def open(
        self, wanted: Mapping[File, Ranges] | Mapping[File, None], *, whole: bool = False
    ) -> Iterator[dict[File, FileIO | UserError]]:
        """Shards in which the bytes of these ranges (offset, size; None: all) can be read until the block ends.

        Args:
            wanted: what is going to be read.
            whole: fetch the rest of these shards, too, as it will be read soon.

        A shard of which not all that was to be fetched could be had is represented by what is wrong with it; of it,
        only ranges are fetched from then on.
        """
        files: dict[File, FileIO | UserError] = {}
        begun: list[tuple[File, list[Future[None]]]] = []
        with ExitStack() as stack:
            for file, ranges in wanted.items():
                place = self._place(file.name, file.url)
                try:
                    if isinstance(place, Path):
                        files[file] = stack.enter_context(_open(place))
                        continue
                    cached = stack.enter_context(self._cache.open(_digest(file.name, file.sha256), file.size))
                except UserError as error:
                    files[file] = error
                    continue
                files[file] = cached.file
                every = whole and file not in self._broken
                begun.append((file, self._begin(cached, file, None if every else ranges)))
                stack.callback(_cancel, begun[-1][1])
            for file, futures in begun:
                try:
                    _wait(futures)
                except UserError as error:
                    files[file] = error
                    self._broken.add(file)
            yield files

    def want(self, files: Mapping[File, Ranges] | Mapping[File, None]) -> None:
        """Fetch files or ranges of them in the background, in this order; `path` and `open` wait for what is under way.

        What goes wrong is said when the file is asked for.
        """
        for file, ranges in files.items():
            if not self.is_local(file) and file not in self._broken:
                self.later(partial(self._fetch_ahead, file, ranges))

    def later(self, work: Callable[[], None]) -> None:
        """Have `work` done by a thread that fetches ahead, after what is waiting already."""
        _queue(os.getpid()).put(work)

    def forget(self, file: File, ranges: Ranges) -> None:
        """Fetch these bytes of a file from elsewhere anew when they are next asked for, as they are wrong."""
        with self._cache.open(_digest(file.name, file.sha256), file.size) as cached:
            cached.forget(ranges)

    def _fetch_ahead(self, file: File, ranges: Ranges | None) -> None:
        if file.size is None:
            self.path(*file)
            return
        with self._cache.open(_digest(file.name, file.sha256), file.size) as cached:
            missing = cached.missing(ranges)
        for first, stop in missing[1:]:  # by other threads: a whole shard is many parts
            self.later(partial(self._fill, file, first, stop))
        for first, stop in missing[:1]:
            self._fill(file, first, stop)

    def _fill(self, file: File, first: int, stop: int) -> None:
        with self._cache.open(_digest(file.name, file.sha256), file.size) as cached:
            cached.fill(first, stop, partial(self._fetch, file))

    def _begin(self, cached: CachedFile, file: File, ranges: Ranges | None) -> list[Future[None]]:
        """Fetch what is missing of these ranges, several parts at once."""
        read = partial(self._fetch, file)
        return [_pool(os.getpid()).submit(cached.fill, first, stop, read) for first, stop in cached.missing(ranges)]

    def _fetch(self, file: File, start: int, stop: int) -> bytes:
        """Bytes of a file from elsewhere. A failure counts for a while: each sample would wait as long to end alike.

        Raises:
            UserError: as `fetch`; or, without asking again, because the file could not be had a short time ago.
        """
        until, failure = self._failed.get(file, (0.0, None))
        lately = time.monotonic() < until
        if lately and isinstance(failure, OutOfReach):
            raise OutOfReach(str(failure))  # a new one: other threads may hold the first with their own traces
        try:
            return fetch(str(self._place(file.name, file.url)), start, stop, patient=not lately)
        except UserError as error:
            self._failed[file] = time.monotonic() + _PAUSE_S, error
            raise

    def _hold(self, file: CachedFile) -> None:
        self._held.append(os.dup(file.file.fileno()))  # shares the lock
        if len(self._held) > _HELD:
            os.close(self._held.popleft())


def open_store(address: str | Path, cache: CacheConfig | None = None) -> DataStore:
    """The store at an address: a folder, or any fsspec address."""
    return DataStore(address, cache)


def _digest(name: str, sha256: str | None) -> str:
    if sha256 is None:
        raise ValueError(f"'{name}' is far away and has no digest to keep it under")
    return sha256


def _plain(path: Path) -> Path:
    """The path, unless it is a FIFO or a device, which would be waited for or never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"'{path}' is not a plain file; {_REMEDY}")
    return path


def _open(path: Path) -> FileIO:
    try:
        return _plain(path).open("rb", buffering=0)
    except OSError as error:
        raise UserError(f"shard '{path}' cannot be opened: {error.strerror}; {_REMEDY}") from error


def _wait(futures: list[Future[None]]) -> None:
    try:
        for future in futures:
            future.result()
    finally:
        _cancel(futures)


def _cancel(futures: list[Future[None]]) -> None:
    """Give up what is not begun and wait for the rest, so that the file can be closed."""
    for future in futures:
        future.cancel()
    for future in futures:
        if not future.cancelled():
            future.exception()


def _close_all(handles: deque[int]) -> None:
    for handle in handles:
        os.close(handle)


@lru_cache
def _pool(process: int) -> ThreadPoolExecutor:
    """The threads of this process that fetch what is waited for; a fork has none of its parent's."""
    return ThreadPoolExecutor(_CONNECTIONS, "fetch")


@lru_cache
def _queue(process: int) -> "SimpleQueue[Callable[[], None]]":
    """The queue of this process for what is fetched ahead; its threads do not keep the process from ending."""
    queue: SimpleQueue[Callable[[], None]] = SimpleQueue()

    def work() -> None:
        while True:
            # Who needs the bytes asks for them again, and says what is wrong. RuntimeError: at the end of the process
            # connections and event loops close below these threads.
            with suppress(UserError, OSError, RuntimeError):
                queue.get()()

    for _ in range(_CONNECTIONS):
        Thread(target=work, name="fetch ahead", daemon=True).start()
    return queue
