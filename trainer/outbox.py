"""What a server that may be away has still to take: entries in order, on disk, so that they outlive this process too.

folder/  queue.jsonl   one entry a line
         state.json    which run they belong to, and how much of the queue was taken

Entries may be taken twice, where a process dies between sending one and noting that: the receiver must not mind. What
another process puts into the folder at the same time is not seen; the process that opened it last owns it.
"""

import json
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer.strict import Strict

Entry = dict[str, Any]  # plain values of JSON; "kind" says what it is
_QUEUE, _STATE = "queue.jsonl", "state.json"


class OutboxState(Strict):
    """`state.json`."""

    run_id: str = ""
    ended: bool = True  # whether the last run's end is in the queue or was taken
    sent: int = 0  # bytes of the queue


def queue_inode(folder: Path) -> int:
    """Which file the queue of a folder is: another one whenever the folder was opened; 0: none."""
    try:
        return os.stat(folder / _QUEUE).st_ino
    except OSError:
        return 0


def _line(entry: Entry) -> bytes:
    return (json.dumps(entry) + "\n").encode()


class Outbox:
    """The queue between who records and who sends, each in a thread.

    Args:
        folder: where it lies, with what an earlier process left there at its head; None: in memory only.
        on_trouble: called with one sentence, once, when the folder cannot be written; entries then stay in memory.
    """

    def __init__(self, folder: Path | None, on_trouble: Callable[[str], None]) -> None:
        self.folder, self._on_trouble = folder, on_trouble
        self._changed = threading.Condition()
        self._entries: deque[tuple[Entry, int]] = deque()
        self._file: int | None = None
        self.state = OutboxState()
        if folder is not None:
            self._on_disk(lambda: self._open(folder))

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, entry: Entry) -> None:
        """Add an entry at the end."""
        line = _line(entry)
        with self._changed:
            self._entries.append((entry, len(line)))
            self._on_disk(lambda: self._append(line))
            self._changed.notify_all()

    def head(self, most: int) -> list[Entry]:
        """The oldest entries, at most so many."""
        with self._changed:
            return [self._entries[i][0] for i in range(min(most, len(self._entries)))]

    def wait(self, timeout_s: float | None) -> None:
        """Return when there is an entry, at `wake`, or after so long."""
        with self._changed:
            if not self._entries:
                self._changed.wait(timeout_s)

    def wake(self) -> None:
        """Let `wait` return."""
        with self._changed:
            self._changed.notify_all()

    def taken(self, count: int) -> None:
        """Forget the oldest entries: they have arrived."""
        with self._changed:
            size = sum(self._entries.popleft()[1] for _ in range(count))
            rest = self.state.sent + size if self._entries else 0
            self.note(sent=rest)
            if not self._entries:  # noted first: dying in between sends everything again, which does no harm
                self._on_disk(self._clear)

    def note(self, **changes: Any) -> None:
        """Change the state."""
        with self._changed:
            self.state = self.state.model_copy(update=changes)
            if self.mine():
                self._on_disk(self._write_state)

    def mine(self) -> bool:
        """Whether no other process has opened the folder since this one did."""
        with self._changed:
            return self.folder is None or self._file is None or queue_inode(self.folder) == os.fstat(self._file).st_ino

    def close(self) -> None:
        """Stop writing to the folder, which keeps what was not taken."""
        with self._changed:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def _open(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError, ValidationError):  # then nothing was taken, as far as is known
            self.state = OutboxState.model_validate_json((folder / _STATE).read_bytes())
        old = (folder / _QUEUE).read_bytes() if (folder / _QUEUE).is_file() else b""
        for line in old[self.state.sent :].splitlines(keepends=True):
            try:
                self._entries.append((json.loads(line), len(line)))
            except ValueError:  # the process or the machine died while it wrote this one
                continue
        fresh = folder / f".{_QUEUE}-{os.getpid()}"
        self._file = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
        for number, (entry, _) in enumerate(self._entries):
            line = _line(entry)
            self._entries[number] = (entry, len(line))
            self._append(line)
        self.state = self.state.model_copy(update={"sent": 0})
        self._write_state()  # first: dying in between sends everything again
        fresh.replace(folder / _QUEUE)  # another file, so that an earlier owner sees that it is none now

    def _append(self, line: bytes) -> None:
        while self._file is not None and line:
            line = line[os.write(self._file, line) :]

    def _clear(self) -> None:
        if self._file is not None:
            os.ftruncate(self._file, 0)

    def _write_state(self) -> None:
        if self.folder is not None and self._file is not None:
            fresh = self.folder / f".{_STATE}-{os.getpid()}"
            fresh.write_text(self.state.model_dump_json())
            fresh.replace(self.folder / _STATE)

    def _on_disk(self, call: Callable[[], None]) -> None:
        try:
            call()
        except OSError as error:
            self.close()
            what, self.folder = f"'{self.folder}' cannot be written ({error.strerror})", None
            self._on_trouble(f"{what}: records for MLflow are kept in memory only")
