"""Decodes the images of a request in a child process, which can be stopped, and finds the faces in them there.

A crafted image of a few kilobytes can keep a decoder busy for minutes or fill the memory, and a thread inside a decoder
cannot be stopped. So a few children decode, one request at a time each, under limits that the kernel keeps: a timer of
its CPU ends a child that takes too long, and no child gets more memory than its share. A child that ends costs the
request it was busy with. The next one is forked, in milliseconds, from a server process that has the libraries loaded
and was started clean: no child has the service's sockets or files. Children end with the service, however it ends.

Over the pipe go JSON and raw bytes, one image at a time: of a photograph only its faces, in the model's size. Nothing
that a child sends is unpickled.
"""

import atexit
import contextlib
import json
import logging
import math
import multiprocessing
import os
import queue
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import UnidentifiedImageError

from serving.images.looking import Looker, Picture, Seen
from trainer.data.image import OutOfMemory, Preprocessing, TooManyPixels, decode
from trainer.errors import UserError

log = logging.getLogger("hypersphere.serving")
# What a child need not import: Pillow's readers, which it would at the first image that is none of the usual, and the
# command line, since a child runs the imports of the service's main script again.
_LOADED = [__name__, "serving.cli", *(f"PIL.{reader}" for reader in PIL._plugins)]
_GRACE_S = 5  # by the clock, on top: a child silent for longer does not compute, and is killed
_MAX_NOTE = 128 * 2**10  # bytes of JSON in an answer: some 500 a face


@dataclass(frozen=True)
class Limits:
    """What one request may cost.

    Attributes:
        seconds: of CPU, all its images together, so that a busy machine refuses no honest image.
        pixels: width x height, all its images together.
        memory_bytes: by which a child may grow.
        detect_seconds: of CPU, on top, to find the faces of one image and judge them.
        faces: of one image, the largest; more are left out.
    """

    seconds: float = 1.8  # with all that a request costs besides, less than two seconds
    pixels: int = 16_000_000
    memory_bytes: int = 172 * 2**20  # and the file, twice in the service: less than 200 MB
    detect_seconds: float = 1.0
    faces: int = 16


@dataclass
class ImageRefused(ValueError):
    """An image that cannot be used.

    Attributes:
        number: its place in the request, from 0.
        code: not_an_image, bad_image, too_many_pixels or decoding_too_long.
        message: one sentence for the client.
    """

    number: int
    code: str
    message: str


class DecodersClosed(RuntimeError):
    """The service is stopping."""

    def __init__(self) -> None:
        super().__init__("the service is stopping; no image is decoded any more")


class Decoders:
    """The children. `decode` may be called from several threads; as many as there are children work at a time."""

    def __init__(
        self, preprocessing: Preprocessing, processes: int, limits: Limits, detector: Path | None = None
    ) -> None:
        """Start the children in the background; the first request waits for one.

        Args:
            preprocessing: how the model wants its pixels.
            processes: requests that are decoded at the same time.
            detector: folder of the one that finds faces; None: images are taken whole.
        """
        self._children = [_Child(preprocessing, limits, detector) for _ in range(processes)]
        self._free: queue.SimpleQueue[_Child] = queue.SimpleQueue()
        self._wanted, self._counting = 0, threading.Lock()
        for child in self._children:
            self._free.put(child)
        atexit.register(self.close)  # multiprocessing waits for its children before the interpreter ends
        threading.Thread(target=self._warm, name="decoders", daemon=True).start()

    @property
    def waiting(self) -> int:
        """Requests that wait for a child."""
        return self._wanted

    def decode(self, images: Sequence[bytes], names: Sequence[str]) -> list[Picture]:
        """A request's images as the model sees them.

        Args:
            images: files.
            names: what messages call them.

        Raises:
            ImageRefused: the first image that cannot be used, or with which the request costs more than it may.
            DecodersClosed: `close` was called, before or meanwhile.
        """
        with self._one() as child:
            return child.decode(images, names)

    def close(self) -> None:
        """Kill the children, whatever they are doing."""
        for child in self._children:
            child.close()
        atexit.unregister(self.close)

    @contextlib.contextmanager
    def _one(self) -> Iterator["_Child"]:
        with self._counting:
            self._wanted += 1
        child = self._free.get()
        with self._counting:
            self._wanted -= 1
        try:
            child.start()
            yield child
        finally:
            if not child.reusable:
                child.end()
            self._free.put(child)

    def _warm(self) -> None:
        try:
            for _ in self._children:
                with self._one():
                    pass
        except DecodersClosed:
            pass
        except OSError as error:
            log.warning("a process that decodes images does not start: %s", error)


