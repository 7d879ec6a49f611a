"""The gallery's file: counted, verified, copied while it is in use, taken out and put in again."""

import sqlite3
import stat
from contextlib import closing, contextmanager

import pytest
from typer.testing import CliRunner

from serving import upkeep
from serving.cli import app
from serving.storage.changes import Attached, State
from serving.storage.store import Store
from tests.disk import small_disk
from tests.serving.galleries import third_schema
from trainer.errors import UserError

MODEL = "a" * 32


def quiet(*_):
    pass


@pytest.fixture
def path(tmp_path):
    return tmp_path / "gallery.sqlite"


@pytest.fixture
def store(path, vectors):
    opened = Store(path, MODEL, 32)
    x = vectors(30)
    opened.enrol_many([(f"s{number % 10}", row[None]) for number, row in enumerate(x)])
    opened.delete("s3")
    yield opened
    opened.close()


@contextmanager
def opened_again(path):
    with closing(Store(path, MODEL, 32)) as opened:
        yield opened


def content(path):
    with opened_again(path) as opened:
        found = {}
        for names, _, vectors_BD, *_ in opened.samples():
            for name, row in zip(names, vectors_BD, strict=True):
                found.setdefault(name, []).append(row.tobytes())
        return {name: sorted(rows) for name, rows in found.items()}


def test_stats_of_a_store_in_use(store, path):
    found = upkeep.stats(path)
    assert (found.subjects, found.samples, found.free, found.median, found.most) == (9, 27, 3, 3, 3)
    assert (found.model_id, found.dimension, found.revision) == (MODEL, 32, 2)


def test_a_backup_of_a_store_in_use_is_restored(store, path, tmp_path, vectors):
    copy, again = tmp_path / "copy.sqlite", tmp_path / "again.sqlite"
    upkeep.backup(path, copy, quiet)
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    store.enrol("later", vectors(1))
    store.close()
    upkeep.restore(copy, again, quiet)
    before = content(path)
    del before["later"]
    assert content(again) == before
    with opened_again(again) as opened:  # as any other, without --restored
        assert opened.state() == State(9, 27, 2)
    assert sorted(file.name for file in tmp_path.iterdir() if "partial" in file.name) == []


def test_what_is_exported_comes_back(store, path, tmp_path):
    file, other = tmp_path / "out.parquet", tmp_path / "other.sqlite"
    assert upkeep.export(path, file, quiet) == 27
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    store.close()
    found, refused = upkeep.import_(file, other, 100, quiet)
    assert (found.subjects, found.samples, refused) == (9, 27, [])
    assert content(other) == content(path)
    found, refused = upkeep.import_(file, other, 4, quiet)  # once more: most do not fit
    assert (found.samples, len(refused)) == (36, 18)


def attached(path):
    with opened_again(path) as opened:
        listed = [opened.subject(row.subject_id) for row in opened.subjects(0, 100)]
        return [
            (
                row.subject_id,
                row.metadata,
                [(one.quality, one.metadata, opened.image(row.subject_id, one.sample_id)) for one in samples],
            )
            for row, samples in listed
        ]


def test_what_was_attached_is_copied_and_exported_too(tmp_path, vectors, monkeypatch):
    monkeypatch.setattr("serving.upkeep.PIECE_BYTES", 8000)
    path, x = tmp_path / "gallery.sqlite", vectors(30)
    items = [(f"s{number // 3}", row[None]) for number, row in enumerate(x)]
    more = [
        Attached({"n": number // 3}, [number / 2 if number % 2 else None], [{"ä": number}], [bytes(number * 100)])
        for number in range(30)
    ]
    with opened_again(path) as store:
        store.enrol_many(items, attached=more)
        store.enrol("plain", x[:1])
    upkeep.export(path, tmp_path / "out.parquet", quiet)
    upkeep.import_(tmp_path / "out.parquet", tmp_path / "other.sqlite", 100, quiet)
    upkeep.backup(path, tmp_path / "copy.sqlite", quiet)
    upkeep.restore(tmp_path / "copy.sqlite", tmp_path / "again.sqlite", quiet)
    assert upkeep.stats(path).images == 29  # the first one's is empty
    before = attached(path)
    assert before[5] == (
        "s5",
        {"n": 5},
        [(7.5, {"ä": 15}, bytes(1500)), (None, {"ä": 16}, bytes(1600)), (8.5, {"ä": 17}, bytes(1700))],
    )
    for copy in ("other.sqlite", "again.sqlite"):
        assert attached(tmp_path / copy) == before
        assert upkeep.verify(tmp_path / copy, quiet).samples == 31


def test_files_of_the_version_before_are_copied_and_brought_up_to_date(tmp_path):
    old = third_schema(tmp_path)
    assert upkeep.stats(old).samples == 4
    with pytest.raises(UserError, match="gallery verify"):
        upkeep.export(old, tmp_path / "out.parquet", quiet)
    upkeep.backup(old, tmp_path / "copy", quiet)
    upkeep.restore(tmp_path / "copy", tmp_path / "again", quiet)
    upkeep.verify(old, quiet)
    assert attached(old) == attached(tmp_path / "again")
    assert [row[0] for row in attached(old)] == ["alice", "zoë", "carol"]


@pytest.mark.parametrize("metadata", ["[1]", "{", '{"k": null}'])
def test_metadata_that_is_none_is_refused(store, path, tmp_path, metadata):
    import pyarrow.parquet as pq

    file = tmp_path / "out.parquet"
    upkeep.export(path, file, quiet)
    table = pq.read_table(file)
    place = table.schema.get_field_index("metadata")
    column = [metadata, *[None] * (len(table) - 1)]
    pq.write_table(table.set_column(place, "metadata", [column]), file)
    with pytest.raises(UserError, match="cannot be enrolled"):
        upkeep.import_(file, tmp_path / "new.sqlite", 100, quiet)


def test_an_export_of_the_version_before_comes_back(store, path, tmp_path):
    import pyarrow.parquet as pq

    upkeep.export(path, tmp_path / "out.parquet", quiet)
    table = pq.read_table(tmp_path / "out.parquet")
    pq.write_table(table.select(["subject_id", "created_ms", "embedding"]), tmp_path / "old.parquet")
    upkeep.import_(tmp_path / "old.parquet", tmp_path / "new.sqlite", 100, quiet)
    store.close()
    assert content(tmp_path / "new.sqlite") == content(path)
    pq.write_table(table.select(["subject_id", "embedding", "created_ms"]), tmp_path / "mixed.parquet")
    with pytest.raises(UserError, match="not an export"):
        upkeep.import_(tmp_path / "mixed.parquet", tmp_path / "new2.sqlite", 100, quiet)


def test_verify_finds_a_flipped_byte(store, path):
    with pytest.raises(UserError, match="in use"):
        upkeep.verify(path, quiet)
    store.close()
    assert upkeep.verify(path, quiet).samples == 27
    vector = next(iter(content(path).values()))[0]
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(vector)] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="checksum"):
        upkeep.verify(path, quiet)
    with pytest.raises(UserError, match="checksum"):
        upkeep.export(path, path.with_name("out.parquet"), quiet)
    assert not path.with_name("out.parquet").exists()


