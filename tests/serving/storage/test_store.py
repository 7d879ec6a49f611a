import errno
import os
import sqlite3
import stat
import uuid

import numpy as np
import pytest

from serving.storage import database
from serving.storage.changes import IdempotencyKey, KeyReused, StoreError, SubjectFull, SubjectUnknown
from serving.storage.reading import SAMPLES
from serving.storage.store import Store
from trainer.errors import UserError

MODEL, OTHER = "a" * 32, "b" * 32


@pytest.fixture
def opened(tmp_path):
    store = Store(tmp_path / "gallery.db", MODEL, 32)
    yield store
    store.close()


def _all(store):
    """{subject: {sample: vector}}"""
    found = {}
    for subject_ids, sample_ids, vectors_BD, *_ in store.samples():
        for subject_id, sample_id, vector in zip(subject_ids, sample_ids, vectors_BD, strict=True):
            found.setdefault(subject_id, {})[str(uuid.UUID(bytes=sample_id))] = vector
    return found


def test_what_was_enrolled_comes_back_bit_for_bit(tmp_path, vectors):
    x = vectors(5)
    store = Store(tmp_path / "gallery.db", MODEL, 32)
    first = store.enrol("alice", x[:2])
    second = store.enrol("alice", x[2:3])
    third = store.enrol("bob", x[3:])
    store.close()
    store = Store(tmp_path / "gallery.db", MODEL, 32)
    found = _all(store)
    state = store.state()
    store.close()
    assert (first.subject_created, first.subject_samples, first.gallery_size) == (True, 2, 1)
    assert (second.subject_created, second.subject_samples, second.gallery_size) == (False, 3, 1)
    assert (third.subject_created, third.subject_samples, third.gallery_size) == (True, 2, 2)
    assert (state.subjects, state.samples, state.revision) == (2, 5, 3)
    expected = {"alice": (first.sample_ids + second.sample_ids, x[:3]), "bob": (third.sample_ids, x[3:])}
    for subject_id, (sample_ids, rows) in expected.items():
        for sample_id, row in zip(sample_ids, rows, strict=True):
            np.testing.assert_array_equal(found[subject_id].pop(sample_id), row)
        assert not found[subject_id]


def test_durability_is_switched_on(opened):
    pragma = {
        name: opened._database.writer.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous", "foreign_keys", "secure_delete")
    }
    assert pragma == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "secure_delete": 1}
    assert stat.S_IMODE(os.stat(opened.path).st_mode) == 0o600


def test_unknown_subjects_cannot_be_deleted(opened):
    with pytest.raises(SubjectUnknown, match="no subject 'nobody'"):
        opened.delete("nobody")
    assert opened.state().revision == 0


def test_too_many_samples_change_nothing(opened, vectors):
    opened.enrol("alice", vectors(3), max_samples=4)
    with pytest.raises(SubjectFull, match="holds 3 samples and 2 more were sent; at most 4"):
        opened.enrol("alice", vectors(2), max_samples=4)
    with pytest.raises(SubjectFull):
        opened.enrol("bob", vectors(5), max_samples=4)
    assert (opened.state().subjects, opened.state().samples) == (1, 3)


def test_a_key_applies_once(opened, vectors):
    key = IdempotencyKey("k1", b"digest")
    assert opened.recall(key, "alice") is None
    first = opened.enrol("alice", vectors(2), key=key)
    again = opened.enrol("alice", vectors(2), key=key)
    assert not first.replayed
    assert again.replayed
    assert again.sample_ids == first.sample_ids == opened.recall(key, "alice").sample_ids
    assert opened.state().samples == 2
    with pytest.raises(KeyReused, match="'k1' was used for another request"):
        opened.enrol("bob", vectors(1), key=IdempotencyKey("k1", b"other"))
    with pytest.raises(KeyReused):
        opened.delete("alice", key=IdempotencyKey("k1", b"other"))
    gone = IdempotencyKey("k2", b"deletion")
    assert not opened.delete("alice", gone).replayed
    assert opened.delete("alice", gone).replayed
    for other in (lambda: opened.delete("alice", key), lambda: opened.enrol("alice", vectors(1), key=gone)):
        with pytest.raises(KeyReused):
            other()
    # A late repetition of the enrolment does not bring the subject back.
    assert opened.enrol("alice", vectors(2), key=key).replayed
    assert opened.state().subjects == 0


def test_old_keys_are_forgotten(tmp_path, vectors):
    store = Store(tmp_path / "gallery.db", MODEL, 32, key_hours=0)
    key = IdempotencyKey("k", b"digest")
    store.enrol("alice", vectors(1), key=key)
    second = store.enrol("alice", vectors(1), key=key)
    (kept,) = store._database.reader.execute("SELECT count(*) FROM idempotency").fetchone()
    store.close()
    assert (second.replayed, second.subject_samples, kept) == (False, 2, 1)


