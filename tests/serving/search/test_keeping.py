"""A start from a snapshot ends where a start from the store does, whatever came between; and leaves nothing erased."""

import logging
import shutil
import sqlite3
import subprocess
import sys
import time
import uuid

import numpy as np
import pytest

from serving.gallery import Gallery
from serving.storage.changes import StoreError
from serving.storage.rows import NOBODY
from serving.storage.store import Store
from serving.threshold import Rule
from tests.serving.galleries import MODEL, open_gallery


@pytest.fixture(autouse=True)
def eager(monkeypatch, caplog):
    """Snapshots of the smallest galleries, as soon as something has changed, in small blocks."""
    monkeypatch.setattr("serving.search.keeping.LEAST_SAMPLES", 1)
    monkeypatch.setattr("serving.search.keeping.EVERY_S", 0.0)
    monkeypatch.setattr("serving.search.keeping.MOST_CHANGED", 1e9)
    monkeypatch.setattr("serving.search.projection.PAUSE_S", 0.0)
    monkeypatch.setattr("serving.search.blocks.FIRST_ROWS", 16)
    monkeypatch.setattr("serving.search.blocks.BLOCK_BYTES", 0)
    monkeypatch.setattr("serving.search.snapshot.CHUNK", 4)
    caplog.set_level(logging.INFO, "hypersphere.serving")


def _killed(gallery):
    """The files as a kill leaves them, to be opened again."""
    gallery._projection._closing.set()
    gallery._projection._keeper.close(None, 0)
    gallery._searches.close()
    gallery._store.close()


def _snapshot_taken(gallery):
    keeper = gallery._projection._keeper
    until = time.monotonic() + 60
    while keeper._snapshot.revision != gallery.revision:  # one of before may be under way, or the lock be taken
        assert time.monotonic() < until
        gallery.check()
        if keeper._writing:
            keeper._writing.join()


def _indexed(gallery):
    """{sample: (subject, vector)} of what is searched."""
    index, found = gallery._projection.index, {}
    for block, count in index.parts():
        for row in np.flatnonzero(block.subject_N[:count] >= 0):
            name = index._names[block.subject_N[row]]
            found[block.sample_N[row].tobytes()] = name, block.vectors_NE[row].tobytes()
    return found


def _stored(gallery):
    pieces = gallery._store.samples()
    return {
        sample: (name, row.tobytes())
        for piece in pieces
        for name, sample, row in zip(piece.subject_ids, piece.sample_ids, piece.vectors_BD, strict=True)
    }


