"""Decoding in children: the same pixels as without, and whatever the image, nothing worse than a refusal."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from serving.images.decoding import Decoders, DecodersClosed, ImageRefused, Limits
from tests.serving.hostile.images import ATTACKS, MANY_PIXELS, encode, good, scans, webp_frames
from trainer.data.image import FORMATS, Preprocessing, load_image

LONG = os.environ.get("HOSTILE") == "long"
FORM = Preprocessing(mode="RGB", height=24, width=20)
SLOW = ATTACKS["ppm: a comment of ten megabytes"]()
# Each of these takes its full time: a short run has the other attacks, and one more in `SLOW`.
ENDED_BY_THE_ALARM = {
    *("jpeg: arithmetic scans", "png: iCCP over and over", "png: small chunks", "png: small chunks after the pixels"),
    *("ppm: text", "ppm: 10-bit values", "ppm: a comment of ten megabytes", "ppm: blanks"),
}
CPU_TICK = os.sysconf("SC_CLK_TCK")


@pytest.fixture
def open_decoders() -> Iterator[Callable[..., Decoders]]:
    opened: list[Decoders] = []

    def open_one(processes: int = 1, **limits: float) -> Decoders:
        opened.append(Decoders(FORM, processes, Limits(**limits)))
        return opened[-1]

    yield open_one
    for decoders in opened:
        decoders.close()


@pytest.fixture
def decoders(open_decoders: Callable[..., Decoders]) -> Decoders:
    return open_decoders()


def pixels_of(decoders: Decoders, images: list[bytes], names: list[str]) -> np.ndarray:
    return np.concatenate([picture.pixels_FCHW for picture in decoders.decode(images, names)])


def children(decoders: Decoders) -> list[int]:
    """Process numbers; starts a child if none has been started."""
    pixels_of(decoders, [good("PNG")], ["good"])
    return [child._process.pid for child in decoders._children if child._process is not None]


class Cost:
    """Watches a process: its CPU seconds and the bytes by which it grew, also when it is killed."""

    def __init__(self, process: int) -> None:
        self._process, self._over = process, threading.Event()
        self._first = self._last = measured(process)
        self._watcher = threading.Thread(target=self._watch)

    def __enter__(self) -> "Cost":
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watcher.join()
        self.cpu_s = self._last[0] - self._first[0]
        self.grown = self._last[1] - self._first[1]

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self._last = measured(self._process) or self._last
        self._last = measured(self._process) or self._last


def measured(process: int) -> tuple[float, int] | None:
    """CPU seconds and the most memory so far; None when it has ended."""
    folder = Path("/proc") / str(process)
    try:
        times = (folder / "stat").read_text().rpartition(")")[2].split()[11:13]
        peak = re.search(r"VmHWM:\s+(\d+)", (folder / "status").read_text())
    except OSError:
        return None
    return (sum(map(int, times)) / CPU_TICK, int(peak[1]) * 1024) if peak else None


def busy(processes: Collection[int], before: dict[int, float]) -> int:
    """Waits until one of them has worked for a tenth of a second, and tells which."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for process in processes:
            now = measured(process)
            if now is not None and now[0] > before[process] + 0.1:
                return process
        time.sleep(0.01)
    raise AssertionError(f"none of {processes} works")


def cpu_s(processes: Collection[int]) -> dict[int, float]:
    return {process: (measured(process) or (0.0, 0))[0] for process in processes}


def wait_for_end(*processes: int) -> None:
    end = time.monotonic() + 60
    while any(Path(f"/proc/{process}").exists() for process in processes):
        assert time.monotonic() < end, f"{processes} do not end"
        time.sleep(0.01)


def refusal(decoders: Decoders, *images: bytes) -> ImageRefused:
    with pytest.raises(ImageRefused) as caught:
        pixels_of(decoders, images, [f"images {number}" for number in range(1, len(images) + 1)])
    return caught.value


def test_pixels_are_those_that_training_sees(decoders: Decoders):
    images = [good(format, side) for format in FORMATS for side in (3, 24, 90)]
    pixels_BCHW = pixels_of(decoders, images, ["image"] * len(images))
    assert pixels_BCHW.dtype == np.uint8
    np.testing.assert_array_equal(pixels_BCHW, np.stack([load_image(image, FORM) for image in images]))


