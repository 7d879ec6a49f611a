"""The records of RecordIO files, written byte by byte from the description of the format."""

import contextlib
import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.peak import at_most
from tests.trainer.data.importers.recordio_files import MAGIC, content, part, record
from trainer.data.importers.records import RecordHead, Records
from trainer.errors import UserError


def saved(folder: Path, data: bytes) -> Path:
    path = folder / "train.rec"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "image",
    [b"", b"x", b"four", MAGIC, MAGIC * 3, b"abcd" + MAGIC + b"efgh" + MAGIC + b"ij", b"ab" + MAGIC + b"cd"],
)
@pytest.mark.parametrize("label", [7.0, [7.0], [7.0, 0.5, 2.0]])
def test_images_and_labels_come_back(tmp_path: Path, image: bytes, label: float | list[float]):
    first = record(content(3.0, b"before"))
    records = Records(saved(tmp_path, first + record(content(label, image))))
    assert list(records.offsets()) == [0, len(first)]
    assert records.image(len(first)) == image
    assert records.head(len(first)) == RecordHead(0 if label == 7.0 else len(label), 7.0, len(image))


def test_a_label_whose_bytes_are_the_magic_number(tmp_path: Path):
    """The number may even stand in the header, which is then cut in two."""
    (label,) = struct.unpack("<f", MAGIC)
    records = Records(saved(tmp_path, record(content(label, b"image"))))
    assert records.head(0) == RecordHead(0, label, 5)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (record(content(1.0, b"image"))[:-4], "ends at byte 36, inside the record at byte 0"),
        (record(content(1.0, b"image"))[:6], "ends at byte 6, inside the record at byte 0"),
        (b"plain text that is no record", "no record at byte 0"),
        (part(1, b"first"), "ends at byte 16, inside the record at byte 16"),
        (part(2, b"middle"), "no record at byte 0"),
        (part(1, b"first") + part(0, b"whole"), "no record at byte 16"),
        (part(0, b"short"), "no record at byte 0"),
        (part(0, struct.pack("<IfQQ", 2, 0, 0, 0)), "no record at byte 0"),
        (part(0, struct.pack("<IfQQ", 2**31, 0, 0, 0)), "no record at byte 0"),
    ],
)
def test_damage_is_named_with_its_byte(tmp_path: Path, data: bytes, says: str):
    records = Records(saved(tmp_path, data))
    with pytest.raises(UserError, match=says):
        _ = [records.head(offset) for offset in records.offsets()]


@pytest.mark.parametrize("offset", [-1, -(2**62), 2, 2**62])
def test_an_index_of_another_file_is_noticed(tmp_path: Path, offset: int):
    records = Records(saved(tmp_path, record(content(1.0, b"image"))))
    with pytest.raises(UserError, match=r"\.idx that belongs to it"):
        records.image(offset)


def test_a_record_larger_than_an_image_may_be_is_not_read(tmp_path: Path):
    path = saved(tmp_path, MAGIC + struct.pack("<I", 2**29 - 1))
    with path.open("r+b") as file:
        file.truncate(2**29 + 8)  # a hole: takes no room on the disk
    with pytest.raises(UserError, match=r"the record at byte 0 .* store its image smaller"), at_most(2**20):
        Records(path).image(0)


WHOLE = b"".join(
    record(content(label, image))
    for label, image in [([3.0, 9.0], b""), (0.0, b"abc"), ([1.0, 2.0], b"xyz" + MAGIC), (2.0, MAGIC + b"efgh" + MAGIC)]
)


@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=6), st.integers(0, len(WHOLE)))
def test_damage_raises_nothing_else(changes: list[tuple[int, int]], length: int):
    data = bytearray(WHOLE)
    for place, value in changes:
        data[place] = value
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(UserError), at_most(2 * len(WHOLE) + 2**20):
        records = Records(saved(Path(folder), bytes(data[:length])))
        for offset in records.offsets():
            image = records.image(offset)
            assert len(image) == records.head(offset).image <= length
