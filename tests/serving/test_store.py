import os
import sqlite3
import stat

import numpy as np
import pytest

from serving.store import IdempotencyKey, KeyReused, Store, StoreError, SubjectFull, SubjectUnknown
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
    for subject_ids, sample_ids, vectors_BD in store.samples():
        for subject_id, sample_id, vector in zip(subject_ids, sample_ids, vectors_BD, strict=True):
            found.setdefault(subject_id, {})[sample_id] = vector
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
        name: opened._writer.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous", "foreign_keys", "secure_delete")
    }
    assert pragma == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "secure_delete": 1}
    assert stat.S_IMODE(os.stat(opened.path).st_mode) == 0o600


def test_erased_vectors_are_in_no_file(opened, vectors):
    """Neither in freed pages nor in the write-ahead log."""
    x = vectors(40)
    for number, row in enumerate(x):
        opened.enrol(f"s{number}", row[None])
    folder = opened.path.parent
    assert x[7].tobytes() in b"".join(path.read_bytes() for path in folder.iterdir())
    deletion = opened.delete("s7")
    assert deletion.samples == 1
    content = b"".join(path.read_bytes() for path in folder.iterdir())
    assert x[7].tobytes() not in content
    assert x[8].tobytes() in content
    assert "s7" not in _all(opened)


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
    assert opened.recall(key) is None
    first = opened.enrol("alice", vectors(2), key=key)
    again = opened.enrol("alice", vectors(2), key=key)
    assert not first.replayed
    assert again.replayed
    assert again.sample_ids == first.sample_ids == opened.recall(key).sample_ids
    assert opened.state().samples == 2
    with pytest.raises(KeyReused, match="'k1' was used for another request"):
        opened.enrol("bob", vectors(1), key=IdempotencyKey("k1", b"other"))
    with pytest.raises(KeyReused):
        opened.delete("alice", key=IdempotencyKey("k1", b"other"))
    gone = IdempotencyKey("k2", b"deletion")
    assert not opened.delete("alice", gone).replayed
    assert opened.delete("alice", gone).replayed
    # A late repetition of the enrolment does not bring the subject back.
    assert opened.enrol("alice", vectors(2), key=key).replayed
    assert opened.state().subjects == 0


def test_old_keys_are_forgotten(tmp_path, vectors):
    store = Store(tmp_path / "gallery.db", MODEL, 32, key_hours=0)
    key = IdempotencyKey("k", b"digest")
    store.enrol("alice", vectors(1), key=key)
    second = store.enrol("alice", vectors(1), key=key)
    (kept,) = store._reader.execute("SELECT count(*) FROM idempotency").fetchone()
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


def test_every_flipped_byte_of_a_vector_is_found(tmp_path, vectors):
    x = vectors(3)
    store = Store(tmp_path / "gallery.db", MODEL, 32)
    for number, row in enumerate(x):
        store.enrol(f"s{number}", row[None])
    store.close()
    sound = (tmp_path / "gallery.db").read_bytes()
    start = sound.index(x[1].tobytes())
    for offset in range(0, x[1].nbytes, 7):
        damaged = bytearray(sound)
        damaged[start + offset] ^= 0x10
        (tmp_path / "gallery.db").write_bytes(damaged)
        store = Store(tmp_path / "gallery.db", MODEL, 32)
        with pytest.raises(UserError, match=r"of subject 's1' .* does not have its checksum"):
            list(store.samples())
        store.close()


def test_damage_anywhere_is_found_or_harmless(tmp_path, vectors):
    """One flipped byte at 60 random places: the store refuses, or gives back exactly what was enrolled."""
    x = vectors(60)
    store = Store(tmp_path / "gallery.db", MODEL, 32)
    for number, row in enumerate(x):
        store.enrol(f"s{number}", row[None])
    before = {subject: [row.tobytes() for row in samples.values()] for subject, samples in _all(store).items()}
    store.close()
    sound = (tmp_path / "gallery.db").read_bytes()
    refused = 0
    for place in np.random.default_rng(1).integers(0, len(sound), 60):
        damaged = bytearray(sound)
        damaged[place] ^= 0xFF
        (tmp_path / "gallery.db").write_bytes(damaged)
        try:
            store = Store(tmp_path / "gallery.db", MODEL, 32)
        except UserError:
            refused += 1
            continue
        try:
            found = {subject: [row.tobytes() for row in rows.values()] for subject, rows in _all(store).items()}
            assert found == before
        except (UserError, StoreError):
            refused += 1
        finally:
            store.close()
    assert refused > 10


def test_a_truncated_file_is_refused(tmp_path, vectors):
    store = Store(tmp_path / "gallery.db", MODEL, 32)
    for number, row in enumerate(vectors(60)):
        store.enrol(f"s{number}", row[None])
    store.close()
    sound = (tmp_path / "gallery.db").read_bytes()
    for length in (10, 100, 4096, len(sound) // 2, len(sound) - 4096):
        (tmp_path / "gallery.db").write_bytes(sound[:length])
        with pytest.raises(UserError, match=r"gallery\.db"):
            Store(tmp_path / "gallery.db", MODEL, 32)


def test_a_row_taken_out_behind_its_back_is_noticed(tmp_path, vectors):
    store = Store(tmp_path / "gallery.db", MODEL, 32)
    store.enrol("alice", vectors(2))
    store.close()
    connection = sqlite3.connect(tmp_path / "gallery.db", isolation_level=None)
    connection.execute("DELETE FROM samples WHERE id = 1")
    connection.close()
    with pytest.raises(UserError, match="counts 1 subjects and 2 samples but holds 1 and 1"):
        Store(tmp_path / "gallery.db", MODEL, 32)


def test_a_full_disk_is_an_error_and_loses_nothing(opened, vectors):
    x = vectors(400)
    opened._writer.execute("PRAGMA max_page_count = 20")
    acknowledged = {}

    def fill():
        for number, row in enumerate(x):
            acknowledged[f"s{number}"] = opened.enrol(f"s{number}", row[None]).sample_ids[0]

    with pytest.raises(StoreError, match="SQLITE_FULL"):
        fill()
    found = _all(opened)
    assert {subject_id: list(samples) for subject_id, samples in found.items()} == {
        subject_id: [sample_id] for subject_id, sample_id in acknowledged.items()
    }
    assert opened.state().samples == len(acknowledged) > 10
    opened._writer.execute("PRAGMA max_page_count = 100000")
    opened.enrol("after", x[:1])
    assert "after" in _all(opened)


def test_a_closed_store_says_so(tmp_path, vectors):
    store = Store(tmp_path / "gallery.db", MODEL, 32)
    store.close()
    store.close()
    with pytest.raises(StoreError):
        store.enrol("alice", vectors(1))
    with pytest.raises(StoreError):
        store.state()
