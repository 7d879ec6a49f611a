import os
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.data import decode as module
from trainer.data.decode import DecoderPool, Decoding
from trainer.data.image import Preprocessing, load_image
from trainer.errors import UserError

PIXELS = Preprocessing(mode="RGB", height=20, width=24)
DECODING = Decoding(PIXELS)


def photo(seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    file = BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size).save(file, "JPEG", quality=90)
    return file.getvalue()


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    return [photo(seed) for seed in range(70)]


def expected(files: list[bytes]) -> np.ndarray:
    return np.stack([load_image(file, PIXELS) for file in files])


def names(files: list[bytes]) -> list[str]:
    return [f"shard: {i}" for i in range(len(files))]


@pytest.mark.parametrize("processes", [0, 1, 3])
def test_any_number_of_processes_gives_the_same_pixels(files: list[bytes], processes: int):
    with DecoderPool(DECODING, threads=2, processes=processes) as decoders:
        for part in (files, files[:1], files[5:38]):
            pixels, faults = decoders.decode(names(part), lambda i, part=part: part[i])
            assert not faults
            np.testing.assert_array_equal(pixels, expected(part))
        pixels, faults = decoders.decode([], lambda i: b"")
        assert pixels.shape == (0, 3, 20, 24)


@pytest.mark.parametrize("processes", [0, 2])
def test_what_cannot_be_decoded_or_read_is_told_by_position(files: list[bytes], processes: int):
    bad = [*files[:40], files[40][:300], *files[41:60], b"no image"]

    def read(i: int) -> bytes:
        if i == 3:
            raise UserError("the shard is gone")
        return bad[i]

    with DecoderPool(DECODING, processes=processes) as decoders:
        pixels, faults = decoders.decode(names(bad), read)
    assert sorted(faults) == [3, 40, 60]
    assert str(faults[3]) == "the shard is gone"
    assert "image 'shard: 40' is damaged" in str(faults[40])
    assert "image 'shard: 60' is not an image" in str(faults[60])
    good = [i for i in range(61) if i not in faults]
    np.testing.assert_array_equal(pixels[good], expected([bad[i] for i in good]))


def children() -> list[int]:
    found = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "pid=,args="], capture_output=True, text=True)
    return [int(line.split()[0]) for line in found.stdout.splitlines() if "trainer.data.decode" in line]


def test_killed_processes_are_replaced(files: list[bytes]):
    with DecoderPool(DECODING, processes=2) as decoders:
        decoders.decode(names(files), lambda i: files[i])
        before = children()
        assert len(before) == 2
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        pixels, faults = decoders.decode(names(files), lambda i: files[i])
        assert not faults
        np.testing.assert_array_equal(pixels, expected(files))
        assert not set(before) & set(children())
    assert children() == []


def test_processes_killed_at_work_lose_nothing(files: list[bytes]):
    with DecoderPool(DECODING, processes=2) as decoders:
        decoders.decode(names(files), lambda i: files[i])
        doomed = children()

        def read(i: int) -> bytes:
            if i == 40 and doomed:
                os.kill(doomed.pop(), signal.SIGKILL)
            return files[i]

        for _ in range(2):
            pixels, faults = decoders.decode(names(files), read)
            assert not faults
            np.testing.assert_array_equal(pixels, expected(files))
        assert not doomed


def test_an_image_that_brings_decoders_down_is_named(files: list[bytes], monkeypatch: pytest.MonkeyPatch):
    """In the children `load_image` is that of a folder that comes first in the path: it kills itself over one image."""
    start = module._Child._start

    def start_under_a_knife(child: module._Child) -> None:
        monkeypatch.setattr(module, "__spec__", type("Spec", (), {"name": "knife"}))
        start(child)

    monkeypatch.setattr(module._Child, "_start", start_under_a_knife)
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "decoders"))
    deadly = [*files[:10], b"deadly", *files[10:20]]
    with DecoderPool(DECODING, processes=1) as decoders:
        pixels, faults = decoders.decode(names(deadly), lambda i: deadly[i])
    assert list(faults) == [10]
    assert "image 'shard: 10' brings its decoder down (signal SIGKILL); replace the file" in str(faults[10])
    np.testing.assert_array_equal(np.delete(pixels, 10, 0), expected(files[:20]))


def test_a_process_that_cannot_start_is_said(files: list[bytes], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "__spec__", type("Spec", (), {"name": "trainer.data.no_such_module"}))
    with (
        DecoderPool(DECODING, processes=1) as decoders,
        pytest.raises(UserError, match=r"at its start \(exit code 1\)"),
    ):
        decoders.decode(names(files), lambda i: files[i])
    monkeypatch.setattr(module.sys, "executable", "/no/such/python")
    with DecoderPool(DECODING, processes=1) as decoders, pytest.raises(UserError, match="does not start: No such file"):
        decoders.decode(names(files), lambda i: files[i])


def test_a_process_that_is_silent_is_said(files: list[bytes], monkeypatch: pytest.MonkeyPatch):
    with DecoderPool(DECODING, processes=1) as decoders:
        decoders.decode(names(files), lambda i: files[i])
        (pid,) = children()
        os.kill(pid, signal.SIGSTOP)
        monkeypatch.setattr(module, "_PATIENCE_S", 0.2)
        with pytest.raises(UserError, match=r"has not answered for 0\.2 s"):
            decoders.decode(names(files), lambda i: files[i])
    assert children() == []


def test_processes_end_with_their_caller(tmp_path: Path):
    code = f"""
import os, signal
from trainer.data.decode import DecoderPool, Decoding
from trainer.data.image import Preprocessing
decoders = DecoderPool(Decoding(Preprocessing(height=20, width=24)), processes=2)
file = bytes.fromhex("{photo(0).hex()}")
decoders.decode(["a"] * 64, lambda i: file)
print(*(child._process.pid for child in decoders._children), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    root = str(Path(__file__).parents[3])
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    pids = [int(pid) for pid in found.stdout.split()]
    assert len(pids) == 2, found.stderr
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}/cmdline").exists() and _alive(pid) for pid in pids):
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in pids)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_processes_import_no_torch():
    code = "import sys, trainer.data.decode; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3], check=True
    )
    assert "PIL" in found.stdout.split()
    assert not {"torch", "pyarrow", "ray", "webdataset"} & set(found.stdout.split())


def test_large_images_travel_few_at_a_time(files: list[bytes]):
    large = Decoding(Preprocessing(mode="RGB", height=1024, width=1024))
    with DecoderPool(large, processes=1) as decoders:
        assert decoders._together == 2
        pixels, faults = decoders.decode(names(files[:5]), lambda i: files[i])
    assert not faults
    np.testing.assert_array_equal(pixels[4], load_image(files[4], large.form))


@pytest.mark.parametrize("processes", [0, 1])
def test_drafts_differ_little_and_only_where_the_image_is_large(processes: int):
    smooth = np.asarray(Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)))
    image = Image.fromarray(smooth).resize((24 * 9, 20 * 9), Image.Resampling.BICUBIC)
    file = BytesIO()
    image.save(file, "JPEG", quality=95)
    data = [file.getvalue(), photo(1)]
    with DecoderPool(Decoding(PIXELS, draft=True), processes=processes) as decoders:
        pixels, faults = decoders.decode(["a", "b"], lambda i: data[i])
    assert not faults
    full = expected(data).astype(int)
    assert 0 < np.abs(pixels[0] - full[0]).mean() < 1.5
    assert np.abs(pixels[0] - full[0]).max() <= 16
    np.testing.assert_array_equal(pixels[1], full[1])  # 40 x 30 for 24 x 20: no draft
