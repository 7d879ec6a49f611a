"""The audit log of a running service: who did what, in lines that are chained, on the disk before a change is answered.

One thread writes. Lines of changes are flushed together before their answers go; lines of what only reads are written
within a quarter of a second and flushed within a second. A megabyte beside the log is kept for when the disk is full:
then the lines of what is under way still find room, and everything that comes after is refused undone.
"""

import contextlib
import errno
import fcntl
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from serving.access.chain import SECTOR, files, last, line, make_folder, pack, pseudonym, read_head, read_key
from serving.errors import ApiError
from trainer.atomic import is_full, sync
from trainer.errors import UserError

log = logging.getLogger("hypersphere.serving")
WRITE_EVERY_S, SYNC_EVERY_S = 0.25, 1.0
SPARE_BYTES = 2**19
MAX_SUBJECTS = 1000  # in a line; what is about more takes several
MAX_WAITING = 10_000  # lines; a disk that takes none for so long is one that has failed


@dataclass(frozen=True, slots=True)
class Event:
    """One request. `do` is its method and route; `subjects` are ids, which are not written but as pseudonyms."""

    at: float
    key_id: str
    do: str
    collection: str
    subjects: Sequence[str]
    status: int
    request_id: str


class AuditLog:
    """Methods may be called from any thread."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Open the log, or begin one. `max_bytes`: of a file; then the next one is begun.

        Raises:
            UserError: the folder holds something else, another process writes it, or it was cut or changed.
        """
        self.folder, self._max_bytes = folder, max_bytes
        self._opened = contextlib.ExitStack()
        self._waiting = deque[tuple[Event, Future[None] | None]]()
        self._wake, self._end = threading.Event(), False
        self._fault, self._broken = "", False
        self._spare, self._file = folder / "spare", -1
        self._synced, self._dirty = time.monotonic(), False
        with contextlib.ExitStack() as opened, _told(folder):
            opened.push(self._opened)
            self._open()
            opened.pop_all()

    def admit(self) -> None:
        """Raises ApiError 503 where what is about to be done could not be noted."""
        if self._fault or len(self._waiting) > MAX_WAITING:
            told = "the audit log cannot be written, so nothing is done; its operator finds the reason in the log"
            raise ApiError(503, "audit_unavailable", told, headers={"retry-after": "5"})

    def note(self, event: Event) -> None:
        """Soon on the disk."""
        self._waiting.append((event, None))

    def happened(self, what: str, key_id: str = "service") -> None:
        """Note what no request did."""
        self.note(Event(time.time(), key_id, what, "", (), 0, ""))

    def keep(self, event: Event) -> Future[None]:
        """On the disk when done. It holds OSError where that failed."""
        done = Future[None]()
        self._waiting.append((event, done))
        self._wake.set()
        return done

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Write in a thread until the block ends, then what is still waiting."""
        thread = threading.Thread(target=self._run, name="audit")
        self.happened("start")
        thread.start()
        try:
            yield
        finally:
            self.happened("stop")
            self._end = True
            self._wake.set()
            thread.join()
            self._opened.close()

    def _open(self) -> None:
        if not (self.folder / "key").exists():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise UserError(f"'{self.folder}' is not an audit log, and not empty; give --audit a new folder")
            make_folder(self.folder)
        self._key = read_key(self.folder)
        self._slots = self._descriptor(self.folder / "head", os.O_RDWR)
        try:
            fcntl.flock(self._slots, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"the audit log '{self.folder}' is in use by another process; give another --audit"
            ) from error
        self._marked, paths = read_head(self.folder, self._key), files(self.folder)
        if paths:
            _cut_torn_line(paths[-1])
        head = last(paths)
        marked = self._marked
        if head is None or head.number < marked.number or (head.number == marked.number and head != marked):
            raise UserError(
                f"the audit log '{self.folder}' was cut or changed since the service wrote it: see `hypersphere audit "
                "verify`, keep it as evidence, and begin a new one with another --audit"
            )
        self._head = head
        self._begin(paths[-1] if paths else self.folder / "000001.jsonl")
        self._fill_spare()

    def _descriptor(self, path: Path, flags: int) -> int:
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
        self._opened.callback(os.close, descriptor)
        return descriptor

    def _begin(self, path: Path) -> None:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        sync(self.folder)
        if self._file >= 0:
            os.close(self._file)
        else:
            self._opened.callback(lambda: os.close(self._file))
        self._path, self._file, self._size = path, file, os.fstat(file).st_size

    def _fill_spare(self) -> None:
        file = os.open(self._spare, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(file, 0, SPARE_BYTES)
        finally:
            os.close(file)

    def _run(self) -> None:
        while not self._end or self._waiting:
            self._wake.wait(0 if self._end else WRITE_EVERY_S)
            self._wake.clear()
            batch = [self._waiting.popleft() for _ in range(len(self._waiting))]
            promised = [done for _, done in batch if done is not None]
            try:
                self._look()
                self._write([event for event, _ in batch])
                self._flush(at_once=bool(promised) or self._end)
                if promised:
                    self._look()
            except OSError as error:
                self._fail(error)
                for done in promised:
                    done.set_exception(error)
                if not self._end:  # what only reads was answered; its lines wait for better times
                    self._waiting.extendleft(reversed([one for one in batch if one[1] is None]))
            else:
                for done in promised:
                    done.set_result(None)
            self._mend()
        with contextlib.suppress(OSError):
            self._mark()

    def _look(self) -> None:
        """Raises OSError where the file was moved, removed or cut: what is written into it then, nobody would find."""
        there, ours = os.stat(self._path), os.fstat(self._file)
        if (there.st_dev, there.st_ino, there.st_size) != (ours.st_dev, ours.st_ino, self._size):
            raise OSError(errno.ESTALE, "it is not the file any more that the service wrote", str(self._path))

    def _write(self, events: Sequence[Event]) -> None:
        """Raises OSError where the disk refuses; then nothing of them is in the file."""
        head, text = self._head, bytearray()
        for event in events:
            for start in range(0, max(1, len(event.subjects)), MAX_SUBJECTS):
                more, head = line(self._entry(event, start), head)
                text += more
        try:
            self._put(text)
        except OSError as error:
            if not is_full(error) or not self._spare.exists():
                raise
            self._fault = "its disk is full"
            log.error("the disk of the audit log '%s' is full; requests are refused until there is room", self.folder)
            self._spare.unlink()
            self._put(text)
        self._head, self._size, self._dirty = head, self._size + len(text), self._dirty or bool(text)

    def _put(self, text: bytearray) -> None:
        if self._size >= self._max_bytes:
            self._sync()
            self._begin(self.folder / f"{int(self._path.stem) + 1:06d}.jsonl")
        self._append(text)

    def _flush(self, at_once: bool) -> None:
        due = time.monotonic() - self._synced >= SYNC_EVERY_S
        if self._dirty and (at_once or due):
            self._sync()
        if due:
            self._synced = time.monotonic()
            self._mark()

    def _sync(self) -> None:
        try:
            os.fdatasync(self._file)
        except OSError:
            self._broken = True  # nobody knows what of the file is on the disk, now or after another try
            raise
        self._dirty = False

    def _append(self, text: bytearray) -> None:
        try:
            written = 0
            while written < len(text):
                written += os.write(self._file, text[written:])
        except OSError:
            self._broken = True
            os.ftruncate(self._file, self._size)
            self._broken = False
            raise

    def _entry(self, event: Event, start: int) -> dict[str, Any]:
        at = datetime.fromtimestamp(event.at, UTC).isoformat(timespec="milliseconds")
        chosen = event.subjects[start : start + MAX_SUBJECTS]
        hidden = [pseudonym(self._key, event.collection, subject) for subject in chosen]
        whole = {"at": at, "key": event.key_id, "do": event.do, "collection": event.collection}
        return whole | {"subjects": hidden, "status": event.status, "request": event.request_id}

    def _mark(self) -> None:
        """Write the head down, when its line is on the disk."""
        if self._head != self._marked:
            os.pwrite(self._slots, pack(self._head, self._key), self._head.number % 2 * SECTOR)
            os.fdatasync(self._slots)
            self._marked = self._head

    def _fail(self, error: OSError) -> None:
        if not self._fault:
            log.error("the audit log '%s' cannot be written: %s", self.folder, error)
        self._fault = str(error)

    def _mend(self) -> None:
        """Take requests again once there is room."""
        if self._fault and not self._broken:
            with contextlib.suppress(OSError):
                self._look()
                self._fill_spare()
                self._fault = ""


def _cut_torn_line(path: Path) -> None:
    """A process was killed while it wrote the last line, which nobody was answered for."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        log.warning("the last line of '%s' was torn, and its %d bytes are cut off", path, len(content) - whole)
        os.truncate(path, whole)


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"the audit log '{folder}' cannot be used: {error.strerror}; give another --audit") from error
