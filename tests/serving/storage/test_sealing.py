"""Stores that are encrypted at rest: nothing can be read without the key, and everything works with it."""

import os
import sqlite3
import stat
from contextlib import closing

import numpy as np
import pytest
from typer.testing import CliRunner

from serving import upkeep
from serving.cli import app
from serving.gallery import Gallery
from serving.storage import rows
from serving.storage.changes import Attached, IdempotencyKey, StoreError
from serving.storage.sealing import make_key, read_key
from serving.storage.store import Store
from serving.threshold import Rule
from tests.serving.galleries import MODEL
from trainer.errors import UserError

KEY, OTHER = b"k" * 32, b"o" * 32
FULL = Attached({"site": "north of here"}, [0.5], [{"camera": "by the door"}], [b"the bytes of an image" * 300])


def _open(path, key=KEY):
    return closing(Store(path, MODEL, 32, key=key))


def _bytes(folder):
    return b"".join(path.read_bytes() for path in folder.iterdir() if path.is_file())


def _content(store):
    store.verify()
    sums = sum(len(piece.subject_ids) for piece in store.samples(settled=True))
    listed = [store.subject(row.subject_id) for row in store.subjects(0, 100)]
    pairs = [(row, one) for row, samples in listed for one in samples]
    images = [store.image(row.subject_id, one.sample_id) for row, one in pairs]
    vectors = [store.sample(row.subject_id, one.sample_id)[1].tobytes() for row, one in pairs]
    return sums, listed, images, vectors, store.matching({"site": "north of here"})


@pytest.fixture
def path(tmp_path):
    (tmp_path / "store").mkdir()
    return tmp_path / "store" / "gallery.db"


@pytest.fixture
def content(path, vectors):
    """What an encrypted store holds: two subjects described, one merged into another, one erased."""
    x = vectors(6)
    with _open(path) as store:
        store.enrol("Zebedee Quux", x[:1], attached=FULL, key=IdempotencyKey("k", b"r"))
        store.enrol_many([("Bob Merged", x[1:2]), ("Carol", x[2:3])], attached=[FULL, FULL])
        store.enrol("Erased Person", x[3:4], attached=FULL)
        store.merge("Zebedee Quux", "Bob Merged")
        store.update("Carol", {"site": "elsewhere", "n": 4})
        store.delete("Erased Person")
        found = _content(store)
    assert found[0] == 3
    assert found[3] == [row.tobytes() for row in x[:3]]
    assert found[2] == [FULL.images[0]] * 3
    assert found[4] == ["Zebedee Quux"]
    return found


def test_nothing_can_be_read_and_everything_comes_back(path, content, vectors):
    found = _bytes(path.parent)
    for plain in (b"Zebedee", b"Bob", b"Carol", b"Erased", b"north", b"elsewhere", b"by the door", b"the bytes of an"):
        assert plain not in found
    assert not any(row.tobytes() in found or row[8:16].tobytes() in found for row in vectors(6))
    with _open(path) as store:
        assert store._secret not in found
        assert _content(store) == content


def test_another_key_none_and_one_too_many_are_one_sentence(path, content, tmp_path):
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"gallery\.db' is encrypted under another key"):
        Store(path, MODEL, 32, key=OTHER)
    with pytest.raises(UserError, match="is encrypted; give the file of its key with --encryption-key-file"):
        Store(path, MODEL, 32)
    assert path.read_bytes() == before
    Store(tmp_path / "plain.db", MODEL, 32).close()
    with pytest.raises(UserError, match="is not encrypted, but an --encryption-key-file was given"):
        Store(tmp_path / "plain.db", MODEL, 32, key=KEY)
    for work in (
        lambda key: upkeep.verify(path, print, key),
        lambda key: upkeep.export(path, tmp_path / "out", print, key),
        lambda key: upkeep.restore(path, tmp_path / "new.db", print, key),
    ):
        for key in (None, OTHER):
            with pytest.raises(UserError, match="encrypted"):
                work(key)
    assert not {"out", "new.db"} & {file.name for file in tmp_path.iterdir()}


