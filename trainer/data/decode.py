"""Files of samples to pixels, beside the training: in threads, or in processes of their own. Runs without torch.

A decoder process is a program (`python -m trainer.data.decode`), not a fork and not a child of multiprocessing: it has
none of the caller's threads, locks, sockets and CUDA contexts, and the caller's main module is not run again in it. It
needs numpy and Pillow alone.

    a thread of the caller: reads files --names and sizes as JSON, then the files--> process
                            <-- pixels, in memory that both map; faults as JSON -----

A process that is killed is replaced, and its images are decoded again one by one, so that an image that brings decoders
down is found and named. A process ends when its caller does.
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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from multiprocessing.connection import Connection

import numpy as np
from pydantic import TypeAdapter

from trainer.data.arrays import Form, Pixels
from trainer.errors import UserError

_TOGETHER = 32  # images that a process gets at a time: the way there and back is short beside their decoding
_TOGETHER_BYTES = 8 * 2**20  # of their pixels
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # a decoder multiplies no matrices
_PATIENCE_S = 300  # without an answer: the machine is stuck
_FEWER = "look at the log, and lower data.decode_processes if there is too little memory (0: decode in threads)"
Faults = dict[int, UserError]  # what is wrong with which image, by position


@dataclass(frozen=True, slots=True)
class Decoding:
    """How files become pixels: `draft` as for `load_image`."""

    form: Form
    draft: bool = False

    def room(self, samples: int) -> Pixels:
        """For so many samples."""
        return np.empty((samples, *self.form.shape_CHW), self.form.dtype)

    @property
    def sample_bytes(self) -> int:
        """Of the pixels of one sample."""
        return math.prod(self.form.shape_CHW) * self.form.dtype.itemsize

    def __call__(self, names: Sequence[str], files: Sequence[bytes], out_BCHW: Pixels) -> Faults:
        """Decode files, here and now, into the first of `out_BCHW`; `names` are what messages call them."""
        faults: Faults = {}
        for i, (name, file) in enumerate(zip(names, files, strict=True)):
            try:
                out_BCHW[i] = self.form.load(file, name, draft=self.draft)
            except UserError as error:
                faults[i] = error
        return faults


class DecoderPool:
    """Decodes in `processes`, or, where there are none, in `threads` of the caller. Use it in a `with` block.

    Processes are started when the first image is to be decoded, not before, and ended with the block.
    """

    def __init__(self, decoding: Decoding, *, threads: int = 2, processes: int = 0) -> None:
        self._decoding = decoding
        most = max(1, min(_TOGETHER, _TOGETHER_BYTES // decoding.sample_bytes))
        self._together = most if processes else 1
        # Two more threads than processes: they read the files that the next process to be free will decode.
        self._threads = ThreadPoolExecutor(processes + 2 if processes else threads, "decode")
        self._children = [_Child(decoding, most) for _ in range(processes)]
        self._free: queue.SimpleQueue[_Child] = queue.SimpleQueue()
        for child in self._children:
            self._free.put(child)

    def __enter__(self) -> "DecoderPool":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        for child in self._children:
            child.end()

    def decode(self, names: Sequence[str], read: Callable[[int], bytes]) -> tuple[Pixels, Faults]:
        """Pixels [len(names), C, H, W]; and, by position, what is wrong with those that have none.

        Args:
            names: what messages call the images.
            read: the file of the image at a position; called in several threads. It may raise a UserError.

        Raises:
            UserError: a process cannot be started, or does not answer.
        """
        pixels_BCHW = self._decoding.room(len(names))
        faults: Faults = {}
        starts = range(0, len(names), self._together)
        for found in self._threads.map(partial(self._part, names, read, pixels_BCHW), starts):
            faults |= found
        return pixels_BCHW, faults

    def _part(self, names: Sequence[str], read: Callable[[int], bytes], pixels_BCHW: Pixels, start: int) -> Faults:
        faults: Faults = {}
        files: list[bytes] = []
        names = names[start : start + self._together]
        for i in range(len(names)):
            try:
                files.append(read(start + i))
            except UserError as error:
                faults[i] = error
                files.append(b"")
        found = self._decode(names, files, pixels_BCHW[start : start + len(names)])
        return {start + i: fault for i, fault in (found | faults).items()}

    def _decode(self, names: Sequence[str], files: Sequence[bytes], out_BCHW: Pixels) -> Faults:
        if not self._children:
            return self._decoding(names, files, out_BCHW)
        child = self._free.get()
        try:
            return child.decode(names, files, out_BCHW)
        finally:
            self._free.put(child)


class _Ended(Exception):
    """A decoder process has ended; says how."""


class _Child:
    """The caller's end of one decoder process, which is started when it is needed, and anew when it has ended."""

    _pipe: Connection
    _pixels_BCHW: Pixels

    def __init__(self, decoding: Decoding, most: int) -> None:
        self._decoding = decoding
        self._most = most
        self._process: subprocess.Popen[bytes] | None = None

    def decode(self, names: Sequence[str], files: Sequence[bytes], out_BCHW: Pixels) -> Faults:
        """As a `Decoding`, in the process."""
        try:
            return self._ask(names, files, out_BCHW)
        except _Ended:
            self.end()
        faults: Faults = {}
        for i, name in enumerate(names):  # again, each alone: which of them was it, if it was one of them
            try:
                found = self._ask([name], [files[i]], out_BCHW[i : i + 1])
            except _Ended as how:
                self.end()
                told = f"image '{name}' brings its decoder down ({how}); replace the file"
                found = {0: UserError(f"{told}, or give the machine more memory if the system killed the process")}
            if found:
                faults[i] = found[0]
        return faults

    def end(self) -> None:
        """End the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._pipe.close()
            self._process = None

    def _ask(self, names: Sequence[str], files: Sequence[bytes], out_BCHW: Pixels) -> Faults:
        if self._process is None:
            self._start()
        task = json.dumps([names, [len(file) for file in files]]).encode()
        faults: dict[str, str] = json.loads(self._exchange(task, b"".join(files)))
        out_BCHW[:] = self._pixels_BCHW[: len(names)]
        return {int(i): UserError(message) for i, message in faults.items()}

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        memory = os.memfd_create("pixels")  # has no name that anybody would have to remove
        try:
            os.truncate(memory, self._most * self._decoding.sample_bytes)
            self._pixels_BCHW = _mapped(memory, self._decoding)
            settings = self._decoding.form.model_dump_json()
            handles = [str(theirs.fileno()), str(memory)]
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __spec__.name, *handles, str(int(self._decoding.draft)), settings],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), memory],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), **dict.fromkeys(_THREADS, "1")},
            )
        except OSError as error:
            ours.close()
            raise UserError(f"a process that decodes images does not start: {error.strerror}; {_FEWER}") from error
        finally:
            theirs.close()
            os.close(memory)
        self._pipe = Connection(ours.detach())
        try:
            self._exchange()  # it answers when it has imported what it needs
        except _Ended as how:
            self.end()
            raise UserError(f"a process that decodes images ended at its start ({how}); {_FEWER}") from how

    def _exchange(self, *messages: bytes) -> bytes:
        try:
            for message in messages:
                self._pipe.send_bytes(message)
            if self._pipe.poll(_PATIENCE_S):
                return self._pipe.recv_bytes()
        except (EOFError, OSError) as error:
            raise _Ended(self._how()) from error
        raise UserError(f"a process that decodes images has not answered for {_PATIENCE_S} s; {_FEWER}")

    def _how(self) -> str:
        assert self._process is not None
        self._process.kill()  # where it lives on without its end of the socket
        code = self._process.wait()
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _mapped(memory: int, decoding: Decoding) -> Pixels:
    pixels: Pixels = np.frombuffer(mmap.mmap(memory, 0), decoding.form.dtype)
    return pixels.reshape(-1, *decoding.form.shape_CHW)


def main() -> None:
    """The life of a decoder process: decode what comes, until the caller's end of the socket closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the whole group; the caller decides
    handle, memory, draft, settings = sys.argv[1:]
    form: Form = TypeAdapter(Form).validate_json(settings)
    decoding = Decoding(form, draft == "1")
    pixels_BCHW = _mapped(int(memory), decoding)
    pipe = Connection(int(handle))
    with suppress(EOFError, OSError):
        pipe.send_bytes(b"ready")
        while True:
            names, sizes = json.loads(pipe.recv_bytes())
            stream = BytesIO(pipe.recv_bytes())
            files = [stream.read(size) for size in sizes]
            faults = decoding(names, files, pixels_BCHW)
            pipe.send_bytes(json.dumps({i: str(fault) for i, fault in faults.items()}).encode())


if __name__ == "__main__":
    main()
