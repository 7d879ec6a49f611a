"""Import of vectors and spectrograms."""

import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.arrays import as_array
from trainer.data.importers import Entry, ImportOptions, Listing
from trainer.data.importers.arrays import list_arrays, read_arrays
from trainer.data.importers.run import run_import
from trainer.data.manifest import Manifest
from trainer.data.verify import verify
from trainer.errors import UserError

RANDOM = np.random.default_rng(0)
VECTORS = RANDOM.standard_normal((12, 8)).astype(np.float32)
SPECTROGRAMS = RANDOM.standard_normal((12, 4, 6)).astype(np.float32)
LABELS = np.arange(12) % 3


def listing_of(source: Path, labels: Path | None = None) -> Listing:
    options = ImportOptions(labels=None if labels is None else str(labels))
    return list_arrays(str(source), options, lambda stage, done, total: None)


def listed(source: Path, labels: Path | None = None) -> list[Entry]:
    return list(listing_of(source, labels).entries)


def saved(path: Path, array: Any) -> Path:
    np.save(path, array)
    return path


def parquet(path: Path, **columns: Any) -> Path:
    pa.parquet.write_table(pa.table(columns), path, row_group_size=5)
    return path


def stored(folder: Path, split: str = "train") -> dict[str, list[np.ndarray]]:
    """The samples of a data set by identity, as they are read for training."""
    manifest = Manifest.read(folder)
    one = manifest.split(split)
    found: dict[str, list[np.ndarray]] = {name: [] for name in one.classes}
    for shard in range(len(one.shards)):
        tar = one.path(shard).read_bytes()
        for offset, size, label, _, _ in one.index(shard).records.tolist():
            found[one.classes[label]].append(as_array(tar[offset : offset + size], manifest.shape))
    return found


def agree(folder: Path, arrays: np.ndarray) -> None:
    found = stored(folder)
    assert list(found) == ["00000000", "00000001", "00000002"]
    for label, samples in enumerate(found.values()):
        wanted = arrays[label == LABELS].astype(np.float32)
        order = [np.lexsort(np.array([sample.ravel() for sample in batch]).T) for batch in (samples, wanted)]
        np.testing.assert_array_equal(np.array(samples)[order[0]], wanted[order[1]])


@pytest.mark.parametrize(("arrays", "content"), [(VECTORS, "vector"), (SPECTROGRAMS, "spectrogram")])
@pytest.mark.parametrize("form", ["npy", "parquet"])
def test_a_data_set_of_arrays(tmp_path: Path, arrays: np.ndarray, content: str, form: str):
    if form == "npy":
        source = saved(tmp_path / "x.npy", arrays)
        labels = str(saved(tmp_path / "labels.npy", LABELS))
    else:
        source = parquet(tmp_path / "x.parquet", label=LABELS, sound=arrays.tolist())
        labels = None
    options = ImportOptions(holdout_share=0, samples_per_shard=5, labels=labels)
    manifest = run_import("arrays", source, tmp_path / "set", options)
    assert (manifest.content, tuple(manifest.shape), manifest.image_mode) == (content, arrays.shape[1:], None)
    agree(tmp_path / "set", arrays)
    verify(manifest)
    assert not list((tmp_path / "set").glob("rows*"))


@pytest.mark.parametrize("dtype", ["float16", "float64", "uint8", "int32", ">f4"])
def test_numbers_of_any_type(tmp_path: Path, dtype: str):
    arrays = (RANDOM.standard_normal((12, 8)) * 50 + 100).clip(0, 255).astype(dtype)
    labels = saved(tmp_path / "labels.npy", LABELS)
    source = saved(tmp_path / "x.npy", arrays)
    run_import("arrays", source, tmp_path / "set", ImportOptions(holdout_share=0, labels=str(labels)))
    agree(tmp_path / "set", arrays)


@pytest.mark.parametrize("kind", [pa.float16(), pa.float64(), pa.uint8(), pa.int64()])
@pytest.mark.parametrize("size", [-1, 8])
def test_numbers_of_any_type_in_a_parquet_file(tmp_path: Path, kind: pa.DataType, size: int):
    arrays = (RANDOM.standard_normal((12, 8)) * 50 + 100).clip(0, 255).astype(kind.to_pandas_dtype())
    column = pa.array(list(arrays), pa.list_(kind, size))
    source = parquet(tmp_path / "x.parquet", label=LABELS, vector=column)
    run_import("arrays", source, tmp_path / "set", ImportOptions(holdout_share=0))
    agree(tmp_path / "set", arrays)


@pytest.mark.parametrize("labels", [np.array(["a", "b", "c"])[LABELS], np.array([b"a", b"b", b"c"])[LABELS]])
def test_labels_in_words(tmp_path: Path, labels: np.ndarray):
    entries = listed(saved(tmp_path / "x.npy", VECTORS), saved(tmp_path / "y.npy", labels))
    assert [entry.identity for entry in entries[:4]] == ["a", "b", "c", "a"]
    assert [entry.name for entry in entries[:2]] == ["x/0", "x/1"]


def test_labels_splits_and_attributes_in_a_csv_file(tmp_path: Path):
    rows = "".join(f"p{label},{'val' if label == 2 else 'train'},{row}\n" for row, label in enumerate(LABELS))
    (tmp_path / "y.csv").write_text("label,split,number\n" + rows)
    listing = listing_of(saved(tmp_path / "x.npy", VECTORS), tmp_path / "y.csv")
    first = next(iter(listing.entries))
    assert (first.identity, first.split, first.attributes) == ("p0", "train", {"number": "0"})
    assert listing.attributes == {"number": "string"}
    place = read_arrays(listing.source, ImportOptions())("3")
    np.testing.assert_array_equal(as_array(place, (8,)), VECTORS[3])


