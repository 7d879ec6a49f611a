"""Stores that earlier versions wrote open, keep everything, and get what later versions promise."""

import hashlib
import json
import sqlite3
import subprocess
import sys
import uuid
from contextlib import closing
from datetime import UTC, datetime

import pytest

import serving.storage.migrations
from serving.gallery import Gallery
from serving.storage.changes import Attached, IdempotencyKey, KeyReused, State
from serving.storage.mark import read_mark
from serving.storage.migrations import migrate
from serving.storage.schema import VERSION, Target
from serving.storage.store import Store
from serving.threshold import Rule
from tests.serving.galleries import third_schema
from trainer.errors import UserError

MODEL = "a" * 32
NOW = datetime.now(UTC).isoformat(timespec="milliseconds")


class Killed(Exception):
    pass


def _first_schema(path, x, stop=None):
    """A store as the first version wrote it: two subjects, one erased, two keys. Returns {subject: sample ids}."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    migrate(connection, Target(path, path, MODEL, 32, 0), to=1)
    connection.execute(
        "INSERT INTO galleries (name, model_id, dimension, subjects, samples, revision, created) "
        "VALUES ('default', ?, 32, 2, 3, 4, ?)",
        (MODEL, NOW),
    )
    ids = {"alice": [], "zoë": []}
    for number, subject_id, rows in ((1, "alice", x[:2]), (3, "zoë", x[2:3])):
        connection.execute("INSERT INTO subjects VALUES (?, 1, ?, ?)", (number, subject_id, NOW))
        for row in rows:
            sample_id, blob = str(uuid.uuid4()), row.tobytes()
            seal = hashlib.blake2b(f"{subject_id}\0{sample_id}\0".encode() + blob, digest_size=16).digest()
            connection.execute(
                "INSERT INTO samples (subject_id, sample_id, vector, checksum, created) VALUES (?, ?, ?, ?, ?)",
                (number, sample_id, blob, seal, NOW),
            )
            ids[subject_id].append(sample_id)
    enrolled = {
        "subject_id": "bob",
        "sample_ids": [str(uuid.uuid4())],
        "subject_created": True,
        "subject_samples": 1,
        "gallery_size": 2,
        "replayed": False,
    }
    erased = {"subject_id": "bob", "samples": 1, "replayed": False}
    for key, outcome in (("enrol bob", enrolled), ("erase bob", erased)):
        connection.execute("INSERT INTO idempotency VALUES (?, ?, ?, ?)", (key, b"digest", json.dumps(outcome), NOW))
    connection.close()
    return ids


def test_a_store_of_the_first_schema_is_brought_up_to_date(tmp_path, vectors):
    path, x = tmp_path / "gallery.db", vectors(3)
    ids = _first_schema(path, x)
    gallery = Gallery(Store(path, MODEL, 32), Rule(0.5, ""), Rule(0.5, ""))
    gallery.load()
    rows = gallery.subjects(0, 10)
    assert [(row.subject_id, row.samples, row.created) for row in rows] == [("alice", 2, NOW), ("zoë", 1, NOW)]
    assert gallery.check().revision == 4
    for row, (subject_id, place) in zip(x, (("alice", 0), ("alice", 1), ("zoë", 0)), strict=True):
        (found,) = gallery.identify(row, 1).candidates
        assert (found.subject_id, found.sample_id) == (subject_id, ids[subject_id][place])
    assert gallery.enrol("bob", x[:1], IdempotencyKey("enrol bob", b"digest")).replayed
    assert gallery.delete("bob", IdempotencyKey("erase bob", b"digest")).replayed
    with pytest.raises(KeyReused):
        gallery.replay(IdempotencyKey("enrol bob", b"another"), "bob")
    assert gallery.subjects(rows[0].position, 10)[0].subject_id == "zoë"
    gallery.delete("alice")
    gallery.close()
    assert read_mark(tmp_path / "gallery.db-mark").revision == 5
    content = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"zo" in content
    for erased in (b"alice", b"bob", x[0].tobytes(), x[1].tobytes()):
        assert erased not in content


def test_another_models_store_is_refused_before_it_is_touched(tmp_path, vectors):
    path = tmp_path / "gallery.db"
    _first_schema(path, vectors(3))
    before = path.read_bytes()
    with pytest.raises(UserError, match="two models cannot be compared"):
        Store(path, "b" * 32, 32)
    assert path.read_bytes() == before
    assert not (tmp_path / "gallery.db-mark").exists()


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE samples SET vector = zeroblob(128) WHERE id = 2",
        "UPDATE samples SET created = 'yesterday' WHERE id = 2",
        "UPDATE subjects SET external_id = 'alicf' WHERE id = 1",
        "UPDATE subjects SET external_id = CAST(x'ff' AS TEXT) WHERE id = 1",
        "UPDATE idempotency SET outcome = '{' WHERE key = 'enrol bob'",
        "UPDATE galleries SET samples = 4",
    ],
)
def test_a_damaged_store_of_the_first_schema_is_refused(tmp_path, vectors, damage):
    path = tmp_path / "gallery.db"
    _first_schema(path, vectors(3))
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(damage)
    connection.close()
    with pytest.raises(UserError, match=r"gallery\.db"):
        Gallery(Store(path, MODEL, 32), Rule(0.5, ""), Rule(0.5, "")).load()


@pytest.mark.parametrize("step", range(2, VERSION + 1))
@pytest.mark.parametrize("place", ["Operations.context", "commit"])
def test_a_migration_that_is_cut_off_goes_on(tmp_path, vectors, monkeypatch, step, place):
    """Before the first act of a step, and after its last one."""
    path, x, left = tmp_path / "gallery.db", vectors(3), iter(range(2, step))
    _first_schema(path, x)
    act = serving.storage.migrations.commit if place == "commit" else serving.storage.migrations.Operations.context

    def cut(*arguments):
        if next(left, None) is None:
            raise Killed
        return act(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(f"serving.storage.migrations.{place}", cut)
        with pytest.raises(Killed):
            Store(path, MODEL, 32)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (step - 1,)
    gallery = Gallery(Store(path, MODEL, 32), Rule(0.5, ""), Rule(0.5, ""))
    gallery.load()
    assert gallery.check().samples == 3
    gallery.close()


def test_a_new_store_that_is_cut_off_is_made_again(tmp_path, monkeypatch):
    def cut(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("serving.storage.schema.commit", cut)
        with pytest.raises(Killed):
            Store(tmp_path / "gallery.db", MODEL, 32)
    Store(tmp_path / "gallery.db", MODEL, 32).close()


def _definitions(path):
    with closing(sqlite3.connect(path)) as connection:
        found = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema").fetchall()
    return sorted(str(row).split() for row in found)


def test_the_steps_lead_to_the_schema_of_a_new_store(tmp_path, vectors):
    _first_schema(tmp_path / "old.db", vectors(3))
    for name in ("old.db", "new.db"):
        Store(tmp_path / name, MODEL, 32).close()
    assert _definitions(tmp_path / "old.db") == _definitions(tmp_path / "new.db")


def test_a_store_without_metadata_is_brought_up_to_date(tmp_path, vectors):
    """Written by the version before: alice with two samples, zoë and carol, and somebody who was erased."""
    path, x = third_schema(tmp_path), vectors(5)
    gallery = Gallery(Store(path, MODEL, 32), Rule(0.5, ""), Rule(0.5, ""))
    gallery.load()
    assert [(row.subject_id, row.samples, row.revision) for row in gallery.subjects(0, 10)] == [
        ("alice", 2, 4),
        ("zoë", 1, 4),
        ("carol", 1, 4),
    ]
    for row, subject_id in zip(x, ("alice", "alice", None, "zoë", "carol"), strict=True):
        found = gallery.identify(row, 1)
        assert (found.candidates[0].subject_id if found.decision == "match" else None) == subject_id
    gallery.enrol("dave", x[2:3], attached=Attached({"site": "north"}, [0.5], [{"pose": 1}], [b"image"]))
    gallery.delete("zoë")
    gallery.close()
    gallery = Gallery(Store(path, MODEL, 32), Rule(0.5, ""), Rule(0.5, ""))
    gallery.load()
    assert gallery.identify(x[2], 1).candidates[0].subject_id == "dave"
    assert gallery.check() == State(3, 4, 6)
    gallery.close()
    assert x[3].tobytes() not in path.read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE samples SET vector = zeroblob(128) WHERE id = 2",
        "UPDATE subjects SET created = created + 1 WHERE name = x'616c696365'",
        "DELETE FROM samples WHERE id = 2",
        "UPDATE gallery SET samples = 9",
    ],
)
def test_a_damaged_store_without_metadata_is_refused(tmp_path, damage):
    path = third_schema(tmp_path)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(damage)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"gallery\.db' cannot be opened"):
        Store(path, MODEL, 32)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (3,)
    assert path.read_bytes() == before


def test_an_older_schema_beside_a_mark_has_lost_what_came_after(tmp_path, vectors):
    path = tmp_path / "gallery.db"
    _first_schema(path, vectors(3))
    old = path.read_bytes()
    store = Store(path, MODEL, 32)
    store.enrol("carol", vectors(1))
    store.close()
    path.write_bytes(old)
    with pytest.raises(UserError, match=r"is older than its mark.*5 changes were acknowledged.*--restored"):
        Store(path, MODEL, 32)
    store = Store(path, MODEL, 32, restored=True)
    assert store.state().subjects == 2
    store.close()
    Store(path, MODEL, 32).close()


def test_nothing_of_alembic_is_imported_where_nothing_is_to_do(tmp_path):
    code = (
        "import sys; from pathlib import Path; from serving.storage.store import Store; "
        f"Store(Path(sys.argv[1]), '{MODEL}', 32).close(); print('alembic' in sys.modules, 'sqlalchemy' in sys.modules)"
    )
    for _ in ("made", "opened"):
        command = [sys.executable, "-c", code, tmp_path / "gallery.db"]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False False\n"