def test_many_threads_get_their_own_pixels(open_decoders: Callable[..., Decoders]):
    decoders = open_decoders(processes=2)
    images = [encode(Image.new("RGB", (8, 8), (shade, 0, 0)), "PNG") for shade in range(64)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda image: pixels_of(decoders, [image], ["image"]), images))
    assert [int(pixels_BCHW[0, 0, 0, 0]) for pixels_BCHW in answers] == list(range(64))


@pytest.mark.parametrize(
    ("make", "code", "words"),
    [
        (lambda: b"hello", "not_an_image", "not an image in an allowed format"),
        (lambda: good("PNG")[:200], "bad_image", "damaged"),
        (MANY_PIXELS["png"], "too_many_pixels", "at most 16,000,000 pixels are read"),
        (partial(scans, 200, 3900), "bad_image", "200 scans of 3900 x 3900 pixels.* may have 65"),
        (partial(webp_frames, 1, 3900), "too_many_pixels", "needs more than 172 MiB of memory"),
    ],
    ids=["text", "cut", "pixels", "scans", "memory"],
)
def test_refusal_names_the_image_and_the_reason(decoders: Decoders, make: Callable[[], bytes], code: str, words: str):
    error = refusal(decoders, good("PNG"), make(), good("PNG"))
    assert (error.number, error.code) == (1, code)
    assert re.match(f"image 'images 2' .*{words}", error.message)
    assert pixels_of(decoders, [good("JPEG")], ["good"]).shape == (1, 3, 24, 20)


def test_pixels_of_a_request_are_counted_together(open_decoders: Callable[..., Decoders]):
    decoders = open_decoders(pixels=1000)
    image = good("PNG", 20)
    assert pixels_of(decoders, [image] * 2, ["image"] * 2).shape[0] == 2
    error = refusal(decoders, image, image, image)
    assert (error.number, error.code) == (2, "too_many_pixels")
    assert "20 x 20 pixels, which with the images before it" in error.message
    assert "1,000 that a request may have" in error.message


def test_time_of_a_request_is_counted_together(open_decoders: Callable[..., Decoders]):
    decoders = open_decoders(seconds=1, pixels=10**9)
    image = ATTACKS["gif: 16 MP screen, tiny frame"]()  # about 0.1 s
    error = refusal(decoders, *[image] * 100)
    assert (error.code, "may take 1 s together" in error.message) == ("decoding_too_long", True)
    assert 1 <= error.number < 99
    assert pixels_of(decoders, [good("PNG")], ["good"]).shape[0] == 1


def test_a_child_that_dies_costs_its_own_request_only(open_decoders: Callable[..., Decoders]):
    decoders = open_decoders(processes=2, seconds=60)
    with ThreadPoolExecutor(1) as pool:
        both = {*children(decoders), *children(decoders)}
        before = cpu_s(both)
        answer = pool.submit(refusal, decoders, SLOW)
        at_work = busy(both, before)
        assert pixels_of(decoders, [good("PNG")], ["good"]).shape[0] == 1
        os.kill(at_work, signal.SIGKILL)
        error = answer.result(timeout=60)
    assert (error.code, error.message) == (
        "bad_image",
        "image 'images 1' is damaged: its decoder broke down over it; replace the file",
    )
    assert pixels_of(decoders, [good("PNG")], ["good"]).shape[0] == 1


def test_a_child_that_died_while_it_waited_costs_nothing(decoders: Decoders):
    (before,) = children(decoders)
    os.kill(before, signal.SIGKILL)
    wait_for_end(before)
    (after,) = children(decoders)
    assert before != after


def test_close_ends_what_is_under_way_and_what_waits(open_decoders: Callable[..., Decoders]):
    decoders = open_decoders(seconds=60)
    (child,) = children(decoders)
    before = cpu_s([child])
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(decoders.decode, [SLOW], ["slow"]) for _ in range(3)]
        busy([child], before)
        decoders.close()
        decoders.close()
        for answer in answers:
            assert isinstance(answer.exception(timeout=60), DecodersClosed)
    with pytest.raises(DecodersClosed):
        pixels_of(decoders, [good("PNG")], ["late"])
    wait_for_end(child)


