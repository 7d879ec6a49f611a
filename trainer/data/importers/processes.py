"""The processes that write shards: started, given tasks, and watched.

One program is started for all of them. It imports what they need and forks each, so that many cost hardly more than
one, and none has threads, locks or open files of the importing process. Each has a socket, over which tasks come in and
answers go out, in lines of JSON. All end with the importing process, however that ends; until then they hold the lock
on the unfinished data set, so that no second import begins beside them.
"""

import contextlib
import dataclasses
import errno
import gc
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple, NoReturn

from trainer.data.importers import ImportOptions
from trainer.data.importers.work import Bad, Task, Tell, Worker
from trainer.errors import UserError

_AGAIN = "run the same command again: it goes on where this one stopped"
_START = "import gc; gc.disable(); from trainer.data.importers.processes import serve; serve()"
# Nothing here multiplies matrices, and pydantic would look for plugins in all that is installed.
_LEAN = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYDANTIC_DISABLE_PLUGINS": "1"}


class Setup(NamedTuple):
    """What a process is started with: the arguments of `Worker`."""

    folder: Path
    kind: str
    options: ImportOptions
    threads: int


class Program:
    """The program that forks the processes, `most` at a time; a context manager, with which all of them end."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._running: subprocess.Popen[bytes] | None = None
        self._ends: list[socket.socket] = []

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *error: object) -> None:
        self._end(kill=True)

    def start(self) -> None:
        """Start it, if it does not run: it imports what it needs, and waits to be told how many to fork."""
        if self._running is not None:
            return
        self._ends, theirs = map(list, zip(*(socket.socketpair() for _ in range(self.most)), strict=True))
        for one in theirs:
            one.set_inheritable(True)
        # Modules are found where this process finds them, and nowhere else (-P: not in the current folder).
        path = os.pathsep.join(path for path in sys.path if path)
        self._running = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, json.dumps([one.fileno() for one in theirs])],
            stdin=subprocess.PIPE,  # takes one line; it ends when this process does
            env=os.environ | _LEAN | {"PYTHONPATH": path},
            close_fds=False,  # the lock on the folder is inherited, and the sockets; Python's other files are not
            process_group=0,  # Ctrl-C does not reach it
            bufsize=0,
        )
        for one in theirs:
            one.close()

    @contextlib.contextmanager
    def processes(self, setup: Setup, count: int) -> Iterator[list["_Child"]]:
        """`count` processes that end with the block, and at once if that fails."""
        self.start()
        assert self._running is not None
        assert self._running.stdin is not None
        options = {"folder": str(setup.folder), "options": dataclasses.asdict(setup.options), "count": count}
        with contextlib.suppress(BrokenPipeError):  # it is dead, which the missing answers say in better words
            self._running.stdin.write(_line(**setup._asdict() | options))
        try:
            yield [_Child(one) for one in self._ends[:count]]
        except BaseException:
            self._end(kill=True)
            raise
        self._end(kill=False)

    def _end(self, *, kill: bool) -> None:
        """Let it end when the tasks are done, or at once."""
        if self._running is None:
            return
        if kill:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._running.pid, signal.SIGKILL)
        for one in self._ends:
            one.shutdown(socket.SHUT_WR)  # no more tasks
        self._running.wait()
        assert self._running.stdin is not None
        self._running.stdin.close()
        for one in self._ends:
            one.close()
        self._running = None


def run_tasks(setup: Setup, tasks: list[Task], processes: int, tell: Tell, program: Program) -> None:
    """Do all tasks, in `processes` processes of the program; in this one if that is 1.

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

    with contextlib.ExitStack() as stack:
        # A thread for each child, which waits for its answers. After a failure the others' are ended by the program's.
        pool = stack.enter_context(ThreadPoolExecutor(processes))
        children = stack.enter_context(program.processes(setup, min(processes, len(tasks))))
        for led in as_completed([pool.submit(lead, child) for child in children]):
            led.result()


class _Child:
    """The importing process's end of a process that writes shards."""

    def __init__(self, end: socket.socket) -> None:
        self._end, self._answers = end, end.makefile(encoding="utf-8")

    def do(self, task: Task, tell: Tell) -> None:
        with contextlib.suppress(OSError):  # it is dead, which the missing answer says in better words
            self._end.sendall(task.model_dump_json().encode() + b"\n")
        with contextlib.suppress(ConnectionResetError):  # it ended, and had not read the task
            for line in self._answers:
                try:
                    answer = json.loads(line)
                except ValueError:  # it was killed in the middle of a line
                    continue
                if "error" in answer:
                    raise UserError(answer["error"])
                if "finished" in answer:
                    return
                if "ended" in answer:
                    raise UserError(_obituary(answer["ended"], task.shard.name))
                done, bad = answer["told"]
                tell(done, [Bad(*one) for one in bad])
        gone = f"the process that writes '{task.shard.name}' is gone with the program that started it"
        raise UserError(f"{gone}, for the reason above or since memory ran out; {_AGAIN}")


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
    """The program: forks the processes, and tells in the place of each how it ended."""
    os.dup2(2, 1)  # whatever a library may print is not what the import prints
    given = open(0, "rb", buffering=0, closefd=False).readline()  # noqa: SIM115  read on by `_end_with_input`
    if not given:  # the import has ended without having needed processes
        return
    started = json.loads(given)
    folder, options = Path(started["folder"]), ImportOptions(**started["options"])
    worker = Worker(folder, started["kind"], options, started["threads"])
    gc.freeze()  # what is imported is never garbage, and its pages stay shared
    gc.enable()
    sockets = [socket.socket(fileno=number) for number in json.loads(sys.argv[1])[: started["count"]]]
    children: dict[int, socket.socket] = {}
    for own in sockets:
        child = os.fork()
        if not child:
            for other in sockets:
                if other is not own:
                    other.close()
            _work(worker, folder, own)
        children[child] = own
    threading.Thread(target=_end_with_input, daemon=True).start()
    while children:
        child, status = os.wait()
        with children.pop(child) as own, contextlib.suppress(OSError):
            own.sendall(b"\n" + _line(ended=os.waitstatus_to_exitcode(status)))


def _end_with_input() -> None:
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)  # the importing process is gone; what is half written is cleared away by the next one


def _work(worker: Worker, folder: Path, own: socket.socket) -> NoReturn:
    """A process that writes shards: does the tasks that come in, and answers with what it tells and how it ended."""
    code = 1
    try:
        for line in own.makefile(encoding="utf-8"):
            try:
                _do(worker, Task.model_validate_json(line), folder, lambda *told: own.sendall(_line(told=told)))
                own.sendall(_line(finished=True))
            except UserError as error:
                own.sendall(_line(error=str(error)))
        code = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(code)


def _line(**answer: object) -> bytes:
    return json.dumps(answer).encode() + b"\n"
