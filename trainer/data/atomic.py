"""A folder that appears whole or not at all."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.data.manifest import MANIFEST_FILE
from trainer.errors import UserError


@contextmanager
def fresh_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A hidden sibling of `out` to write into; it takes `out`'s name when the block ends without an exception.

    What a killed process left behind is removed by the next one. A lock on the sibling, which the system drops with
    the process that holds it, tells leftovers from an import that is running.

    Raises:
        UserError: `out` is there already (and not a data set that `overwrite` allows to replace), or another process
            is writing it.
    """
    out = Path(os.path.abspath(out))
    work, old = out.with_name(f".{out.name}.importing"), out.with_name(f".{out.name}.replaced")
    out.parent.mkdir(parents=True, exist_ok=True)
    if old.exists() and not out.exists():  # killed between the two renames below
        old.rename(out)
    _check(out, overwrite)
    lock = _claim(work, out)
    finished = False
    try:
        yield work
        for path in [*work.iterdir(), work]:
            _sync(path)
        _swap(work, out, old)
        finished = True
    finally:
        if not finished:  # afterwards the name may already be another import's
            shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def _check(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"'{out}' is a file; name a folder that does not exist yet with --out")
    if not any(out.iterdir()):
        return
    if not (out / MANIFEST_FILE).exists():
        raise UserError(f"'{out}' holds other files and is not a data set; choose a new folder with --out")
    if not overwrite:
        raise UserError(f"'{out}' is a finished data set already; choose another --out, or replace it with --overwrite")


def _claim(work: Path, out: Path) -> int:
    """Take the sibling folder, clearing it of leftovers; the lock is on the folder itself, so it leaves no file."""
    while True:
        work.mkdir(exist_ok=True)
        lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise UserError(
                f"another import is writing '{out}' now; wait for it to end, or choose another --out"
            ) from error
        if work.exists() and os.stat(work).st_ino == os.fstat(lock).st_ino:
            break
        os.close(lock)  # its former owner finished between our open and our lock
    for path in work.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return lock


def _swap(work: Path, out: Path, old: Path) -> None:
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    work.rename(out)
    _sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
