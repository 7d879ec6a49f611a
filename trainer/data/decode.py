"""Payloads in shards to pixels, beside the training: in threads, or in processes of their own. Runs without torch.

A decoder process is a program (`python -m trainer.data.decode`), not a fork and not a child of multiprocessing: it has
none of the caller's threads, locks, sockets and CUDA contexts, and the caller's main module is not run again in it. It
needs numpy and Pillow alone: 40 MB and a third of a second of CPU (a worker of torch's DataLoader: 250 MB, 2 seconds).

    caller's thread --JSON: where the payloads lie--> process --pixels, in memory that both map; JSON: faults--> thread

A process that is killed is replaced, and its images are decoded again one by one, so that an image that brings decoders
down is found and named. A decoder ends when its caller does.
"""

import json
import math
import mmap
import os
import queue
import signal
import socket
import subprocess
import sys
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from io import FileIO
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data.image import Preprocessing, load_image
from trainer.errors import UserError

_REMEDY = "run 'hypersphere data verify' and import the data again, or fetch this shard anew"
_TOGETHER = 32  # images that a process gets at a time: its answer's way is short beside their decoding
_TOGETHER_BYTES = 8 * 2**20
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # a decoder multiplies no matrices
_PATIENCE_S = 300  # without an answer: the machine is stuck, or its file system


class Place(NamedTuple):
    """Where one sample lies in its shard, and its label; `crc` is the CRC-32 of its bytes."""

    shard: Path
    key: str
    offset: int
    size: int
    label: int
    crc: int


@dataclass(frozen=True, slots=True)
class Decoding:
    """How payloads become pixels: `draft` as for `load_image`."""

    preprocessing: Preprocessing
    draft: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.preprocessing.channels, self.preprocessing.height, self.preprocessing.width


