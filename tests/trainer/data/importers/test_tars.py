"""Import from tars of others: into shards of our own, and in place."""

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from braceexpand import braceexpand
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.trainer.data.importers.archives import pack, picture
from tests.web import Web, serving
from trainer.data import remote
from trainer.data.importers import Entry, ImportOptions, tars
from trainer.data.importers.run import run_import
from trainer.data.importers.tars import _count, list_tars, read_tars
from trainer.data.manifest import Manifest
from trainer.data.store import CacheConfig
from trainer.data.stream import DataConfig, Stream
from trainer.data.verify import verify
from trainer.errors import UserError

PEOPLE = {"ada": 3, "bob": 2, "cy": 4, "dot": 2, "eve": 3, "fay": 2}  # 16 samples
ALL_TRAIN = ImportOptions(holdout_share=0, samples_per_shard=6)


def people() -> list[dict[str, bytes]]:
    """Samples as others write them: a number in `.cls`, more in `.json`, members in any order."""
    names = [name for name, count in PEOPLE.items() for _ in range(count)]
    order = np.random.default_rng(0).permutation(len(names)).tolist()
    return [
        {
            "jpg": picture(row),
            "cls": str(sorted(PEOPLE).index(names[row])).encode(),
            "json": json.dumps({"who": names[row], "row": row, "key": "theirs", "place": {"x": 1}}).encode(),
        }
        for row in order
    ]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `faces-000.tar` to `faces-002.tar`. Do not change it."""
    folder = tmp_path_factory.mktemp("theirs")
    samples = people()
    for number, start in enumerate(range(0, len(samples), 6)):
        pack(folder / f"faces-{number:03d}.tar", samples[start : start + 6])
    return folder


@pytest.fixture
def web(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(remote, "_FIRST_DELAY", 0.01)
    with serving(Web(theirs)) as site:
        yield site


def listed(source: Path | str, options: ImportOptions = ALL_TRAIN) -> list[Entry]:
    return list(list_tars(str(source), options, lambda stage, done, total: None).entries)


def pixels_of(folder: Path) -> dict[str, list[bytes]]:
    """Pixels of all samples of the train split by identity, as training reads them."""
    manifest = Manifest.read(folder, CacheConfig(folder.parent / "cache"))
    classes = manifest.split("train").classes
    found: dict[str, list[bytes]] = {name: [] for name in classes}
    stream = Stream(manifest, "train", DataConfig(height=12, width=12, batch_size=4), shuffle=False)
    for batch in stream.batches(0):
        for image, label in zip(batch.images_BCHW, batch.labels_B.tolist(), strict=True):
            found[classes[label]].append(image.numpy().tobytes())
    return {name: sorted(images) for name, images in found.items()}


def expected() -> dict[str, list[bytes]]:
    found: dict[str, list[bytes]] = {name: [] for name in PEOPLE}
    for sample in people():
        pixels = np.asarray(Image.open(io.BytesIO(sample["jpg"]))).transpose(2, 0, 1)
        found[json.loads(sample["json"])["who"]].append(np.ascontiguousarray(pixels).tobytes())
    return {name: sorted(images) for name, images in found.items()}


@pytest.mark.parametrize("source", ["", "faces-{000..002}.tar", "faces-*.tar", "faces-0{00,01,02}.t*r"])
def test_labels_of_cls_are_numbers(theirs: Path, source: str):
    entries = listed(theirs / source)
    assert len(entries) == 16
    assert {entry.identity for entry in entries} == {f"{number:08d}" for number in range(6)}
    assert entries[0].name == f"faces-000.tar/{'long' * 30}/faces-000-0000"
    read = read_tars(str(theirs / source), ALL_TRAIN)
    assert [read(entry.place) for entry in entries] == [sample["jpg"] for sample in people()]
    assert [entry.size for entry in entries] == [len(sample["jpg"]) for sample in people()]


def test_labels_and_attributes_of_json(theirs: Path):
    entries = listed(theirs / "faces-000.tar", ImportOptions(label_field="who"))
    first = json.loads(people()[0]["json"])
    assert entries[0].identity == first["who"]
    assert entries[0].attributes == {"row": str(first["row"]), "place": '{"x": 1}'}


def test_a_label_in_words(tmp_path: Path):
    pack(tmp_path / "x.tar", [{"cls": b"Grace Hopper\n", "jpg": picture(0)}])
    assert listed(tmp_path)[0].identity == "Grace Hopper"


@pytest.mark.parametrize("in_place", [False, True])
def test_a_data_set_of_all_that_the_archives_hold(theirs: Path, tmp_path: Path, in_place: bool):
    options = ImportOptions(holdout_share=0, samples_per_shard=6, label_field="who", in_place=in_place)
    manifest = run_import("tars", theirs, tmp_path / "set", options)
    assert pixels_of(tmp_path / "set") == expected()
    assert manifest.image_mode == "RGB"
    assert manifest.split("train").classes.names() == sorted(PEOPLE)
    assert [entry.samples for entry in manifest.splits["train"].shards] == [6, 6, 4]
    verify(manifest)
    with pa.memory_map(str(tmp_path / "set" / "train.attributes.arrow")) as file:
        assert sorted(map(int, pa.ipc.open_file(file).read_all()["row"].to_pylist())) == list(range(16))


def test_in_place_writes_no_shard_and_holds_out_as_an_import_does(theirs: Path, tmp_path: Path):
    options = {"holdout_share": 0.34, "seed": 3, "label_field": "who"}
    copied = run_import("tars", theirs, tmp_path / "copied", ImportOptions(**options))
    indexed = run_import("tars", theirs, tmp_path / "indexed", ImportOptions(**options, in_place=True, jobs=3))
    for split in ("train", "val"):
        assert indexed.split(split).classes.names() == copied.split(split).classes.names()
        assert indexed.split(split).classes.counts().tolist() == copied.split(split).classes.counts().tolist()
    assert not list((tmp_path / "indexed").glob("*.tar"))
    assert not list((tmp_path / "indexed").glob(".*"))
    assert {entry.url for entry in indexed.splits["train"].shards} <= {str(path) for path in theirs.iterdir()}
    assert indexed.split("val").index(0).key(0).startswith("long")
    verify(indexed)


def test_in_place_gives_the_same_bytes_with_any_number_of_jobs(theirs: Path, tmp_path: Path):
    for jobs in (1, 3):
        run_import("tars", theirs, tmp_path / f"{jobs}", ImportOptions(holdout_share=0, in_place=True, jobs=jobs))
    files = [{path.name: path.read_bytes() for path in (tmp_path / f"{jobs}").iterdir()} for jobs in (1, 3)]
    assert files[0] == files[1]


def test_in_place_notices_an_archive_that_changed(theirs: Path, tmp_path: Path):
    source = tmp_path / "faces.tar"
    source.write_bytes((theirs / "faces-000.tar").read_bytes())
    manifest = run_import("tars", source, tmp_path / "set", ImportOptions(holdout_share=0, in_place=True))
    data = bytearray(source.read_bytes())
    data[int(manifest.split("train").index(0).records["offset"][2]) + 100] ^= 1
    source.write_bytes(data)
    with pytest.raises(UserError, match=r"faces\.tar' has SHA-256"):
        verify(manifest)


@pytest.mark.parametrize("in_place", [False, True])
def test_bad_images_are_left_out_and_named(tmp_path: Path, in_place: bool):
    samples = [{"cls": b"%d" % (i % 2), "jpg": picture(i)} for i in range(6)] + [{"cls": b"1", "jpg": b"no image"}]
    pack(tmp_path / "x.tar", samples)
    options = ImportOptions(holdout_share=0, in_place=in_place, max_bad=0.2)
    manifest = run_import("tars", tmp_path / "x.tar", tmp_path / "set", options)
    assert manifest.split("train").classes.counts().tolist() == [3, 3]
    ((name, reason),) = [(bad.name, bad.reason) for bad in manifest.bad]
    assert name.endswith("x-0006")
    assert "not an image" in reason
    with pytest.raises(UserError, match="over the --max-bad 0"):
        run_import("tars", tmp_path / "x.tar", tmp_path / "other", ImportOptions(in_place=in_place, max_bad=0))


@pytest.mark.parametrize(("shape", "content"), [((8,), "vector"), ((4, 6), "spectrogram")])
@pytest.mark.parametrize("in_place", [False, True])
def test_arrays_in_archives(tmp_path: Path, shape: tuple[int, ...], content: str, in_place: bool):
    def array(seed: int) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, np.random.default_rng(seed).standard_normal(shape).astype(np.float32))
        return buffer.getvalue()

    pack(tmp_path / "x.tar", [{"cls": b"%d" % (i % 3), "npy": array(i)} for i in range(9)])
    options = ImportOptions(holdout_share=0, in_place=in_place)
    manifest = run_import("tars", tmp_path / "x.tar", tmp_path / "set", options)
    assert (manifest.content, tuple(manifest.shape), manifest.image_mode) == (content, shape, None)
    verify(manifest)


@pytest.mark.parametrize("in_place", [False, True])
def test_archives_from_a_web_server(web: Web, tmp_path: Path, in_place: bool):
    web.faults["faces-001.tar"] = 2
    options = ImportOptions(holdout_share=0, label_field="who", in_place=in_place)
    manifest = run_import("tars", f"{web.address}/faces-{{000..002}}.tar", tmp_path / "set", options)
    assert manifest.split("train").samples == 16
    assert manifest.provenance["source"] == "faces-{000..002}.tar"
    assert pixels_of(tmp_path / "set") == expected()
    if in_place:
        addresses = [f"{web.address}/faces-00{number}.tar" for number in range(3)]
        assert [entry.url for entry in manifest.splits["train"].shards] == addresses


@pytest.mark.parametrize("in_place", [False, True])
def test_archives_of_a_bucket_by_a_pattern(theirs: Path, tmp_path: Path, in_place: bool):
    bucket = fsspec.filesystem("memory")
    bucket.put(str(theirs), "/bucket/faces", recursive=True)
    options = ImportOptions(holdout_share=0, label_field="who", in_place=in_place)
    run_import("tars", "memory://bucket/faces/*.tar", tmp_path / "set", options)
    assert pixels_of(tmp_path / "set") == expected()
    with pytest.raises(UserError, match=r"no archive matches 'memory://bucket/none/\*\.tar'"):
        run_import("tars", "memory://bucket/none/*.tar", tmp_path / "other", options)


def test_in_place_reads_each_archive_once(web: Web, tmp_path: Path):
    """But for its beginning, which tells what the samples are."""
    source = f"{web.address}/faces-{{000..002}}.tar"
    run_import("tars", source, tmp_path / "set", ImportOptions(holdout_share=0, in_place=True))
    sizes = {path.name: path.stat().st_size for path in web.folder.iterdir()}
    for name in ("faces-001.tar", "faces-002.tar"):
        assert web.sent[name] <= 2 * sizes[name]  # once to ask for the size, since this server knows no HEAD


def test_a_token_would_stand_in_the_manifest(web: Web, tmp_path: Path):
    with pytest.raises(UserError, match="carries a password or token") as raised:
        run_import("tars", f"{web.address}/faces-000.tar?secret", tmp_path / "set", ImportOptions(in_place=True))
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("none-{0..30}.tar", r"31 of 31 archives are missing: .*none-19\.tar and 11 more; give a \.tar, a folder"),
        ("none.tar", r"1 of 1 archives are missing: .*none\.tar; give"),
        ("x{.tar", "is not a pattern of names"),
        ("x*.tar", r"no archive matches '.*x\*\.tar'"),
        ("x-{0..999999999999999999999}.tar", "names more than 1000000 archives; give fewer"),
        ("x-{{0..999},{a..c}}{0..999}.tar", "names more than 1000000 archives; give fewer"),
        ("x-" + "{a,b}" * 21, "names more than 1000000 archives; give fewer"),
        ("{" * 2000 + "," + "}" * 2000, "is not a pattern of names"),
        ("empty", r"SOURCE '.*empty' holds no \.tar"),
    ],
)
def test_a_source_that_is_no_archive(tmp_path: Path, name: str, says: str):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=says):
        listed(tmp_path / name)


@pytest.mark.parametrize(
    "pattern",
    [
        "x",
        "{a,b,}",
        "{0..7..3}{a..c}",
        "{a{0..9},b{00..99},c}",
        "{x}",
        "{a}{b,c}",
        r"\{a,b\}",
        "{{a,b},{c,d}{e,f}}",
        "5..1",
    ],
)
def test_names_are_counted_as_they_are_expanded(pattern: str):
    assert _count(pattern) == len(list(braceexpand(pattern)))


@pytest.mark.parametrize("in_place", [False, True])
def test_an_attribute_may_have_the_name_of_a_column(tmp_path: Path, in_place: bool):
    about = [json.dumps({"who": who, "identity": f"theirs {who}", "name": "x"}).encode() for who in ("ada", "bob")]
    pack(tmp_path / "x.tar", [{"jpg": picture(row), "json": text} for row, text in enumerate(about)])
    options = ImportOptions(holdout_share=0, label_field="who", in_place=in_place)
    manifest = run_import("tars", tmp_path / "x.tar", tmp_path / "set", options)
    verify(manifest)
    assert manifest.split("train").classes.names() == ["ada", "bob"]
    with pa.memory_map(str(tmp_path / "set" / "train.attributes.arrow")) as file:
        found = pa.ipc.open_file(file).read_all()
    assert sorted(found["identity"].to_pylist()) == ["theirs ada", "theirs bob"]


@pytest.mark.parametrize("in_place", [False, True])
def test_half_a_character_is_written_out(tmp_path: Path, in_place: bool):
    about = [b'{"who": "a\\ud800", "of": "\\udfff", "\\udead": 1}', b'{"who": "b", "of": "x"}']
    pack(tmp_path / "x.tar", [{"jpg": picture(row), "json": text} for row, text in enumerate(about)])
    options = ImportOptions(holdout_share=0, label_field="who", in_place=in_place)
    manifest = run_import("tars", tmp_path / "x.tar", tmp_path / "set", options)
    assert manifest.split("train").classes.names() == [r"a\ud800", "b"]


@pytest.mark.parametrize("in_place", [False, True])
def test_an_empty_archive_holds_no_samples(tmp_path: Path, in_place: bool):
    pack(tmp_path / "x.tar", [])
    with pytest.raises(UserError, match=r"SOURCE '.*x\.tar' holds no samples"):
        run_import("tars", tmp_path / "x.tar", tmp_path / "set", ImportOptions(in_place=in_place))


@pytest.mark.parametrize(
    ("sample", "field", "says"),
    [
        ({"jpg": b"x"}, "cls", r"has no label in \.cls; name the field .* with --label-field \(its fields: none\)"),
        ({"jpg": b"x", "json": b'{"who": "ada", "age": 3}'}, "cls", r"\(its fields: 'who', 'age'\)"),
        ({"jpg": b"x", "cls": b" "}, "cls", r"has no label in \.cls"),
        ({"jpg": b"x", "cls": b"-3"}, "who", r"has no label in the field 'who' of \.json"),
        ({"jpg": b"x", "json": b'{"who": null}'}, "who", "has no label"),
        ({"jpg": b"x", "json": b'{"who": 0.5}'}, "who", r"has the label 0\.5, which is neither"),
        ({"jpg": b"x", "json": b"[" * 100_000}, "who", "has no label"),
        ({"jpg": b"x", "json": b"\xff"}, "who", "has no label"),
        (
            {"cls": b"1", "flac": b"x"},
            "cls",
            r"lacks an image or array \(\.png, .*\): its files have \.cls, \.flac; pack",
        ),
    ],
)
@pytest.mark.parametrize("in_place", [False, True])
def test_a_sample_without_a_label_is_named(
    tmp_path: Path, sample: dict[str, bytes], field: str, says: str, in_place: bool
):
    pack(tmp_path / "x.tar", [sample])
    with pytest.raises(UserError, match=rf"sample '.*x-0000' of .*{says}"):
        run_import("tars", tmp_path, tmp_path / "set", ImportOptions(label_field=field, in_place=in_place))
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda data: data[:5000], r"x\.tar' is cut off at byte 5000"),
        (lambda data: data[:-10240], "is cut off at byte"),
        (lambda data: b"\x1f\x8b" + data[2:], "is compressed"),
        (lambda data: b"", "is cut off at byte 0"),
    ],
)
@pytest.mark.parametrize("in_place", [False, True])
def test_a_damaged_archive_is_named(tmp_path: Path, spoil: Callable[[bytes], bytes], says: str, in_place: bool):
    samples = [{"cls": b"%d" % i, "jpg": picture(i)} for i in range(8)]
    pack(tmp_path / "x.tar", samples)
    (tmp_path / "x.tar").write_bytes(spoil((tmp_path / "x.tar").read_bytes()))
    with pytest.raises(UserError, match=says):
        run_import("tars", tmp_path, tmp_path / "set", ImportOptions(holdout_share=0, in_place=in_place))


def whole() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        pack(Path(folder, "x.tar"), [{"cls": b"1", "npy": b"x" * 40, "json": b'{"a": 1}'}, {"jpg": b"x", "cls": b"y"}])
        return Path(folder, "x.tar").read_bytes()


WHOLE = whole()


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=6), st.booleans())
def test_damage_raises_nothing_else(changes: list[tuple[int, int]], by_json: bool):
    data = bytearray(WHOLE)
    for place, value in changes:
        data[place] = value
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(UserError):
        Path(folder, "x.tar").write_bytes(data)
        listed(folder, ImportOptions(label_field="a" if by_json else "cls"))


@pytest.mark.parametrize("in_place", [False, True])
def test_fields_that_come_too_late_are_told(tmp_path: Path, in_place: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tars, "_PEEKED", 2)
    samples = [{"cls": b"%d" % (i % 2), "jpg": picture(i), "json": b'{"a": 1}'} for i in range(6)]
    samples[4]["json"] = samples[5]["json"] = b'{"a": 1, "late": 2}'
    pack(tmp_path / "x-0.tar", samples)
    pack(tmp_path / "x-1.tar", [sample | {"jpg": picture(10 + i)} for i, sample in enumerate(samples)])
    options = ImportOptions(holdout_share=0, in_place=in_place)
    manifest = run_import("tars", tmp_path / "x-*.tar", tmp_path / "set", options)
    ((name, reason),) = [(bad.name, bad.reason) for bad in manifest.bad]
    assert name.endswith("x-0-0004: the field 'late'")
    assert reason == "comes first after 2 samples, and so is no attribute"


@pytest.mark.parametrize("in_place", [False, True])
def test_bad_samples_are_a_share_of_all_archives(tmp_path: Path, in_place: bool):
    for number in range(4):
        samples = [{"cls": b"%d" % (i % 2), "jpg": picture(10 * number + i)} for i in range(6)]
        pack(tmp_path / f"x-{number}.tar", [*samples, *([{"cls": b"0", "jpg": b"none"}] if number == 0 else [])])
    options = ImportOptions(holdout_share=0, in_place=in_place, max_bad=0.05)
    assert len(run_import("tars", tmp_path / "x-*.tar", tmp_path / "set", options).bad) == 1


@pytest.mark.parametrize("in_place", [False, True])
def test_a_name_that_is_not_utf8_is_one_sentence(tmp_path: Path, in_place: bool):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/x\xff"))
    folder.mkdir()
    pack(folder / "x.tar", [{"cls": b"0", "jpg": picture(0)}])
    (tmp_path / "below").mkdir()
    os.link(folder / "x.tar", os.fsencode(tmp_path) + b"/below/\xfe.tar")
    for source in (folder, folder / "x.tar", tmp_path / "below"):
        with pytest.raises(UserError, match=r"the name of '.*\\xf[ef].*' is not UTF-8; rename it"):
            run_import("tars", source, tmp_path / "set", ImportOptions(in_place=in_place))
