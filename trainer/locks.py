"""Locks on files, which the system drops with the process that holds them."""

import fcntl
import time
from collections.abc import Callable
from typing import BinaryIO


def try_lock(file: BinaryIO) -> bool:
    """Lock an open file until it is closed; False where somebody else holds it.

    Open it for writing: network file systems lock nothing else.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def within(patience_s: float, done: Callable[[], bool]) -> bool:
    """Ask until it is done, for at most so long; whether it was."""
    until = time.monotonic() + patience_s
    while not done():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True