def test_pages(opened, vectors):
    for number in range(7):
        opened.enrol(f"s{number}", vectors(number % 2 + 1))
    opened.delete("s3")
    first = opened.subjects(0, 4)
    rest = opened.subjects(first[-1].position, 4)
    assert [row.subject_id for row in first + rest] == ["s0", "s1", "s2", "s4", "s5", "s6"]
    assert [row.samples for row in first] == [1, 2, 1, 1]


def test_models_never_meet(tmp_path):
    Store(tmp_path / "gallery.db", MODEL, 32).close()
    with pytest.raises(UserError, match=f"vectors of model {MODEL} .* but the embedder is model {OTHER}"):
        Store(tmp_path / "gallery.db", OTHER, 32)
    with pytest.raises(UserError, match=r"\(dimension 32\), but .* \(dimension 64\)"):
        Store(tmp_path / "gallery.db", MODEL, 64)
    Store(tmp_path / "gallery.db", MODEL, 32).close()  # a refusal leaves the file free and unchanged


def test_one_process_at_a_time(opened):
    with pytest.raises(UserError, match="is in use by another process"):
        Store(opened.path, MODEL, 32)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_another_name_of_the_file_is_no_way_around(opened, link):
    link(opened.path, opened.path.with_name("other.db"))
    with pytest.raises(UserError, match="is in use by another process"):
        Store(opened.path.with_name("other.db"), MODEL, 32)
    assert {path.name for path in opened.path.parent.iterdir()} == {
        "gallery.db",
        "gallery.db-wal",
        "gallery.db-shm",
        "gallery.db-mark",
        "other.db",
    }


@pytest.mark.parametrize("name", ["a?mode=memory.db", "100%25 faces#1.db", "gesichter-ä.db", "-flag.db"])
def test_any_name_of_a_file_will_do(tmp_path, vectors, name):
    for count in (0, 1):
        store = Store(tmp_path / name, MODEL, 32)
        assert store.state().subjects == count
        store.enrol(f"s{count}", vectors(1))
        store.close()
    assert {path.name for path in tmp_path.iterdir()} == {name, f"{name}-mark"}


def test_a_verification_ends_when_it_is_told_to(tmp_path, vectors, monkeypatch):
    monkeypatch.setattr("serving.storage.verification.STEPS_A_QUESTION", 100)
    store = Store(tmp_path / "gallery.db", MODEL, 32)
    store.enrol("alice", vectors(90))
    asked = []

    def stopping():
        asked.append(1)
        return len(asked) > 3

    with pytest.raises(StoreError, match="SQLITE_INTERRUPT"):
        store.verify(stopping)
    store.verify()
    store.close()


def test_log_and_mark_lie_beside_the_file_that_a_link_leads_to(tmp_path, vectors):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.db").symlink_to(tmp_path / "real" / "gallery.db")
    store = Store(tmp_path / "link.db", MODEL, 32)
    store.enrol("alice", vectors(1))
    store.close()
    assert {path.name for path in (tmp_path / "real").iterdir()} == {"gallery.db", "gallery.db-mark"}
    store = Store(tmp_path / "real" / "gallery.db", MODEL, 32)
    assert store.state().subjects == 1
    store.close()


def _steps(connection, act):
    """SQLite's steps, in hundreds."""
    count = 0

    def step():
        nonlocal count
        count += 1
        return 0

    connection.set_progress_handler(step, 100)
    act()
    connection.set_progress_handler(None, 0)
    return count


def _questions(store):
    """As `_steps`, of the verification, which asks so often whether to stop."""
    asked = []
    store.verify(lambda: bool(asked.append(1)))
    return len(asked)


def test_a_start_reads_every_row_once(tmp_path, vectors, monkeypatch):
    """The work grows as the gallery does, not as its square; a page of subjects and a change cost the same always."""
    monkeypatch.setattr("serving.storage.verification.STEPS_A_QUESTION", 100)
    x, costs = vectors(20, dimension=8), []
    store = Store(tmp_path / "gallery.db", MODEL, 8)
    for total in (50, 200):
        for number in range(store.state().subjects, total):
            store.enrol(f"s{number}", x)
        costs.append(
            (
                _steps(store._database.reader, lambda: list(store.samples(settled=True))),
                _questions(store),
                _steps(store._database.reader, lambda: store.subjects(0, 50)),
                _steps(store._database.writer, lambda total=total: store.enrol(f"s{total}", x)),
            )
        )
    (walk, check, page, change), (walk_4, check_4, page_4, change_4) = costs
    assert min(walk, check) > 100
    assert walk_4 < 4.5 * walk
    assert check_4 < 4.5 * check
    assert page_4 <= page + 2  # it takes two statements, each of which is counted in hundreds
    assert change_4 <= change + 1
    store.close()


