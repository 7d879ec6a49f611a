"""Import from InsightFace's RecordIO."""

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.data.importers.recordio_files import content, write_insightface, write_records
from trainer.data.importers import Entry, ImportOptions
from trainer.data.importers.recordio import list_recordio, read_recordio
from trainer.errors import UserError

OPTIONS = ImportOptions()
PEOPLE = [[b"a0", b"a1"], [b"b0"], [b"c0", b"c1", b"c2"]]


def ignore(stage: str, done: int, total: int) -> None:
    pass


def listed(source: Path) -> list[Entry]:
    return list(list_recordio(str(source), OPTIONS, ignore).entries)


def images(source: Path) -> list[tuple[str, str, bytes]]:
    """Identity, name and image of each entry."""
    read = read_recordio(list_recordio(str(source), OPTIONS, ignore).source, OPTIONS)
    return [(entry.identity, entry.name, read(entry.place)) for entry in listed(source)]


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    path = tmp_path / "train.rec"
    write_insightface(path, PEOPLE)
    return path


EXPECTED = [
    ("00000000", "train/1", b"a0"),
    ("00000000", "train/2", b"a1"),
    ("00000001", "train/3", b"b0"),
    ("00000002", "train/4", b"c0"),
    ("00000002", "train/5", b"c1"),
    ("00000002", "train/6", b"c2"),
]


def test_images_without_the_records_that_only_describe(packed: Path):
    assert images(packed) == images(packed.parent) == EXPECTED
    assert [entry.size for entry in listed(packed)] == [2] * 6
    assert len({entry.stamp for entry in listed(packed)}) == 1


def test_the_index_and_the_property_file_may_be_missing(packed: Path):
    packed.with_suffix(".idx").unlink()
    packed.with_name("property").unlink()
    assert images(packed) == EXPECTED


def test_records_come_in_the_order_of_the_file(packed: Path):
    index = packed.with_suffix(".idx")
    lines = index.read_text().splitlines(keepends=True)
    index.write_text("".join(reversed(lines)))
    assert images(packed) == EXPECTED


def test_plain_records_of_mxnet(tmp_path: Path):
    """No record that describes, keys that begin anywhere, several labels: the first is the identity."""
    write_records(tmp_path / "x.rec", {7: content(1.0, b"p"), 9: content([0.0, 0.5], b"q")})
    assert images(tmp_path) == [("00000001", "x/7", b"p"), ("00000000", "x/9", b"q")]


def test_an_image_of_no_bytes_is_listed_so_that_it_is_told(tmp_path: Path):
    write_records(tmp_path / "x.rec", {1: content(1.0, b""), 2: content([1.0], b"")})
    assert images(tmp_path) == [("00000001", "x/1", b""), ("00000001", "x/2", b"")]


def lst(path: Path, lines: Sequence[str]) -> None:
    path.with_suffix(".lst").write_text("".join(f"{line}\n" for line in lines))


INSIGHTFACE = ["1\tada/0.jpg\t0", "1\tada/1.jpg\t0", "1\tbob/0.jpg\t1", *(f"1\tcy/{i}.jpg\t2" for i in range(3))]
MXNET = ["1\t0\tada/0.jpg", "2\t0\tada/1.jpg", "3\t1.0\tbob/0.jpg", *(f"{4 + i}\t2\t0.5\tcy/{i}.jpg" for i in range(3))]


@pytest.mark.parametrize("lines", [INSIGHTFACE, MXNET])
def test_a_list_names_the_images(packed: Path, lines: list[str]):
    lst(packed, lines)
    names = ["ada/0.jpg", "ada/1.jpg", "bob/0.jpg", "cy/0.jpg", "cy/1.jpg", "cy/2.jpg"]
    assert [entry.name for entry in listed(packed)] == names


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (INSIGHTFACE[:-1], r"train\.lst' has 5 images, but 'train\.rec' has more; .* or remove it"),
        ([*INSIGHTFACE, "1\tx\t2"], r"train\.rec' has 6 images, but 'train\.lst' has more"),
        ([*INSIGHTFACE[:1], "1\tx\t9", *INSIGHTFACE[2:]], r"line 2 .* label 9, but the record there has label 0"),
        ([*MXNET[:1], "9\t0\tx", *MXNET[2:]], r"line 2 .* label 0 and key 9, but .* label 0 and key 2"),
        (["1 ada/0.jpg 0"], r"line 1 of '.*train\.lst' is not 'key tab label tab path'"),
        (["1\tada\tx"], r"line 1 of '.*train\.lst' is not 'key tab label tab path'"),
        (["one\t0\tx"], r"line 1 of '.*train\.lst' is not 'key tab label tab path'"),
    ],
)
def test_a_list_that_does_not_belong_to_the_file(packed: Path, lines: list[str], says: str):
    lst(packed, lines)
    with pytest.raises(UserError, match=says):
        listed(packed)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.with_suffix(".idx").write_text(""), r"is not an index .*; remove it to go without"),
        (lambda path: path.with_suffix(".idx").write_text("1\n"), "is not an index"),
        (lambda path: path.with_suffix(".idx").write_text("1\tx\n"), "is not an index"),
        (lambda path: path.with_suffix(".idx").write_text("1\t\n"), "is not an index"),
        (lambda path: path.with_suffix(".idx").write_text("1\t0\n2\t0\n"), "names one record twice"),
        (
            lambda path: path.with_suffix(".idx").write_text("1\t4\n"),
            r"no record at byte 4; .* \.idx that belongs to it",
        ),
        (
            lambda path: path.with_name("property").write_text("two,112,112"),
            "does not begin with a number of identities",
        ),
        (lambda path: path.with_name("property").write_text("2,112,112"), r"key 4 of .* has label 2, but .* 0 to 1"),
    ],
)
def test_what_lies_beside_the_file_must_belong_to_it(packed: Path, spoil: Callable[[Path], None], says: str):
    spoil(packed)
    with pytest.raises(UserError, match=says):
        listed(packed)


@pytest.mark.parametrize("label", [0.5, -1.0, float("nan"), float("inf"), 2.0**25])
def test_labels_that_are_no_class(tmp_path: Path, label: float):
    write_records(tmp_path / "x.rec", {1: content(label, b"image")})
    with pytest.raises(UserError, match=r"the record with key 1 of '.*x\.rec' has label .* whole numbers from 0"):
        listed(tmp_path)


def test_a_source_that_is_no_record_file(tmp_path: Path, packed: Path):
    with pytest.raises(UserError, match=r"SOURCE '.*none\.rec' is not a \.rec file"):
        listed(tmp_path / "none.rec")
    write_insightface(tmp_path / "other.rec", PEOPLE)
    with pytest.raises(UserError, match=r"holds other\.rec, train\.rec; name one"):
        listed(tmp_path)
    with pytest.raises(UserError, match="SOURCE '' is not"):
        list_recordio(None, OPTIONS, ignore)


@given(st.text(alphabet="0123456789\t\n\r.-x", max_size=40), st.sampled_from([".idx", ".lst", "property"]))
def test_damage_beside_the_file_raises_nothing_else(text: str, suffix: str):
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(UserError):
        path = Path(folder, "train.rec")
        write_insightface(path, PEOPLE)
        (path.with_name(suffix) if suffix == "property" else path.with_suffix(suffix)).write_text(text)
        assert len(listed(path)) <= 6
