"""Files and folders that appear whole or not at all, and are on the disk when they do."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from trainer.errors import UserError
from trainer.locks import within

_PATIENCE = 5.0  # seconds for the children of a killed process, which see its end and drop the lock soon after


class Unwritable(OSError, UserError):
    """A file cannot be made. Whoever minds every OSError finds it among them; its message is a sentence."""

    def __str__(self) -> str:
        told = f"'{self.filename}' cannot be written: {self.strerror}"
        return f"{told}; make its folder first" if self.errno == errno.ENOENT else told


class DiskFull(Unwritable):
    """There is no room on a disk. `strerror` is the sentence."""

    def __str__(self) -> str:
        return str(self.strerror)


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Say in one sentence that `path` could not be written because its disk, or the user's share of it, is full.

    Raises:
        DiskFull: in place of the system's error.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, DiskFull) or not is_full(error):
            raise
        raise DiskFull(error.errno, full(path), str(path)) from error


def is_full(error: OSError) -> bool:
    """Whether a disk, or the user's share of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def full(path: Path) -> str:
    """The sentence of a disk that is full."""
    sentence = f"the disk of '{path.parent}' is full, so that '{path.name}' was not written"
    return f"{sentence}; free some space there and run the command again"


@contextmanager
def fresh_file(path: Path) -> Iterator[BinaryIO]:
    """A hidden sibling of `path` to write into; it takes `path`'s name when the block ends without an exception.

    Its name ends as `path`'s does, so that writers which go by the suffix do the same to it. Two processes may write
    one path at the same time: the last one to end wins, whole.

    Raises:
        DiskFull: there is no room for it.
        Unwritable: it cannot be made.
    """
    partial = path.with_name(f".partial-{os.urandom(6).hex()}-{path.name}")
    try:
        with room_for(path), _made(partial, path) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _made(partial: Path, path: Path) -> BinaryIO:
    try:
        return partial.open("xb")
    except OSError as error:
        if is_full(error):
            raise
        raise Unwritable(error.errno, error.strerror, str(path)) from error


def write_file(path: Path, content: bytes | str) -> None:
    """Write a file whole or not at all; text as UTF-8."""
    with fresh_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@dataclass(frozen=True, slots=True)
class Kind:
    """What a folder is, so that nothing else is ever replaced: `name` with its article, and a file that each has."""

    name: str
    marker: str


@contextmanager
def fresh_folder(out: Path, kind: Kind, overwrite: bool = False, *, resumable: bool = False) -> Iterator[Path]:
    """A hidden sibling of `out` to write into; it takes `out`'s name when the block ends without an exception.

    What a killed process left behind is removed by the next one, or, if the work is `resumable`, given to it; then it
    also stays after an exception. A lock on the sibling, which the system drops with the process that holds it, tells
    leftovers from a writer that is at work. Children that a resumable writer starts without `close_fds` hold it too.

    Raises:
        UserError: `out` is there already (and not a folder of this kind that `overwrite` allows to replace), or another
            process is writing it, or it cannot be made; DiskFull where there is no room.
    """
    out = Path(os.path.abspath(out))
    work = out.with_name(f".{out.name}.partial")
    lock = _begin(work, out, kind, overwrite)
    if resumable:
        os.set_inheritable(lock, True)
    else:
        empty(work)
    finished = False
    try:
        with room_for(out):
            yield work
            publish(work, out)
        finished = True
    finally:
        if not finished and not resumable:  # afterwards the name may already be another writer's
            shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def publish(work: Path, out: Path) -> None:
    """Flush the finished folder `work` with its files, and give it the name `out`, in place of what has it."""
    old = out.with_name(f".{out.name}.replaced")
    for path in [*work.iterdir(), work]:
        sync(path)
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    work.rename(out)
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _begin(work: Path, out: Path, kind: Kind, overwrite: bool) -> int:
    """Make the sibling folder, if `out` may be written; its lock."""
    old = out.with_name(f".{out.name}.replaced")
    try:
        with room_for(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            if old.exists() and not out.exists():  # killed between the two renames of `publish`
                old.rename(out)
            _check(out, kind, overwrite)
            return _claim(work, out)
    except OSError as error:
        if isinstance(error, DiskFull):
            raise
        blocked = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "a file is where a folder has to be" if blocked else error.strerror
        raise UserError(f"'{out}' cannot be made: {reason}; choose another --out") from error


def _check(out: Path, kind: Kind, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"'{out}' is a file; name a folder that does not exist yet with --out")
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / kind.marker).exists():
        raise UserError(f"'{out}' holds other files and is not {kind.name}; choose a new folder with --out")
    if not overwrite:
        raise UserError(f"'{out}' is {kind.name} already; choose another --out, or replace it with --overwrite")


def _claim(work: Path, out: Path) -> int:
    """Take the sibling folder; the lock is on the folder itself, so it leaves no file."""
    while True:
        work.mkdir(exist_ok=True)
        lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
        if not within(_PATIENCE, partial(_locked, lock)):
            os.close(lock)
            raise UserError(f"another process is writing '{out}' now; wait for it to end, or choose another --out")
        if work.exists() and os.stat(work).st_ino == os.fstat(lock).st_ino:
            break
        os.close(lock)  # its former owner finished between our open and our lock
    return lock


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def empty(folder: Path, but: str = "") -> None:
    """Remove all that is in a folder, except what is named `but`."""
    for path in folder.iterdir():
        if path.name == but:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
