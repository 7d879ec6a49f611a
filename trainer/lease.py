"""A run's folder held by one process, also in a bucket.

On a disk a locked file, which the system unlocks when the process ends. In a bucket an object that its holder writes
anew every `BEAT_S` seconds: one that has not changed for `STALE_S` is left by a process that is gone. No clocks are
compared. To take it is to write it where there is none, which S3, Google Cloud Storage and fsspec's memory grant to one
writer alone. Who takes over a stale one looks again `SETTLE_S` later: another may have removed and written it, too.

A holder whose bucket was away for longer than `STALE_S` may be overtaken by a run that is started in that time; it
finds the other's object and beats no more. No two writers of checkpoints share a file (`checkpoint.files`).
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.atomic import sync
from trainer.data.remote import join, put
from trainer.errors import UserError
from trainer.locks import try_lock, within
from trainer.storage import Folder

BEAT_S, STALE_S, SETTLE_S = 5.0, 20.0, 2.0
_LOOK_S = 1.0


@contextmanager
def held(folder: Folder, name: str, token: str, patience_s: float = 0.0) -> Iterator[None]:
    """Hold a folder while the block runs, by a file in it that then has the token in it.

    Args:
        token: of this run; what has it is this run's own.
        patience_s: how long it may stay another's.

    Raises:
        UserError: it is another's, or the folder cannot be written.
    """
    address = folder.address
    with (
        _locked(address / name, token, patience_s)
        if isinstance(address, Path)
        else _Lease(folder, name, token, patience_s).beating()
    ):
        yield


def token_in(folder: Folder, name: str) -> str:
    """The token of who holds a folder; "" where nobody does."""
    try:
        content = folder.read(name).decode()
    except FileNotFoundError:
        return ""
    return content.partition(" ")[0]


def _refused(folder: Folder) -> UserError:
    return UserError(f"another run is writing into '{folder}' now; wait for its end, or choose another run.out")


@contextmanager
def _locked(path: Path, token: str, patience_s: float) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("ab")  # for writing: network file systems lock nothing else
    except OSError as error:
        reason = f"'{path.parent}' cannot be written: {error.strerror}"
        raise UserError(f"{reason}; choose a run.out that every node can write") from error
    with opened as file:
        if not within(patience_s, lambda: try_lock(file)):
            raise _refused(Folder(path.parent))
        file.truncate(0)
        file.write(token.encode())
        file.flush()
        sync(path)
        yield


class _Lease:
    """The object in a bucket: its token, and how often it was written."""

    def __init__(self, folder: Folder, name: str, token: str, patience_s: float) -> None:
        self._folder, self._name, self._token = folder, name, token
        self._beats = 0
        self._take(patience_s)

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Write it anew again and again while the block runs, and remove it then."""
        ended = threading.Event()
        thread = threading.Thread(target=self._beat, args=(ended,), name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            with suppress(UserError):  # it is stale soon
                if token_in(self._folder, self._name) == self._token:
                    self._folder.remove([self._name])

    def _create(self) -> bool:
        return put(join(str(self._folder.address), self._name), self._content().encode(), fresh=True)

    def _content(self) -> str:
        self._beats += 1
        return f"{self._token} {self._beats} {time.time():.0f}\n"

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(BEAT_S):
            with suppress(UserError):  # the bucket is away
                if token_in(self._folder, self._name) != self._token:
                    return
                self._folder.write(self._name, self._content())

    def _unchanged(self, found: bytes) -> bool:
        """Asked right before the removal: another who waited for the same may have been quicker."""
        try:
            return self._folder.read(self._name) == found
        except FileNotFoundError:
            return False

    def _take(self, patience_s: float) -> None:
        until, changes, seen, since = time.monotonic() + patience_s, -1, b"", 0.0
        while not self._create():
            try:
                found = self._folder.read(self._name)
            except FileNotFoundError:
                continue
            now = time.monotonic()
            if found.startswith(f"{self._token} ".encode()):  # of this run's ranks, before they were started anew
                return
            if found != seen:
                changes, seen, since = changes + 1, found, now
            if changes and now >= until:
                raise _refused(self._folder)
            if now - since >= STALE_S and self._unchanged(found):
                self._folder.remove([self._name])
                if self._create():
                    time.sleep(SETTLE_S)
                    if token_in(self._folder, self._name) == self._token:
                        return
            time.sleep(_LOOK_S)