def test_samples_are_walked_by_their_numbers_with_a_look_at_their_subject(opened):
    plan = opened._database.reader.execute(
        f"EXPLAIN QUERY PLAN {SAMPLES} WHERE samples.id > 0 AND subject_id <> 1 ORDER BY samples.id LIMIT 9"
    ).fetchall()
    assert [row[3] for row in plan] == [
        "SEARCH samples USING INTEGER PRIMARY KEY (rowid>?)",
        "SEARCH subjects USING INTEGER PRIMARY KEY (rowid=?)",
    ]


def test_opening_costs_the_same_however_many_are_enrolled(tmp_path, vectors, monkeypatch):
    x, costs = vectors(20, dimension=8), []

    def counting(connect):
        def open_(*arguments):
            connection = connect(*arguments)
            connection.set_progress_handler(lambda: costs.append(1), 100)
            return connection

        return open_

    monkeypatch.setattr("serving.storage.database._connect", counting(database._connect))
    Store(tmp_path / "gallery.db", MODEL, 8).close()
    counts = []
    for total in (1, 100):
        store = Store(tmp_path / "gallery.db", MODEL, 8)
        for number in range(store.state().subjects, total):
            store.enrol(f"s{number}", x)
        store.close()
        costs.clear()
        Store(tmp_path / "gallery.db", MODEL, 8).close()
        counts.append(len(costs))
    assert counts[1] <= counts[0] + 1


def test_other_peoples_files_are_left_alone(tmp_path):
    with sqlite3.connect(tmp_path / "theirs.db") as theirs:
        theirs.execute("CREATE TABLE notes (text)")
    theirs.close()
    before = (tmp_path / "theirs.db").read_bytes()
    with pytest.raises(UserError, match="another program's database"):
        Store(tmp_path / "theirs.db", MODEL, 32)
    assert (tmp_path / "theirs.db").read_bytes() == before
    (tmp_path / "text.db").write_text("This is not a database, and longer than its header would be." * 20)
    with pytest.raises(UserError, match="file is not a database"):
        Store(tmp_path / "text.db", MODEL, 32)


def test_a_newer_schema_is_refused(tmp_path):
    Store(tmp_path / "gallery.db", MODEL, 32).close()
    connection = sqlite3.connect(tmp_path / "gallery.db")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(UserError, match="has schema 99, but this version"):
        Store(tmp_path / "gallery.db", MODEL, 32)


@pytest.mark.parametrize("place", ["missing/gallery.db", "."])
def test_impossible_places_are_refused(tmp_path, place):
    with pytest.raises(UserError, match="--store"):
        Store(tmp_path / place, MODEL, 32)


def test_a_full_disk_is_an_error_and_loses_nothing(opened, vectors):
    x = vectors(400 * 8).reshape(400, 8, 32)
    opened._database.writer.execute("PRAGMA max_page_count = 20")
    acknowledged = {}

    def fill():
        for number, rows in enumerate(x):
            acknowledged[f"s{number}"] = list(opened.enrol(f"s{number}", rows).sample_ids)

    with pytest.raises(StoreError, match="SQLITE_FULL"):
        fill()
    found = _all(opened)
    assert {subject_id: list(samples) for subject_id, samples in found.items()} == acknowledged
    assert opened.state().samples == 8 * len(acknowledged) > 10
    opened._database.writer.execute("PRAGMA max_page_count = 100000")
    opened.enrol("after", x[0])
    assert "after" in _all(opened)


@pytest.mark.parametrize("call", ["os.open", "os.fsync", "os.replace", "os.pwrite", "fcntl.flock"])
def test_a_disk_that_fails_at_the_start_is_one_sentence(tmp_path, monkeypatch, call):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(call, fail)
        with pytest.raises(UserError, match=r"gallery\.db' cannot be used: No space left on device; --store takes"):
            Store(tmp_path / "gallery.db", MODEL, 32)
    store = Store(tmp_path / "gallery.db", MODEL, 32)
    assert store.state().samples == 0
    store.close()


def test_a_closed_store_says_so(tmp_path, vectors):
    store = Store(tmp_path / "gallery.db", MODEL, 32)
    store.close()
    store.close()
    for ask in (lambda: store.enrol("alice", vectors(1)), store.state, store.check):
        with pytest.raises(StoreError, match="closed"):
            ask()
