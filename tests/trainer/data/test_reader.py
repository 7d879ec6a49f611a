"""Reading samples by position, and work that runs ahead of its use; more of reading is tested with the stream."""

import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.data.image import Preprocessing
from trainer.data.importers.run import ImportOptions, run_import
from trainer.data.manifest import Manifest
from trainer.data.reader import Reader, ahead, check_sizes
from trainer.errors import UserError

PIXELS = Preprocessing(mode="L", height=12, width=12)


@pytest.fixture
def copy(tmp_path: Path, data_set: Path) -> Path:
    return Path(shutil.copytree(data_set, tmp_path / "copy"))


def test_size_check_names_the_shard(copy: Path):
    split = Manifest.read(copy).split("train")
    check_sizes(split)
    path = copy / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(UserError, match=r"train-000001\.tar' has \d+ bytes, but the manifest says \d+; .*import"):
        check_sizes(split)
    path.unlink()
    with pytest.raises(UserError, match=r"train-000001\.tar' cannot be read: No such file"):
        check_sizes(split)


def test_shard_cut_off_after_the_start_is_named(copy: Path):
    reader = Reader(Manifest.read(copy).split("train"), PIXELS)
    path = copy / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:512])
    with (
        reader.pool() as pool,
        pytest.raises(UserError, match=r"train-000001\.tar' is cut off inside sample '000000012'"),
    ):
        reader.read(np.array([12]), pool)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_every_flipped_bit_is_noticed(tmp_path: Path, form: str):
    """Most flipped bits of a JPEG decode to other pixels without complaint, so that the decoder notices few of them."""
    random = np.random.default_rng(0)
    for number in range(200):
        path = tmp_path / "in" / f"who{number % 4}" / f"{number}.{form.lower()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).resize((24, 24)).save(path, form)
    manifest = run_import("folder", tmp_path / "in", tmp_path / "set", ImportOptions(holdout_share=0))
    split = manifest.split("train")
    reader, index, path = Reader(split, PIXELS), split.index(0), split.path(0)
    whole = path.read_bytes()
    decodable = 0
    with reader.pool() as pool:
        reader.read(np.arange(200), pool)
        for row, (offset, size, *_) in enumerate(index.records.tolist()):
            data = bytearray(whole)
            data[offset + random.integers(size)] ^= 1 << random.integers(8)
            path.write_bytes(data)
            with pytest.raises(UserError, match=f"sample '{row:09d}' of shard .*train-000000.tar' is damaged: its CRC"):
                reader.read(np.array([row]), pool)
            decodable += _decodes(bytes(data[offset : offset + size]))
    assert (decodable > 100) == (form == "JPEG")  # what a decoder alone would have let pass


def _decodes(data: bytes) -> bool:
    try:
        Image.open(BytesIO(data)).load()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def test_results_come_in_order_and_only_so_many_ahead():
    begun: list[int] = []
    asked = 0

    def work(number: int) -> int:
        begun.append(number)
        assert number <= asked + 3  # the one that is waited for, and two results that wait to be fetched
        return number * number

    found = []
    for result in ahead(work, range(20), threads=4, most=2):
        found.append(result)
        asked += 1
    assert found == [number * number for number in range(20)]
    assert sorted(begun) == list(range(20))


def test_an_error_comes_at_its_item():
    def work(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number

    results = ahead(work, range(100), threads=2, most=50)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