def test_nothing_is_replaced(store, path, tmp_path):
    there = tmp_path / "there"
    there.write_text("mine")
    for work in (upkeep.backup, upkeep.export):
        with pytest.raises(UserError, match="is there already"):
            work(path, there, quiet)
    with pytest.raises(UserError, match="is there already"):
        upkeep.restore(there, path, quiet)
    assert there.read_text() == "mine"


def test_a_folder_in_place_of_a_file_is_told(store, path, tmp_path):
    missing = tmp_path / "missing" / "deep"
    for work in (upkeep.backup, upkeep.export):
        with pytest.raises(UserError, match=f"'{missing}/.*: No such file or directory; make its folder first"):
            work(path, missing / "copy", quiet)
    upkeep.backup(path, tmp_path / "copy", quiet)
    with pytest.raises(UserError, match=f"'{missing}/.*: No such file or directory; make its folder first"):
        upkeep.restore(tmp_path / "copy", missing / "faces.sqlite", quiet)
    with pytest.raises(UserError, match=r"a folder of collections.*NAME\.db"):
        upkeep.stats(tmp_path)


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "database"])
def test_what_is_no_store_is_named(tmp_path, kind):
    path = tmp_path / "some.sqlite"
    if kind == "database":
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE t (x)")
    elif kind != "missing":
        path.write_text("" if kind == "empty" else "not a database at all" * 100)
    for work in (
        lambda: upkeep.stats(path),
        lambda: upkeep.backup(path, tmp_path / "copy", quiet),
        lambda: upkeep.restore(path, tmp_path / "new", quiet),
        lambda: upkeep.verify(path, quiet),
    ):
        with pytest.raises(UserError, match=str(path)):
            work()
    assert not (tmp_path / "copy").exists()
    assert not (tmp_path / "new").exists()


def test_other_parquet_files_are_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "other.parquet"
    pq.write_table(pa.table({"a": [1]}), file)
    with pytest.raises(UserError, match="not an export"):
        upkeep.import_(file, tmp_path / "new.sqlite", 100, quiet)
    file.write_bytes(b"PAR1")
    with pytest.raises(UserError, match="cannot be read"):
        upkeep.import_(file, tmp_path / "new.sqlite", 100, quiet)
    assert not (tmp_path / "new.sqlite").exists()


def test_another_models_export_is_refused(store, path, tmp_path):
    upkeep.export(path, tmp_path / "out.parquet", quiet)
    Store(tmp_path / "other.sqlite", "b" * 32, 32).close()
    with pytest.raises(UserError, match="holds vectors of model"):
        upkeep.import_(tmp_path / "out.parquet", tmp_path / "other.sqlite", 100, quiet)


def test_a_full_disk_is_one_sentence(tmp_path, path, vectors):
    big = Store(path, MODEL, 512)
    x = vectors(1000, dimension=512)
    big.enrol_many([(f"s{number}", row[None]) for number, row in enumerate(x)])
    with small_disk(tmp_path / "small") as small:
        for work in (upkeep.backup, upkeep.export):
            with pytest.raises(UserError, match="is full"):
                work(path, small / "copy", quiet)
            assert list(small.iterdir()) == []
    big.close()


def test_the_command_line(store, path, tmp_path):
    run = CliRunner()
    told = run.invoke(app, ["gallery", "stats", "--store", str(path)]).output
    assert "9 subjects with 27 samples" in told
    assert run.invoke(app, ["gallery", "backup", "--store", str(path), "--out", str(tmp_path / "b")]).exit_code == 0
    assert run.invoke(app, ["gallery", "restore", str(tmp_path / "b"), "--store", str(tmp_path / "c")]).exit_code == 0
    store.close()
    assert "nothing is wrong" in run.invoke(app, ["gallery", "verify", "--store", str(path)]).output