def _all_bytes(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("seed", range(4))
def test_whatever_comes_between_a_snapshot_and_a_start_is_followed(tmp_path, vectors, caplog, seed):
    """Enrolments, deletions, merges and single samples, snapshots and ends of every kind, in any order."""
    rng, path = np.random.default_rng(seed), tmp_path / "gallery.db"
    x, gallery, gone, resumed = vectors(3000, seed), open_gallery(path), [], 0
    for step in range(150):
        at, names = 20 * step, sorted({name for name, _ in _stored(gallery).values()})
        kind = rng.choice(["enrol", "more", "delete", "sample", "merge", "snapshot", "stop", "kill"])
        if kind == "enrol" or len(names) < 3:
            gallery.enrol_many([(f"s{step}-{k}", x[at + 2 * k : at + 2 * k + 1 + k % 2]) for k in range(6)])
        elif kind == "more":
            gallery.enrol(names[0], x[at : at + 2])
        elif kind == "delete":
            name = str(rng.choice(names))
            gone += [vector for one, vector in _stored(gallery).values() if one == name]
            gallery.delete(name)
        elif kind == "merge":
            gallery.merge(*map(str, rng.choice(names, 2, replace=False)))
        elif kind == "sample":
            held = [(one, key, v) for key, (one, v) in _stored(gallery).items()]
            several = [item for item in held if sum(item[0] == one for one, _, _ in held) > 1]
            if several:
                name, key, vector = several[int(rng.integers(len(several)))]
                gallery.delete_sample(name, str(uuid.UUID(bytes=key)))
                gone.append(vector)
        elif kind == "snapshot":
            _snapshot_taken(gallery)
        else:
            gallery.close() if kind == "stop" else _killed(gallery)
            caplog.clear()
            gallery = open_gallery(path)
            resumed += "taken from a snapshot" in caplog.text
            assert "removed" not in caplog.text
        assert _indexed(gallery) == _stored(gallery)
        content = _all_bytes(tmp_path)
        assert not any(vector in content for vector in gone)
    assert resumed > 5
    gallery.close()


def test_a_start_from_a_snapshot_answers_as_one_from_the_store(tmp_path, vectors, caplog):
    x = vectors(100)
    first = open_gallery(tmp_path / "gallery.db")
    first.enrol_many([(f"s{number % 40}", x[number : number + 1]) for number in range(100)])
    expected = [first.identify(row, 3) for row in x]
    first.close()
    for form in ("exact", "fp16", "int8"):
        gallery = Gallery(
            Store(tmp_path / "gallery.db", MODEL, 32), Rule(0.5, "a test"), Rule(0.6, "a test"), form=form
        )
        gallery.load()
        assert "taken from a snapshot, and 0 subjects" in caplog.text
        for row, answer in zip(x, expected, strict=True):
            found = gallery.identify(row, 3)
            assert [(one.subject_id, one.sample_id) for one in found.candidates] == [
                (one.subject_id, one.sample_id) for one in answer.candidates
            ]
        gallery.close()
        caplog.clear()


def test_a_store_that_is_older_than_the_snapshot_is_read_anew(tmp_path, vectors, caplog):
    """A plain copy of the files is a backup, and the snapshot beside it may be left over from later."""
    x, path = vectors(30), tmp_path / "gallery.db"
    gallery = open_gallery(path)
    gallery.enrol("alice", x[:10])
    gallery.close()
    copies = {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    gallery = open_gallery(path)
    gallery.enrol("bob", x[10:])
    gallery.close()
    for file, content in copies.items():
        file.write_bytes(content)
    caplog.clear()
    gallery = open_gallery(path)
    assert "later revision than the store" in caplog.text
    assert gallery.samples == 10
    gallery.close()


def test_too_many_changes_are_not_followed_one_by_one_and_what_was_erased_is_gone(
    tmp_path, vectors, caplog, monkeypatch
):
    """A kill after the store's commit left a subject in the snapshot; nobody will delete it again."""
    x, path = vectors(40), tmp_path / "gallery.db"
    gallery = open_gallery(path)
    gallery.enrol_many([(f"s{number}", x[number : number + 1]) for number in range(20)])
    _snapshot_taken(gallery)
    gallery._store.delete("s7")
    for number in range(20, 40):
        gallery._store.enrol(f"s{number}", x[number : number + 1])
    _killed(gallery)
    assert x[7].tobytes() in _all_bytes(tmp_path)
    monkeypatch.setattr("serving.search.keeping.MOST_CHANGED", 0.2)
    gallery = open_gallery(path)
    assert "all are read anew" in caplog.text
    assert _indexed(gallery) == _stored(gallery)
    assert x[7].tobytes() not in _all_bytes(tmp_path)
    gallery.close()


def test_a_restored_store_has_another_history(tmp_path, vectors, caplog):
    """Its revisions are taken again by other changes, so that a snapshot of one of them tells nothing."""
    x, path = vectors(30), tmp_path / "gallery.db"
    gallery = open_gallery(path)
    gallery.enrol("alice", x[:10])
    gallery.close()
    shutil.copy(path, tmp_path / "backup")
    gallery = open_gallery(path)
    gallery.enrol("bob", x[10:20])
    gallery.close()
    shutil.copy(tmp_path / "backup", path)
    store = Store(path, MODEL, 32, restored=True)
    store.enrol("carol", x[20:])
    gallery = Gallery(store, Rule(0.5, ""), Rule(0.5, ""))
    caplog.clear()
    gallery.load()
    assert "taken from a snapshot" not in caplog.text
    assert _indexed(gallery) == _stored(gallery)
    gallery.close()


def _until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_damage_in_the_store_is_found_behind_a_start_from_a_snapshot(tmp_path, vectors):
    x, path = vectors(40), tmp_path / "gallery.db"
    gallery = open_gallery(path)
    gallery.enrol("alice", x[:20])
    gallery.enrol("bob", x[20:])
    gallery.close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE samples SET vector = zeroblob(128) WHERE id = 7")
    connection.close()
    gallery = open_gallery(path)
    _until(lambda: gallery.status().state == "failed")
    assert "does not have its checksum" in gallery.status().reason
    with pytest.raises(StoreError, match="does not have its checksum"):
        gallery.check()
    with pytest.raises(StoreError, match="does not have its checksum"):
        gallery.enrol("carol", x[:1])
    assert gallery.identify(x[6], 1).candidates[0].subject_id == "alice"
    gallery.close()


def test_an_index_that_is_not_what_the_store_holds_is_built_anew(tmp_path, vectors, caplog, monkeypatch):
    """Though the counts agree."""
    x, path = vectors(40), tmp_path / "gallery.db"
    gallery = open_gallery(path)
    gallery.enrol_many([(f"s{number}", x[number : number + 1]) for number in range(20)])
    _snapshot_taken(gallery)
    gallery._store.delete("s7")
    gallery._store.enrol("new", x[30:31])
    _killed(gallery)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "changes_since", lambda *_: [])
        patch.setattr(Store, "names", lambda _: [(NOBODY + 1 + number, f"s{number}") for number in range(20)])
        gallery = open_gallery(path)
    assert gallery.samples == 20
    _until(lambda: "built anew" in caplog.text)
    _until(lambda: gallery.check() and _indexed(gallery) == _stored(gallery))
    assert gallery.identify(x[30], 1).candidates[0].subject_id == "new"
    gallery.close()


def test_nothing_erased_waits_in_the_log_for_the_store_to_be_verified(tmp_path, vectors, caplog, monkeypatch):
    x, path = vectors(3000), tmp_path / "gallery.db"
    gallery = open_gallery(path)
    gallery.enrol_many([(f"s{number}", x[number : number + 1]) for number in range(3000)])
    gallery.close()
    monkeypatch.setattr("serving.storage.verification.STEPS_A_QUESTION", 1)
    monkeypatch.setattr("serving.search.projection.AGAIN_S", 0.05)
    gallery = open_gallery(path)
    for number in range(0, 60):
        gallery.delete(f"s{number}")
        assert x[number].tobytes() not in _all_bytes(tmp_path)
    _until(lambda: "was read, and is sound" in caplog.text)
    gallery.close()


def test_a_snapshot_that_cannot_be_written_is_told_and_does_no_harm(tmp_path, vectors, caplog):
    x, path = vectors(20), tmp_path / "gallery.db"
    (tmp_path / "gallery.db-index").write_text("in the way")
    gallery = open_gallery(path)
    gallery.enrol("alice", x[:10])
    gallery.check()
    gallery.enrol("bob", x[10:])
    gallery.close()
    assert "could not be written" in caplog.text
    gallery = open_gallery(path)
    assert gallery.samples == 20
    gallery.close()


def test_a_failed_deletion_takes_the_snapshot_with_it(tmp_path, vectors, monkeypatch):
    """Nobody knows what of it was done, and the vectors must not be in a file that outlives it."""
    x = vectors(20)
    gallery = open_gallery(tmp_path / "gallery.db")
    gallery.enrol("alice", x[:10])
    gallery.enrol("bob", x[10:])
    _snapshot_taken(gallery)

    def fail(*_):
        raise MemoryError("no room for the mask")

    with monkeypatch.context() as patch:
        patch.setattr("serving.search.projection.Index.remove", fail)
        with pytest.raises(MemoryError):
            gallery.delete("alice")
        assert not any(row.tobytes() in _all_bytes(tmp_path) for row in x[:10])
    _until(lambda: gallery.check().samples == gallery.samples == 10)
    gallery.close()


CHANGES = """
import sys, threading, numpy as np
from pathlib import Path
from serving.search import blocks, keeping, snapshot
keeping.LEAST_SAMPLES, keeping.EVERY_S, blocks.FIRST_ROWS, blocks.BLOCK_BYTES, snapshot.CHUNK = 1, 0.0, 16, 0, 4
from tests.serving.conftest import unit_vectors
from tests.serving.galleries import open_gallery
gallery, seed = open_gallery(Path(sys.argv[1])), int(sys.argv[2])
def watch():
    while True:
        gallery.check()
threading.Thread(target=watch, daemon=True).start()
x = unit_vectors(4000, seed)
for number in range(4000):
    gallery.enrol(f"{seed}-{number}", x[number:number + 1])
    if number % 3 == 2:
        gallery.delete(f"{seed}-{number - 1}")
        print(number - 1, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_snapshot_that_can_be_used_or_none(tmp_path, vectors, caplog):
    """While it is written, or rows in it are being erased."""
    path = tmp_path / "store" / "gallery.db"
    path.parent.mkdir()
    rng, gone, resumed = np.random.default_rng(), [], 0
    for seed in range(3):
        command = [sys.executable, "-c", CHANGES, str(path), str(seed)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            x = vectors(4000, seed)
            for _ in range(int(rng.integers(20, 60))):
                gone.append(x[int(process.stdout.readline())].tobytes())
            time.sleep(rng.random() / 20)
            process.kill()
            gone += [x[int(line)].tobytes() for line in process.stdout]
        gallery = open_gallery(path)
        resumed += "taken from a snapshot" in caplog.text
        assert _indexed(gallery) == _stored(gallery)
        content = _all_bytes(path.parent)
        assert not any(vector in content for vector in gone)
        gallery.close()
        caplog.clear()
    assert resumed