def test_large_images_of_every_usual_kind_fit_one_after_the_other(open_decoders: Callable[..., Decoders]):
    """Of 15 MP each: turned by EXIF with transparency, 16-bit grey, and progressive. Nothing kept is missing later."""
    decoders, side = open_decoders(seconds=60), 3900
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    clear = Image.new("RGBA", (side, side), (10, 20, 30, 40))
    images = [
        encode(clear, "PNG", compress_level=1, exif=exif),
        encode(Image.fromarray(np.full((side, side), 7000, np.uint16)), "PNG", compress_level=1),
        encode(clear.convert("RGB"), "JPEG", progressive=True),
    ]
    for image in images:
        assert pixels_of(decoders, [image], ["large"]).shape[0] == 1


HOST = """
import os, socket, sys, tempfile, threading, time
from serving.images.decoding import Decoders, Limits
from tests.serving.hostile.images import ATTACKS, encode, good
from tests.serving.images.test_decoding import FORM, SLOW, busy, children, cpu_s
listener = socket.create_server(("127.0.0.1", 0))
store = open(sys.argv[1], "w")
for number in (listener.fileno(), store.fileno()):
    os.set_inheritable(number, True)
decoders = Decoders(FORM, 1, Limits(seconds=3))
(child,) = children(decoders)
kept = [os.readlink(f"/proc/{child}/fd/{number}") for number in os.listdir(f"/proc/{child}/fd")]
if f"socket:[{os.fstat(listener.fileno()).st_ino}]" in kept or sys.argv[1] in kept:
    sys.exit(f"the child has {kept}")
for name in ("tiff: a strip of 4 gigabytes", "jpeg: exif of overlapping tags", "tiff: 65,535 tags"):
    try:
        decoders.decode([ATTACKS[name]()], [name])
    except ValueError:
        pass
(child,) = children(decoders)
before = cpu_s([child])
threading.Thread(target=decoders.decode, args=([SLOW], ["slow"])).start()
busy([child], before)
print(child, open(f"/proc/{child}/stat").read().rpartition(")")[2].split()[1], flush=True)
time.sleep(100)
"""


def test_children_are_clean_quiet_and_end_with_the_service(tmp_path: Path):
    """Killed by -9 with a child at work: the child and the server that forks them end by themselves."""
    host = subprocess.Popen(
        [sys.executable, "-c", HOST, str(tmp_path / "store")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert host.stdout is not None
    try:
        line = host.stdout.readline()
    finally:
        host.kill()
        _, told = host.communicate(timeout=60)
    assert not told
    left = [int(number) for number in line.split()]
    assert len(left) == 2
    wait_for_end(*left)


@pytest.mark.parametrize("name", [name for name in [*ATTACKS, *MANY_PIXELS] if LONG or name not in ENDED_BY_THE_ALARM])
def test_an_attack_costs_little_and_the_next_image_is_decoded(decoders: Decoders, name: str):
    image = (ATTACKS | MANY_PIXELS)[name]()
    (child,) = children(decoders)
    with Cost(child) as cost:
        try:
            assert pixels_of(decoders, [image], ["crafted"]).shape == (1, 3, 24, 20)
            answer = "pixels"
        except ImageRefused as error:
            answer = error.code
    assert cost.cpu_s <= 2
    assert cost.grown <= 200e6
    assert answer == "too_many_pixels" or name not in MANY_PIXELS
    assert pixels_of(decoders, [good("PNG")], ["good"]).shape[0] == 1


@pytest.mark.parametrize("format", FORMATS)
def test_mutated_images_give_pixels_or_a_refusal(decoders: Decoders, format: str):
    random = np.random.default_rng(FORMATS.index(format))
    whole = bytearray(good(format))
    for _ in range(5000 if LONG else 200):
        image = bytearray(whole)
        for _ in range(random.integers(1, 6)):
            image[random.integers(len(image))] = random.integers(256)
        cut = random.integers(1, len(image)) if random.random() < 0.3 else len(image)
        with contextlib.suppress(ImageRefused):
            assert pixels_of(decoders, [bytes(image[:cut])], ["mutated"]).shape == (1, 3, 24, 20)
    assert pixels_of(decoders, [bytes(whole)], ["good"]).shape == (1, 3, 24, 20)
