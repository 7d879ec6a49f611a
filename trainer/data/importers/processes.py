"""The processes that write shards: started, given tasks, and watched.

Each is a Python of its own, so that nothing of the importing process (threads, locks, open files) is copied into it.
Over its pipes go lines of JSON. It ends with the importing process, however that ends; until then it holds the lock on
the unfinished data set, so that no second import begins beside it.
"""

import contextlib
import dataclasses
import errno
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from trainer.data.importers import ImportOptions
from trainer.data.importers.work import Bad, Task, Tell, Worker
from trainer.errors import UserError

_AGAIN = "run the same command again: it goes on where this one stopped"
_START = "from trainer.data.importers.processes import serve; serve()"


class Setup(NamedTuple):
    """What a process is started with: the arguments of `Worker`."""

    folder: Path
    kind: str
    options: ImportOptions
    threads: int


def run_tasks(setup: Setup, tasks: list[Task], processes: int, tell: Tell) -> None:
    """Do all tasks, in `processes` processes; in this one if that is 1.

    Raises:
        UserError: a task failed, or a process was killed; the other processes are ended at once.
    """
    if processes == 1 or len(tasks) <= 1:
        worker = Worker(*setup)
        for task in tasks:
            _do(worker, task, setup.folder, tell)
        return
    waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)
    lock = threading.Lock()

    def tell_in_turn(done: int, bad: list[Bad]) -> None:
        with lock:
            tell(done, bad)

    def lead(child: _Child) -> None:
        while not waiting.empty():
            try:
                child.do(waiting.get_nowait(), tell_in_turn)
            except queue.Empty:  # another thread was quicker
                return

    children: list[_Child] = []
    try:
        with ThreadPoolExecutor(processes) as pool:  # a thread for each child, which waits for its answers
            try:
                children += (_Child(setup) for _ in range(min(processes, len(tasks))))
                for led in as_completed([pool.submit(lead, child) for child in children]):
                    led.result()
            finally:
                for child in children:
                    child.kill()  # after a failure its thread still waits
    finally:
        for child in children:
            child.close()


class _Child:
    def __init__(self, setup: Setup) -> None:
        # Modules are found where this process finds them, and nowhere else (-P: not in the current folder).
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            close_fds=False,  # the lock on the folder is inherited; Python's other files are not
        )
        self._send({"folder": str(setup.folder), "kind": setup.kind, "threads": setup.threads})
        self._send(dataclasses.asdict(setup.options))

    def do(self, task: Task, tell: Tell) -> None:
        self._send(task.model_dump())
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = json.loads(line)
            if "error" in answer:
                raise UserError(answer["error"])
            if "finished" in answer:
                return
            tell(answer["done"], [Bad(*bad) for bad in answer["bad"]])
        raise UserError(_obituary(self._process.wait(), task.shard.name))

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # of a task that never reached it
            self._process.stdin.close()
        with self._process:  # closes the other pipe and waits
            pass

    def _send(self, message: dict[str, object]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead, which the missing answer says in better words
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()


def _obituary(code: int, shard: str) -> str:
    if code >= 0:
        return f"the process that wrote '{shard}' ended with exit code {code}, for the reason above; {_AGAIN}"
    name = signal.Signals(-code).name
    memory = ", most likely since memory ran out (fewer --jobs need less);" if name == "SIGKILL" else ";"
    return f"the process that wrote '{shard}' was ended by {name}{memory} {_AGAIN}"


def _do(worker: Worker, task: Task, folder: Path, tell: Tell) -> None:
    """Do a task; a file that cannot be written is one sentence."""
    try:
        worker.do(task, tell)
    except OSError as error:
        raise UserError(cannot_write(error, folder)) from error


def cannot_write(error: OSError, folder: Path) -> str:
    """What to tell the user when the import cannot write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of '{folder.parent}' is full; free some space and {_AGAIN}"
    return f"'{error.filename or folder}' cannot be written: {error.strerror}; mend that and {_AGAIN}"


def serve() -> None:
    """A process that writes shards: does the tasks that come in, and answers with what it tells and how it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the importing process ends us
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library may print must not come between the answers
    setup, options = json.loads(sys.stdin.readline()), ImportOptions(**json.loads(sys.stdin.readline()))
    folder = Path(setup["folder"])
    worker = Worker(folder, setup["kind"], options, setup["threads"])

    def say(**answer: object) -> None:
        answers.write(json.dumps(answer) + "\n")

    for task in _tasks():
        try:
            _do(worker, task, folder, lambda done, bad: say(done=done, bad=bad))
            say(finished=True)
        except UserError as error:
            say(error=str(error))


def _tasks() -> Iterator[Task]:
    """The tasks, as they come in; the process ends with its input, even in the middle of a task."""
    came: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            came.put(line)
        os._exit(1)  # the importing process is gone; what is half written is cleared away by the next one

    threading.Thread(target=listen, daemon=True).start()
    while True:
        yield Task.model_validate_json(came.get())
