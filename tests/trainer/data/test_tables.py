import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from trainer.data.tables import Classes, TableFile, open_by_class, write_by_class, write_classes
from trainer.errors import UserError

NAMES, COUNTS = ["ada", "bob", "zoë", "cy"], [2, 5, 3, 5]
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), COUNTS)).astype(np.uint32)


@pytest.fixture
def classes(tmp_path: Path) -> Classes:
    write_classes(tmp_path / "c.arrow", NAMES, np.array(COUNTS))
    return Classes.open(tmp_path / "c.arrow")


def test_classes_are_read_as_they_were_written(classes: Classes):
    assert len(classes) == 4
    assert (classes[2], classes[-1], classes[1:3]) == ("zoë", "cy", ["bob", "zoë"])
    assert classes.names() == list(classes) == NAMES
    assert classes.counts().tolist() == COUNTS
    assert classes.ends().tolist() == [2, 7, 10, 15]
    assert classes.by_size().tolist() == [1, 3, 2, 0]
    with pytest.raises(IndexError):
        classes[4]


def test_the_entry_tells_the_file_and_the_names(tmp_path: Path, classes: Classes):
    entry = write_classes(tmp_path / "d.arrow", pa.array(NAMES), np.array(COUNTS))
    content = (tmp_path / "d.arrow").read_bytes()
    assert content == (tmp_path / "c.arrow").read_bytes()
    assert (entry.file, entry.bytes, entry.sha256) == ("d.arrow", len(content), hashlib.sha256(content).hexdigest())
    assert entry.names_sha256 == classes.digest() == hashlib.sha256(json.dumps(NAMES).encode()).hexdigest()
    other = write_classes(tmp_path / "d.arrow", NAMES, np.array(COUNTS) + 1)
    assert (other.names_sha256 == entry.names_sha256, other.sha256 == entry.sha256) == (True, False)


def test_the_digest_of_many_names_is_that_of_the_whole_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("trainer.data.tables._CHUNK", 7)
    names = [f'who "{i}"' for i in range(30)]
    assert Classes.of(names, [1] * 30).digest() == hashlib.sha256(json.dumps(names).encode()).hexdigest()


def test_attributes_of_identities_are_further_columns(tmp_path: Path):
    born = pa.array([1815, 1900, None, 1950])
    write_classes(tmp_path / "c.arrow", NAMES, np.array(COUNTS), {"born": born})
    with pa.memory_map(str(tmp_path / "c.arrow")) as file:
        assert pa.ipc.open_file(file).read_all()["born"].to_pylist() == [1815, 1900, None, 1950]
    with pytest.raises(UserError, match="must not be called 'samples'"):
        write_classes(tmp_path / "d.arrow", NAMES, np.array(COUNTS), {"samples": born})


def test_counts_lie_in_the_file_itself(classes: Classes):
    for values in (classes.counts(), classes.ends(), classes.by_size()):
        assert not values.flags.owndata
        assert not values.flags.writeable


@pytest.mark.parametrize("spoil", [lambda data: data[:-20], lambda data: b"", lambda data: b"x" * 300])
def test_what_is_no_table_of_classes_is_refused(tmp_path: Path, classes: Classes, spoil):
    (tmp_path / "d.arrow").write_bytes(spoil((tmp_path / "c.arrow").read_bytes()))
    with pytest.raises(UserError, match=r"d\.arrow' is not a table of classes"):
        Classes.open(tmp_path / "d.arrow")
    with pytest.raises(UserError, match=r"none\.arrow' is not a table of classes"):
        Classes.open(tmp_path / "none.arrow")


def test_a_table_without_counts_is_refused(tmp_path: Path):
    with pa.ipc.new_file(str(tmp_path / "d.arrow"), pa.schema({"name": pa.string()})) as writer:
        writer.write_table(pa.table({"name": NAMES}))
    with pytest.raises(UserError, match=r"d\.arrow' is not a table of classes: .*samples"):
        Classes.open(tmp_path / "d.arrow")