class _Child:
    """The service's end of one child, which is started when it is needed, and anew when the one before has ended."""

    _pipe: Connection

    def __init__(self, preprocessing: Preprocessing, limits: Limits, detector: Path | None) -> None:
        self._preprocessing, self._limits, self._detector = preprocessing, limits, detector
        self._lock, self._closed = threading.Lock(), False
        self._process: BaseProcess | None = None
        self.reusable = True

    def start(self) -> None:
        """Start a process, unless one waits for work. Raises DecodersClosed."""
        # A child that waits for work sends nothing; what can be read is the pipe's end.
        if self._process is not None and self._pipe.poll():
            self.end()
        with self._lock:  # close() waits: it finds the process, or none is started
            if self._closed:
                raise DecodersClosed
            if self._process is None:
                context = multiprocessing.get_context("forkserver")
                finder = [] if self._detector is None else ["trainer.detection.detector"]
                context.set_forkserver_preload(_LOADED + finder)
                self._pipe, theirs = context.Pipe()
                arguments = theirs, self._preprocessing, self._limits, self._detector
                process = context.Process(target=_serve, args=arguments, daemon=True)
                with theirs:
                    process.start()
                self._process, self.reusable = process, True

    def close(self) -> None:
        """Kill the process, and start none any more."""
        with self._lock:
            self._closed = True
            self._kill()

    def end(self) -> None:
        """Kill the process."""
        with self._lock:
            self._kill()
            self._process = None
            self._pipe.close()

    def _kill(self) -> None:
        if self._process is not None and self._process.is_alive():
            self._process.kill()

    def decode(self, images: Sequence[bytes], names: Sequence[str]) -> list[Picture]:
        """As `Decoders.decode`. Afterwards, `reusable` says whether the process can have another request."""
        seconds, pixels = self._limits.seconds, self._limits.pixels
        pictures = []
        for number, (image, name) in enumerate(zip(images, names, strict=True)):
            started = time.monotonic()
            try:
                note, raw = self._ask({"name": name, "seconds": seconds, "pixels": pixels}, image)
            except (EOFError, OSError) as error:
                least = seconds if self._detector is None else min(seconds, self._limits.detect_seconds)
                raise self._ended(number, name, time.monotonic() - started >= least) from error
            if "code" in note:
                raise ImageRefused(number, note["code"], note["message"])
            seen = [Seen.model_validate(one) for one in note["seen"]]
            pixels_FCHW = np.frombuffer(raw, np.uint8).reshape(len(seen), *self._preprocessing.shape_CHW)
            pictures.append(Picture(seen, pixels_FCHW, note["left_out"], tuple(note["size"]), note["detect_s"]))
            seconds, pixels = note["seconds"], note["pixels"]
        return pictures

    def _ask(self, task: dict[str, Any], image: bytes) -> tuple[dict[str, Any], bytes]:
        """Have one image decoded: what the child says of it, and its pixels if there is no "code" of a fault."""
        self.reusable = False
        self._pipe.send_bytes(json.dumps(task).encode())
        self._pipe.send_bytes(image)
        if not self._pipe.poll(task["seconds"] + self._limits.detect_seconds + _GRACE_S):
            raise EOFError
        note: dict[str, Any] = json.loads(self._pipe.recv_bytes(_MAX_NOTE))
        most = max(1, self._limits.faces) * math.prod(self._preprocessing.shape_CHW)
        raw = b"" if "code" in note else self._pipe.recv_bytes(most)
        # What the libraries keep for themselves, or lose, would be missing from the next image's share.
        self.reusable = note["grown"] < self._limits.memory_bytes // 4
        return note, raw

    def _ended(self, number: int, name: str, late: bool) -> ImageRefused | DecodersClosed:
        if self._closed:
            return DecodersClosed()
        if not late:
            message = f"image '{name}' is damaged: its decoder broke down over it; replace the file"
            return ImageRefused(number, "bad_image", message)
        told = f"image '{name}' was not decoded in time: the images of a request may take {self._limits.seconds:g} s"
        faces = "" if self._detector is None else f", and the faces of one {self._limits.detect_seconds:g} s"
        advice = "send it smaller, as PNG or as JPEG without progressive coding"
        return ImageRefused(number, "decoding_too_long", f"{told} together{faces}; {advice}")