class Decoders:
    """Decodes in `processes`, or, where there are none, in `threads` of the caller. Use it in a `with` block.

    Processes are started when the first image is to be decoded, not before, and ended with the block.
    """

    def __init__(self, decoding: Decoding, *, threads: int = 2, processes: int = 0) -> None:
        self._decoding = decoding
        workers = processes or threads
        most = max(1, min(_TOGETHER, _TOGETHER_BYTES // math.prod(decoding.shape)))
        self._together = most if processes else 1
        self._threads = ThreadPoolExecutor(workers, "decode")
        self._children: queue.SimpleQueue[_Child | None] = queue.SimpleQueue()
        for _ in range(workers):
            self._children.put(_Child(decoding, most) if processes else None)

    def __enter__(self) -> "Decoders":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        while not self._children.empty():
            child = self._children.get()
            if child is not None:
                child.end()

    def decode(self, places: Sequence[Place]) -> tuple[NDArray[np.uint8], dict[int, UserError]]:
        """Pixels [len(places), C, H, W]; and, by position in `places`, what is wrong with those that have none.

        Raises:
            UserError: a process cannot be started, or does not answer.
        """
        pixels_BCHW = np.empty((len(places), *self._decoding.shape), np.uint8)
        starts = range(0, len(places), self._together)

        def part(start: int) -> dict[int, UserError]:
            rows = slice(start, start + self._together)
            child = self._children.get()
            try:
                decode = partial(decode_all, self._decoding) if child is None else child.decode
                return {start + i: fault for i, fault in decode(places[rows], pixels_BCHW[rows]).items()}
            finally:
                self._children.put(child)

        faults: dict[int, UserError] = {}
        for found in self._threads.map(part, starts):
            faults |= found
        return pixels_BCHW, faults


def decode_all(decoding: Decoding, places: Sequence[Place], out: NDArray[np.uint8]) -> dict[int, UserError]:
    """Fill `out` [len(places), C, H, W], here and now; what is wrong, by position."""
    faults: dict[int, UserError] = {}
    with ExitStack() as stack:
        files: dict[Path, FileIO] = {}
        for i, place in enumerate(places):
            try:
                if place.shard not in files:
                    files[place.shard] = stack.enter_context(_open(place.shard))
                data = read_bytes(files[place.shard], place)
                name = f"{place.shard.name}: {place.key}"
                out[i] = load_image(data, decoding.preprocessing, name, draft=decoding.draft)
            except UserError as error:
                faults[i] = error
    return faults


def read_bytes(shard: FileIO, place: Place) -> bytes:
    """The payload of one sample, checked; several threads may read one shard.

    Raises:
        UserError: the shard cannot be read, ends before the sample does, or holds other bytes than were indexed.
    """
    try:
        data = os.pread(shard.fileno(), place.size, place.offset)
    except OSError as error:
        raise UserError(f"shard '{place.shard}' cannot be read: {error.strerror}; {_REMEDY}") from error
    if len(data) != place.size:
        raise UserError(f"shard '{place.shard}' is cut off inside sample '{place.key}'; {_REMEDY}")
    if zlib.crc32(data) != place.crc:
        raise UserError(f"sample '{place.key}' of shard '{place.shard}' is damaged: its CRC-32 is wrong; {_REMEDY}")
    return data


def _open(path: Path) -> FileIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise UserError(f"shard '{path}' cannot be opened: {error.strerror}; {_REMEDY}") from error


class _Ended(Exception):
    """A decoder process has ended; says how."""


class _Child:
    """The caller's end of one decoder process, which is started when it is needed, and anew when it has ended."""

    _pipe: Connection
    _pixels: NDArray[np.uint8]

    def __init__(self, decoding: Decoding, most: int) -> None:
        self._decoding = decoding
        self._shape = (most, *decoding.shape)
        self._process: subprocess.Popen[bytes] | None = None

    def decode(self, places: Sequence[Place], out: NDArray[np.uint8]) -> dict[int, UserError]:
        """As `decode_all`, in the process."""
        try:
            return self._ask(places, out)
        except _Ended:
            self.end()
        faults: dict[int, UserError] = {}
        for i, place in enumerate(places):  # again, each alone: which of them was it, if it was one of them
            try:
                for fault in self._ask([place], out[i : i + 1]).values():
                    faults[i] = fault
            except _Ended as how:
                self.end()
                faults[i] = UserError(
                    f"image '{place.shard.name}: {place.key}' brings its decoder down ({how}); replace the file, or "
                    "give the machine more memory if the system killed it"
                )
        return faults

    def end(self) -> None:
        """End the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._pipe.close()
            self._process = None

    def _ask(self, places: Sequence[Place], out: NDArray[np.uint8]) -> dict[int, UserError]:
        if self._process is None:
            self._start()
        task = json.dumps([(str(place.shard), *place[1:]) for place in places]).encode()
        faults: dict[str, str] = json.loads(self._exchange(task))
        out[:] = self._pixels[: len(places)]
        return {int(i): UserError(message) for i, message in faults.items()}

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        size = math.prod(self._shape)
        with theirs, _anonymous(size) as memory:
            self._pixels = np.frombuffer(mmap.mmap(memory.fileno(), size), np.uint8).reshape(self._shape)
            settings = json.dumps({"draft": self._decoding.draft, **self._decoding.preprocessing.model_dump()})
            handles = theirs.fileno(), memory.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __spec__.name, *map(str, handles), settings],
                stdin=subprocess.DEVNULL,
                pass_fds=handles,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), **dict.fromkeys(_THREADS, "1")},
            )
        self._pipe = Connection(ours.detach())
        try:
            self._exchange(b"")  # it answers when it has imported what it needs
        except _Ended as how:
            self.end()
            raise UserError(
                f"a process that decodes images does not start ({how}); see the log, or set data.decode_processes=0"
            ) from how

    def _exchange(self, task: bytes) -> bytes:
        try:
            if task:
                self._pipe.send_bytes(task)
            if self._pipe.poll(_PATIENCE_S):
                return self._pipe.recv_bytes()
        except (EOFError, OSError) as error:
            raise _Ended(self._how()) from error
        raise UserError(
            f"a process that decodes images has not answered for {_PATIENCE_S} s; is the file system with the data "
            "still there?"
        )

    def _how(self) -> str:
        assert self._process is not None
        self._process.kill()  # it has closed its end: no more than a moment is missing
        code = self._process.wait()
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _anonymous(size: int) -> FileIO:
    """Memory that two processes can map, without a name that anybody would have to remove."""
    with ExitStack() as stack:
        file = stack.enter_context(open(os.memfd_create("pixels"), "r+b", buffering=0))
        file.truncate(size)
        stack.pop_all()
        return file


def main() -> None:
    """The life of a decoder process: decode what comes, until the caller's end of the socket closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the whole group; the caller decides
    handle, memory, settings = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    decoding = Decoding(draft=settings.pop("draft"), preprocessing=Preprocessing(**settings))
    pixels_BCHW = np.frombuffer(mmap.mmap(memory, 0), np.uint8).reshape(-1, *decoding.shape)
    pipe = Connection(handle)
    with suppress(EOFError, OSError):
        pipe.send_bytes(b"ready")
        while True:
            places = [Place(Path(shard), *rest) for shard, *rest in json.loads(pipe.recv_bytes())]
            faults = decode_all(decoding, places, pixels_BCHW)
            pipe.send_bytes(json.dumps({i: str(fault) for i, fault in faults.items()}).encode())


if __name__ == "__main__":
    main()