def test_counts_of_another_type_are_refused(tmp_path: Path):
    columns = {"name": NAMES, "samples": [2, 5, None, 5], "end": [2, 7, 10, 15], "by_size": [1, 3, 2, 0]}
    table = pa.table(columns)
    with pa.ipc.new_file(str(tmp_path / "d.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match="a column of int64 where int64 without gaps is wanted"):
        Classes.open(tmp_path / "d.arrow")


def test_tables_need_no_pandas(tmp_path: Path):
    code = """
import sys
from pathlib import Path
import numpy as np
from trainer.data.tables import Classes, write_classes
path = Path(sys.argv[1])
write_classes(path, ["a", "b"], np.array([1, 2]))
classes = Classes.open(path)
print(classes.names(), classes[1], classes.counts(), classes.digest()[:2], "pandas" in sys.modules)
"""
    found = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "c.arrow"], capture_output=True, text=True, check=True
    )
    assert found.stdout == "['a', 'b'] b [1 2] 35 False\n"


@pytest.mark.parametrize("chunk", [1, 4, 15])
def test_by_class_is_the_stable_order_of_the_labels(tmp_path: Path, classes: Classes, chunk: int):
    parts = [LABELS[start : start + chunk] for start in range(0, 15, chunk)]
    entry = write_by_class(tmp_path / "p.npy", parts, classes)
    assert entry == TableFile.of(tmp_path / "p.npy")
    positions = open_by_class(tmp_path / "p.npy", 15)
    assert positions.tolist() == sorted(range(15), key=lambda position: (LABELS[position], position))
    assert isinstance(positions, np.memmap)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.where(LABELS == 0, 1, LABELS), "more samples of class 'bob' than the 5 that"),
        (LABELS[:-1], "fewer samples of class"),
        (np.where(LABELS == 3, 4, LABELS), "label 4, but the manifest has 4 classes"),
    ],
)
def test_labels_that_disagree_with_the_classes_are_refused(tmp_path: Path, classes: Classes, labels, words: str):
    with pytest.raises(UserError, match=words):
        write_by_class(tmp_path / "p.npy", [labels], classes)
    assert not list(tmp_path.glob("*.npy"))


def test_positions_of_another_set_are_refused(tmp_path: Path, classes: Classes):
    write_by_class(tmp_path / "p.npy", [LABELS], classes)
    with pytest.raises(UserError, match=r"holds int64 \(15,\), not int64 \(16,\)"):
        open_by_class(tmp_path / "p.npy", 16)
    (tmp_path / "p.npy").write_bytes(b"")
    with pytest.raises(UserError, match="not a table of positions"):
        open_by_class(tmp_path / "p.npy", 15)


@pytest.mark.parametrize(
    ("ends", "text"), [([0, 1, 2**40, 3], b"abc"), ([0, 1, -5, 3], b"abc"), ([0, 1, 2, 3], b"a\xffc")]
)
def test_names_outside_of_the_file_or_no_text_are_refused_when_they_are_asked_for(ends: list[int], text: bytes):
    names = pa.LargeStringArray.from_buffers(3, pa.py_buffer(np.array(ends, np.int64)), pa.py_buffer(text))
    one = pa.array([1, 1, 1])
    classes = Classes(pa.table({"name": names, "samples": one, "end": [1, 2, 3], "by_size": [0, 1, 2]}))
    assert classes[0] == "a"
    for ask in (lambda: classes[1], classes.names, lambda: classes[1:2]):
        with pytest.raises(UserError, match="names that are no text"):
            ask()
    assert [classes[0], len(classes)] == ["a", 3]
    with pytest.raises(IndexError):
        classes[3]


def test_a_header_that_is_no_python_is_no_table_of_positions(tmp_path: Path):
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (3,)".ljust(117, b"(") + b"\n"
    (tmp_path / "p.npy").write_bytes(b"\x93NUMPY\x01\x00\x76\x00" + header + bytes(24))
    with pytest.raises(UserError, match="not a table of positions"):
        open_by_class(tmp_path / "p.npy", 3)