def _serve(pipe: Connection, preprocessing: Preprocessing, limits: Limits, detector: Path | None) -> None:
    """The life of a child: decode what comes, until the pipe ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal or an init system sends them to the whole group
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # where memory runs out, better this than the service
    looker = Looker(preprocessing, detector, limits.faces)
    _hush()
    before = _memory()
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = before + limits.memory_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    with contextlib.suppress(EOFError, OSError):  # the service has ended, perhaps in the middle of an image
        while True:
            task, image = json.loads(pipe.recv_bytes()), pipe.recv_bytes()
            signal.setitimer(signal.ITIMER_PROF, max(task["seconds"], 0.001))  # nobody handles SIGPROF: it kills
            note, raw = _look(image, task, looker, limits)
            left, _ = signal.setitimer(signal.ITIMER_PROF, 0)
            del image
            pipe.send_bytes(json.dumps({"seconds": left, "grown": _memory() - before, **note}).encode())
            if "code" not in note:
                pipe.send_bytes(raw)


def _hush() -> None:
    """What Pillow and libtiff say of strangers' files would fill the log; a fault of this file still comes through."""
    warnings.simplefilter("ignore")
    sys.stderr = os.fdopen(os.dup(2), "w")
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)


def _memory() -> int:
    """Bytes that count for RLIMIT_DATA; 0 where the system does not tell, and hardly keeps that limit either."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    except FileNotFoundError:
        return 0


def _look(image: bytes, task: dict[str, Any], looker: Looker, limits: Limits) -> tuple[dict[str, Any], bytes]:
    name, pixels = task["name"], task["pixels"]
    try:
        found = decode(image, name, pixels).image
        note: dict[str, Any] = {"pixels": pixels - found.width * found.height}
        if looker.finds_faces:
            note["seconds"], _ = signal.setitimer(signal.ITIMER_PROF, limits.detect_seconds)
        picture = looker.look(found)
        seen = [one.model_dump(exclude_none=True) for one in picture.seen]
        note |= {"seen": seen, "left_out": picture.left_out, "size": picture.size, "detect_s": picture.detect_s}
        return note, picture.pixels_FCHW.tobytes()
    except TooManyPixels as error:
        if error.pixels > limits.pixels:
            message = str(TooManyPixels(error.label, error.found, error.pixels, limits.pixels))
        else:
            message = (
                f"{error.label} has {error.found}, which with the images before it are more than the "
                f"{limits.pixels:,} that a request may have; send them smaller, or in several requests"
            )
        return {"code": "too_many_pixels", "message": message}, b""
    except (OutOfMemory, MemoryError):
        message = f"image '{name}' needs more than {limits.memory_bytes >> 20} MiB of memory to decode; send it smaller"
        return {"code": "too_many_pixels", "message": message}, b""
    except UserError as error:
        unknown = isinstance(error.__cause__, UnidentifiedImageError)
        return {"code": "not_an_image" if unknown else "bad_image", "message": str(error)}, b""
