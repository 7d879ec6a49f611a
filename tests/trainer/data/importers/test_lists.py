"""Import from CSV and Parquet lists."""

import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.data.importers.archives import picture
from tests.web import Web, serving
from trainer.data import remote
from trainer.data.importers import Entry, ImportOptions, Listing
from trainer.data.importers.lists import list_list, read_list
from trainer.data.importers.run import run_import
from trainer.errors import UserError

OPTIONS = ImportOptions()
NO_TEXT = pa.array([b"\xff.jpg"]).cast(pa.string(), safe=False)


def listing_of(source: Path | str) -> Listing:
    return list_list(str(source), OPTIONS, lambda stage, done, total: None)


def listed(source: Path | str) -> list[Entry]:
    return list(listing_of(source).entries)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with three files, `a.jpg` to `c.jpg`, that hold their names."""
    for name in ("a.jpg", "b.jpg", "sub/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def saved(folder: Path, text: str, name: str = "list.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def parquet(folder: Path, **columns: object) -> Path:
    path = folder / "list.parquet"
    pa.parquet.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("path,label\na.jpg,ada\nb.jpg,bob\nsub/c.jpg,ada\n", "list.csv"),
        ("label\tpath\r\nada\ta.jpg\r\nbob\tb.jpg\r\nada\tsub/c.jpg\r\n", "list.tsv"),
        ('\ufeffpath,label\n"a.jpg","ada"\nb.jpg,bob\nsub/c.jpg,ada', "LIST.CSV"),
        ("url,label\na.jpg,ada\nb.jpg,bob\nsub/c.jpg,ada\n", "list.csv"),
    ],
)
def test_paths_start_at_the_folder_of_the_list(files: Path, text: str, name: str):
    source = saved(files, text, name)
    found = listed(source)
    assert [(entry.identity, entry.name) for entry in found] == [
        ("ada", "a.jpg"),
        ("bob", "b.jpg"),
        ("ada", "sub/c.jpg"),
    ]
    read = read_list(listing_of(source).source, OPTIONS)
    assert [read(entry.place).decode() for entry in found] == ["a.jpg", "b.jpg", "sub/c.jpg"]
    assert [entry.size for entry in found] == [5, 5, 9]


def test_absolute_paths(files: Path, tmp_path_factory: pytest.TempPathFactory):
    source = saved(tmp_path_factory.mktemp("elsewhere"), f"path,label\n{files / 'a.jpg'},ada\n")
    assert read_list(str(source), OPTIONS)(listed(source)[0].place) == b"a.jpg"


def test_splits_and_attributes_of_a_csv_file_are_text(files: Path):
    source = saved(files, 'path,label,split,age,quote\na.jpg,ada,train,31,"one,\ntwo"\nb.jpg,bob,,,\n')
    listing = listing_of(source)
    assert listing.attributes == {"age": "string", "quote": "string"}
    first, second = listing.entries
    assert (first.split, first.attributes) == ("train", {"age": "31", "quote": "one,\ntwo"})
    assert (second.split, second.attributes) == (None, {"age": "", "quote": ""})


def test_attributes_of_a_parquet_file_keep_their_types(files: Path):
    source = parquet(
        files,
        path=["a.jpg", "b.jpg"],
        label=[7, 12],
        age=[31, None],
        score=pa.array([0.5, 1.5], pa.float32()),
        smile=[True, False],
        camera=pa.array(["x", "x"]).dictionary_encode(),
    )
    listing = listing_of(source)
    assert listing.attributes == {"age": "int64", "score": "double", "smile": "bool", "camera": "string"}
    assert [(entry.identity, entry.attributes) for entry in listing.entries] == [
        ("00000007", {"age": 31, "score": 0.5, "smile": True, "camera": "x"}),
        ("00000012", {"age": None, "score": 1.5, "smile": False, "camera": "x"}),
    ]


def test_whole_floats_are_numbers_too(files: Path):
    """A column of numbers with a hole in it becomes floating point in many programs."""
    assert listed(parquet(files, path=["a.jpg"], label=[7.0]))[0].identity == "00000007"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a.jpg,ada\n", r"list\.csv' has no column 'path' but 'a\.jpg', 'ada'; the first line names"),
        ("path;label\na.jpg;ada\n", "has no column 'path' but 'path;label'"),
        ("path,name\na.jpg,ada\n", "has no column 'label' but 'path', 'name'"),
        ("path,label,label\na.jpg,ada,x\n", "two columns of .* are called 'label'"),
        (",path,label\n0,a.jpg,ada\n", "column 1 of .* has no name"),
        ("path,label,key\na.jpg,ada,1\n", "'key' of .* is called 'key', a name that is taken"),
        ("", r"cannot be read as a table \(Empty CSV file\)"),
        ("path,label\na.jpg\n", r"cannot be read as a table \(.*Expected 2 columns, got 1"),
        ("path,label\na.jpg,\n", r"row 1 of '.*list\.csv' \('a\.jpg'\) has no label; give it one"),
        ("path,label\na.jpg,ada\nb.jpg,  \n", r"row 2 of .* has no label"),
        ("path,label\na.jpg,nan\n", "row 1 .* has the label nan, which is neither text nor a whole number"),
        ("path,label\n,ada\n", "row 1 of .* has no path"),
        ("path,label\na.jpg,x\nb.jpg,y\na.jpg,x\n", r"rows 1 and 3 .* the same file, 'a\.jpg' \(labels 'x' and 'x'"),
        ("path,label\na.jpg,x\na.jpg,y\n", r"rows 1 and 2 .* 'a\.jpg' \(labels 'x' and 'y'\); list each file once"),
        ("path,label\na.jpg,x\n./a.jpg,y\n", r"rows 1 and 2 .* the same file, '\./a\.jpg'"),
        ("path,label\na.jpg,ada\n" + "b" * 2**22 + ",bob\n", r"\(a row is longer than 1048576 bytes, or a quotation"),
        ("path,label\nx.jpg,x\na.jpg,x\nsub,y\n", r"2 of 3 files in .* are missing or .*: x\.jpg, sub; paths start"),
        (
            "path,label\n" + "".join(f"{i}.jpg,x\n" for i in range(25)),
            r"25 of 25 .* 18\.jpg, 19\.jpg and 5 more; paths",
        ),
        ("path,label\na\0.jpg,ada\n", "1 of 1 files"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(files: Path, text: str, says: str):
    with pytest.raises(UserError, match=says) as raised:
        listed(saved(files, text))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"path": ["a.jpg"], "label": [None]}, "row 1 .* has no label"),
        ({"path": ["a.jpg"], "label": [float("nan")]}, "has the label nan, which is neither"),
        ({"path": ["a.jpg"], "label": [0.5]}, r"has the label 0\.5, which is neither"),
        ({"path": ["a.jpg"], "label": [-1]}, "has the negative label -1"),
        ({"path": ["a.jpg"], "label": [True]}, "has the label True, which is neither"),
        ({"path": NO_TEXT, "label": ["x"]}, r"cannot be read as a table \(.*UTF8"),
        ({"path": [3], "label": ["x"]}, "'path' of .* holds int64, not text"),
        ({"path": ["a.jpg"], "label": ["x"], "split": [1]}, "'split' of .* holds int64, not text"),
        (
            {"path": ["a.jpg"], "label": ["x"], "box": [[1, 2]]},
            r"'box' of .* holds list<.*; attributes are text, numbers",
        ),
    ],
)
def test_what_is_wrong_in_a_parquet_file(files: Path, columns: dict[str, object], says: str):
    with pytest.raises(UserError, match=says):
        listed(parquet(files, **columns))


@pytest.mark.parametrize("name", ["list.txt", "none.csv", "list"])
def test_a_source_that_is_no_table(tmp_path: Path, name: str):
    (tmp_path / "list.txt").write_text("path,label\n")
    with pytest.raises(UserError, match=r"give a \.csv, \.tsv or \.parquet file"):
        listed(tmp_path / name)


def test_a_name_that_looks_like_not_a_number_is_a_name(files: Path):
    assert listed(saved(files, "path,label\na.jpg,Nan\n"))[0].identity == "Nan"


@pytest.fixture
def server(files: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(remote, "_FIRST_DELAY", 0.01)
    web = Web(files)
    web.faults["a.jpg"] = 2
    with serving(web):
        yield web.address


def test_addresses_are_read_and_named_without_their_tokens(files: Path, server: str):
    source = saved(files, f"url,label\n{server}/a.jpg?token=secret,ada\n{server}/none.jpg?token=secret,bob\n")
    listing = listing_of(source)
    found, missing = listing.entries
    assert listing.threads > 1
    assert found.name == f"{server}/a.jpg"
    read = read_list(listing.source, OPTIONS)
    assert read(found.place) == b"a.jpg"
    with pytest.raises(UserError, match=r"none\.jpg' cannot be read: it is not there") as raised:
        read(missing.place)
    assert "secret" not in str(raised.value)


def test_a_list_from_elsewhere_with_paths_that_start_there(files: Path, server: str):
    saved(files, "path,label\nsub/c.jpg,cy\n")
    listing = listing_of(f"{server}/list.csv")
    (entry,) = listing.entries
    assert (entry.name, read_list(listing.source, OPTIONS)(entry.place)) == ("sub/c.jpg", b"sub/c.jpg")


def test_a_list_becomes_a_data_set(image_folder: Path, tmp_path: Path):
    rows = [
        f"{path},{path.parent.name},{'val' if path.parent.name in ('ada', 'bob') else 'train'},{path.stem}\n"
        for path in sorted(image_folder.rglob("*.png"))
    ]
    out = tmp_path / "set"
    manifest = run_import("list", saved(tmp_path, "path,label,split,number\n" + "".join(rows)), out)
    split = manifest.split("val")
    assert (split.classes.names(), split.classes.counts().tolist()) == (["ada", "bob"], [9, 4])
    assert manifest.split("train").samples == 34
    with pa.memory_map(str(out / "val.attributes.arrow")) as file:
        assert sorted(pa.ipc.open_file(file).read_all()["number"].to_pylist())[-1] == "08"


PARQUET = io.BytesIO()
pa.parquet.write_table(pa.table({"path": ["a.jpg", "b.jpg"], "label": [1, 2], "age": [3, None]}), PARQUET)
WHOLE = {
    ".parquet": PARQUET.getvalue(),
    ".csv": b'path,label,split,age\na.jpg,ada,train,31\nb.jpg,"b,ob",val,\n',
}


@settings(deadline=None)
@given(
    st.sampled_from(sorted(WHOLE)),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6),
    st.integers(0, 10**6),
)
def test_damage_raises_nothing_else(suffix: str, changes: list[tuple[int, int]], length: int):
    data = bytearray(WHOLE[suffix])
    for place, value in changes:
        data[place % len(data)] = value
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(UserError):
        path = Path(folder, f"list{suffix}")
        path.write_bytes(data[: len(data) - length % len(data)] if length % 3 == 0 else data)
        listed(path)


def test_no_more_of_a_file_is_taken_than_an_image_may_have(files: Path):
    (files / "a.jpg").write_bytes(bytes(2**27))
    with serving(Web(files, ranges=False)) as web:
        read = read_list(str(files / "list.csv"), OPTIONS)
        assert len(read(f"{web.address}/a.jpg")) == 10 * 2**20 + 1
    assert web.sent["a.jpg"] < 2**26


def test_what_a_server_could_not_give_is_asked_for_again(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote, "_FIRST_DELAY", 0.001)
    for i in range(6):
        (files / f"{i}.jpg").write_bytes(picture(i))
    with serving(Web(files, fault="busy")) as web:
        source = saved(files, "\n".join(["url,label", *(f"{web.address}/{i}.jpg,{i % 2}" for i in range(6))]))
        options = ImportOptions(holdout_share=0, samples_per_shard=2, max_bad=0)
        web.faults["5.jpg"] = 10**6
        with pytest.raises(UserError, match="the server answers 503"):
            run_import("list", source, tmp_path / "set", options)
        web.faults.clear()
        found = run_import("list", source, tmp_path / "set", options)
    assert (found.bad, found.split("train").samples) == ([], 6)
