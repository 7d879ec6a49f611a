"""A small process that waits for this one to end, and calls a function if it ended without saying so.

It has a session of its own, so that Ctrl-C and what kills this process' group do not reach it. Until it is needed it
imports nothing of the project.
"""

import contextlib
import os
import sys
from collections.abc import Callable

_PROGRAM = """
import sys
argument, farewell = sys.stdin.readline(), sys.stdin.read()  # the latter returns when the other process has ended
if not farewell:
    import importlib
    getattr(importlib.import_module(sys.argv[1]), sys.argv[2])(argument)
"""


class Guard:
    """Calls `function(argument)` in another process, unless `dismiss` is called before this process ends.

    Args:
        function: one of a module's.
        argument: one line; handed over a pipe, where no list of processes shows it.
    """

    def __init__(self, function: Callable[[str], None], argument: str) -> None:
        there, self._pipe = os.pipe()
        nowhere = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_WRONLY, 0) for number in (1, 2)]
        self._process = os.posix_spawn(
            sys.executable,
            [sys.executable, "-c", _PROGRAM, function.__module__, function.__name__],
            os.environ | {"PYTHONPATH": os.pathsep.join(place or os.getcwd() for place in sys.path)},
            file_actions=[(os.POSIX_SPAWN_DUP2, there, 0), *nowhere],
            setsid=True,
        )
        os.close(there)
        self._write(argument + "\n")

    def dismiss(self) -> None:
        """End it: there is nothing left to do."""
        self._write("done\n")
        os.close(self._pipe)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._process, 0)

    def release(self) -> None:
        """Let it call the function now."""
        os.close(self._pipe)

    def _write(self, text: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # somebody killed it
            os.write(self._pipe, text.encode())