def test_an_erased_subjects_data_key_is_gone(path, vectors):
    with _open(path) as store:
        store.enrol("alice", vectors(1), attached=FULL)
        (wrapped,) = store._database.reader.execute("SELECT key FROM subjects WHERE digest IS NOT NULL").fetchone()
        assert len(wrapped) == 60
        assert wrapped in _bytes(path.parent)
        store.delete("alice")
        assert wrapped not in _bytes(path.parent)
    assert wrapped not in _bytes(path.parent)


def test_places_of_the_erased_are_taken_again(path, vectors):
    x = vectors(40)
    with _open(path) as store:
        for number, row in enumerate(x):
            store.enrol(f"s{number}", row[None], attached=FULL)
            if number % 2:
                store.delete(f"s{number - 1}")
        (places,) = store._database.reader.execute("SELECT count(*) FROM samples").fetchone()
        assert places == 21
        assert _content(store)[3] == [row.tobytes() for row in x[1::2]]


def test_the_key_is_changed_at_once_or_not_at_all(path, content, monkeypatch):
    with sqlite3.connect(path) as connection:
        before = [key for (key,) in connection.execute("SELECT key FROM subjects WHERE digest IS NOT NULL")]
    connection.close()
    with monkeypatch.context() as patch:
        patch.setattr("serving.storage.writing.rows.write_gallery", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            upkeep.change_key(path, KEY, OTHER)
    with _open(path) as store:
        assert _content(store) == content
    assert upkeep.change_key(path, KEY, OTHER) == 2
    found = _bytes(path.parent)
    assert not any(key in found for key in before)
    with pytest.raises(UserError, match="another key"):
        upkeep.change_key(path, KEY, OTHER)
    with _open(path, OTHER) as store:
        assert _content(store) == content  # revisions too


def test_it_is_copied_and_moved(path, content, tmp_path):
    copy, again, out, plain = (tmp_path / name for name in ("copy", "again.db", "out.parquet", "plain.db"))
    upkeep.backup(path, copy, lambda *_: None)
    assert b"Zebedee" not in copy.read_bytes()
    upkeep.restore(copy, again, lambda *_: None, KEY)
    assert upkeep.verify(again, lambda *_: None, KEY).samples == 3
    with _open(again) as store:
        assert _content(store) == content
    upkeep.export(path, out, lambda *_: None, KEY)
    upkeep.import_(out, plain, 100, lambda *_: None)
    upkeep.import_(out, tmp_path / "other.db", 100, lambda *_: None, OTHER)
    for file, key in ((plain, None), (tmp_path / "other.db", OTHER)):
        with _open(file, key) as store:
            assert _content(store)[2:] == content[2:]


@pytest.mark.parametrize("column", ["vector", "name", "key"])
def test_what_was_exchanged_with_its_checksums_is_found(path, content, column):
    """By whoever can write the file, but has no key: his values in place of others, with new checksums."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        subjects = "SELECT id, digest, created, updated, revision, key, name FROM subjects WHERE digest IS NOT NULL"
        one, other = connection.execute(subjects).fetchall()
        samples = "SELECT id, subject_id, created, sample_id, quality, vector FROM samples WHERE subject_id = ?"
        mine, theirs = (connection.execute(samples, (row[0],)).fetchone() for row in (one, other))
        key, name = (other[5] if column == "key" else one[5]), (other[6] if column == "name" else one[6])
        vector = theirs[5] if column == "vector" else mine[5]
        seal = rows.checksum(*one[:5], key, name)
        connection.execute("UPDATE subjects SET key=?, name=?, checksum=? WHERE id=?", (key, name, seal, one[0]))
        for sample in connection.execute(samples, (one[0],)).fetchall():
            blob = vector if sample[0] == mine[0] else sample[5]
            seal = rows.checksum(*sample[1:5], name, blob)
            connection.execute("UPDATE samples SET vector=?, checksum=? WHERE id=?", (blob, seal, sample[0]))
    with _open(path) as store, pytest.raises((UserError, StoreError), match="cannot be decrypted"):
        list(store.samples())


def test_a_gallery_of_an_encrypted_store_has_no_snapshot(path, vectors, monkeypatch):
    monkeypatch.setattr("serving.search.keeping.LEAST_SAMPLES", 1)
    x = vectors(30)
    for _ in range(2):
        gallery = Gallery(Store(path, MODEL, 32, key=KEY), Rule(0.5, ""), Rule(0.5, ""))
        gallery.load()
        if not gallery.size:
            gallery.enrol_many([(f"s{number}", row[None]) for number, row in enumerate(x)])
        assert [gallery.identify(row, 1).candidates[0].subject_id for row in x] == [f"s{n}" for n in range(30)]
        gallery.close()
    assert not any(row.tobytes() in _bytes(path.parent) for row in x)
    assert {file.name for file in path.parent.iterdir()} == {"gallery.db", "gallery.db-mark"}


@pytest.mark.parametrize("text", ["", "k" * 32, "0" * 63, "0" * 65, "z" * 64, "0" * 32 + "\n" + "0" * 32])
def test_what_is_no_key_file_is_refused(tmp_path, text):
    (tmp_path / "key").write_text(text)
    with pytest.raises(UserError, match="64 hexadecimal digits") as refusal:
        read_key(tmp_path / "key")
    assert not text or text not in str(refusal.value)
    (tmp_path / "key").write_bytes(os.urandom(32) + b"\xff")
    for missing in (tmp_path / "key", tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            read_key(missing)


def test_the_command_line(path, tmp_path, content, vectors):
    run, key, new = CliRunner(), tmp_path / "key", tmp_path / "new"
    for file in (key, new):
        assert run.invoke(app, ["gallery", "key", "--out", str(file)]).exit_code == 0
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert run.invoke(app, ["gallery", "key", "--out", str(key)]).exit_code != 0
    upkeep.change_key(path, KEY, read_key(key))
    common = ["--store", str(path), "--encryption-key-file"]
    assert "under the key of" in run.invoke(app, ["gallery", "rekey", str(new), *common, str(key)]).output
    assert "nothing is wrong" in run.invoke(app, ["gallery", "verify", *common, str(new)]).output
    environment = {"HYPERSPHERE_ENCRYPTION_KEY_FILE": str(new)}
    told = run.invoke(app, ["gallery", "verify", "--store", str(path)], env=environment)
    assert "nothing is wrong" in told.output
    assert run.invoke(app, ["gallery", "rekey", str(new), "--store", str(path)]).exit_code != 0
    assert read_key(new) != read_key(key)


def test_the_service_serves_an_encrypted_store_by_templates(serve, tmp_path, vectors):
    x, key = vectors(2), tmp_path / "key"
    make_key(key)
    for _ in ("made", "opened again"):
        server = serve(template="mean", encryption_key_file=key)
        if not server.http.get("/readyz").json()["gallery_size"]:
            body = {"embeddings": x.tolist(), "metadata": {"site": "north of here"}}
            assert server.http.post("/v1/subjects/Zebedee/samples", json=body).status_code == 201
        (found,) = server.http.post("/v1/identify", json={"embedding": x[0].tolist(), "below_threshold": True}).json()[
            "candidates"
        ]
        mean = x.mean(axis=0) / np.linalg.norm(x.mean(axis=0))
        assert (found["subject_id"], found["sample_id"]) == ("Zebedee", None)
        assert found["score"] == pytest.approx(float(mean @ x[0]), abs=1e-5)
        assert server.http.get("/readyz").json()["samples"] == 2
        assert server.http.get("/v1/subjects/Zebedee").json()["metadata"] == {"site": "north of here"}
        server.end()
    content = b"".join(file.read_bytes() for file in tmp_path.glob("gallery.db*"))
    assert b"Zebedee" not in content
    assert b"north of here" not in content
    with pytest.raises(AssertionError, match="is encrypted; give the file of its key with --encryption-key-file"):
        serve()