def test_attributes_in_a_parquet_file(tmp_path: Path):
    source = parquet(tmp_path / "x.parquet", vector=VECTORS.tolist(), label=LABELS, age=range(12))
    assert listed(source)[5].attributes == {"age": 5}


def test_values_that_are_not_finite_are_left_out_and_named(tmp_path: Path):
    arrays = VECTORS.copy()
    arrays[4, 2] = np.nan
    labels = saved(tmp_path / "y.npy", LABELS)
    options = ImportOptions(holdout_share=0, labels=str(labels), max_bad=0.1)
    manifest = run_import("arrays", saved(tmp_path / "x.npy", arrays), tmp_path / "set", options)
    assert manifest.split("train").samples == 11
    assert [(bad.name, bad.reason) for bad in manifest.bad] == [
        ("x/4", "it holds values that are not finite; leave them out or replace them")
    ]


@pytest.mark.parametrize(
    ("arrays", "labels", "says"),
    [
        (VECTORS, None, r"x\.npy' has no labels; name the file that holds them, .* with --labels"),
        (VECTORS, LABELS[:-1], r"has 12 rows, but '.*y\.npy' has 11, fewer; give one label for each row"),
        (VECTORS, np.arange(13), r"has 12 rows, but '.*y\.npy' has more"),
        (VECTORS, LABELS - 1, r"row 0 of '.*y\.npy' has the negative label -1"),
        (VECTORS, np.full(12, np.nan), r"row 0 of '.*y\.npy' has the label nan"),
        (VECTORS, LABELS[:, np.newaxis], r"y\.npy' holds int64 of shape \(12, 1\); save labels as one row"),
        (VECTORS, np.full(12, True), r"y\.npy' holds bool"),
        (VECTORS, np.array(["a", 1, None] * 4, object), r"y\.npy' is not a whole \.npy file .* numbers only"),
        (np.array([{}] * 12, object), LABELS, r"x\.npy' is not a whole \.npy file"),
        (VECTORS.astype(complex), LABELS, r"x\.npy' holds complex128; save the samples as an array of real numbers"),
        (LABELS, LABELS, r"a sample of shape \(\) is neither a vector"),
        (SPECTROGRAMS[np.newaxis], LABELS[:1], r"a sample of shape \(12, 4, 6\) is neither"),
        (np.zeros((0, 8)), LABELS, r"x\.npy' has no rows|is not a whole"),
        (np.zeros((3, 2**23), np.uint8), LABELS[:3], r"of at most 4194304 values"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(tmp_path: Path, arrays: Any, labels: Any, says: str):
    source = saved(tmp_path / "x.npy", arrays)
    beside = None if labels is None else saved(tmp_path / "y.npy", labels)
    with pytest.raises(UserError, match=says) as raised:
        listed(source, beside)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"label": [1, 2]}, r"has 0 columns of lists of numbers \(none\); give a table with one"),
        ({"label": [1, 2], "a": [[1.0]] * 2, "b": [[1.0]] * 2}, r"has 2 columns of lists of numbers \(a, b\)"),
        ({"vector": [[1.0], [2.0]]}, "has no column 'label' but 'vector'"),
        ({"label": [1, 2], "a": [["x"], ["y"]]}, "has 0 columns of lists"),
        ({"label": [1, None], "a": [[1.0], [2.0]]}, r"row 1 of '.*' has no label"),
        ({"label": [1, 2], "a": [[1.0], [2.0, 3.0]]}, r"row 1 in the column 'a' of .* has the shape \(2,\)"),
        ({"label": [1, 2], "a": [[1.0], None]}, "row 1 in the column 'a'"),
        ({"label": [1, 2], "a": [[1.0], [None]]}, "has numbers that are missing"),
        ({"label": [1, 2], "a": [[[1.0], [2.0]], [[1.0], [2.0, 3.0]]]}, r"row 1 .* has the shape \(2, 2\)"),
        ({"label": [1, 2], "a": pa.array([[], []], pa.list_(pa.float32()))}, r"a sample of shape \(0,\) is neither"),
        ({"label": pa.array([], pa.int64()), "a": pa.array([], pa.list_(pa.float32()))}, "has no rows"),
    ],
)
def test_what_is_wrong_in_a_parquet_file(tmp_path: Path, columns: dict[str, Any], says: str):
    source = parquet(tmp_path / "x.parquet", **columns)
    with pytest.raises(UserError, match=says) as raised:
        run_import("arrays", source, tmp_path / "set", ImportOptions(holdout_share=0))
    assert "\n" not in str(raised.value)


def test_labels_of_a_parquet_file_are_inside(tmp_path: Path):
    source = parquet(tmp_path / "x.parquet", vector=VECTORS.tolist(), label=LABELS)
    with pytest.raises(UserError, match=r"--labels .*y\.npy is for \.npy files"):
        listed(source, tmp_path / "y.npy")


def test_a_source_that_is_not_there(tmp_path: Path):
    with pytest.raises(UserError, match=r"SOURCE '.*none\.npy' is not a file"):
        listed(tmp_path / "none.npy")


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


WHOLE = npy(np.arange(6, dtype=np.float32).reshape(3, 2))


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=6),
    st.integers(0, len(WHOLE)),
    st.booleans(),
)
def test_damage_raises_nothing_else(changes: list[tuple[int, int]], length: int, cut: bool):
    data = bytearray(WHOLE)
    for place, value in changes:
        data[place] = value
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(UserError):
        path, labels = Path(folder, "x.npy"), Path(folder, "y.npy")
        path.write_bytes(data[:length] if cut else data)
        labels.write_bytes(npy(np.arange(3)))
        found = listed(path, labels)
        read_arrays(str(path), ImportOptions())(found[0].place)
