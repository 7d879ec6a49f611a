"""After a deletion was acknowledged, no file of the store holds the subject's name or vectors: free bytes included."""

import sqlite3

import numpy as np
import pytest

from serving.changes import IdempotencyKey
from serving.rows import NOBODY
from serving.store import Store

MODEL = "a" * 32


@pytest.fixture
def hasty(monkeypatch):
    """Opens stores that do not wait for the disk: here it matters what is written, not when."""
    monkeypatch.setattr("os.fdatasync", lambda _: None)

    def open_(path, dimension=32):
        store = Store(path, MODEL, dimension)
        store._database.writer.execute("PRAGMA synchronous=OFF")
        return store

    return open_


def _bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _left(folder, erased):
    """What is still somewhere: names, and vectors, known by the second quarter of theirs."""
    content = b"".join(_bytes(folder).values())
    names = [name for name, _ in erased if name.encode() in content]
    rows = [name for name, x_BD in erased for x_D in x_BD if x_D[16:32].tobytes() in content]
    return names, rows


@pytest.mark.parametrize("seed", range(2))
def test_nothing_erased_is_left_in_any_file(tmp_path, hasty, seed):
    """Names and vectors of all lengths and orders come and go, so that SQLite has every reason to rearrange pages."""
    rng = np.random.default_rng(seed)
    store = hasty(tmp_path / "gallery.db", 64)
    living, erased, most = {}, [], 0
    for number in range(600):
        if not living or rng.random() < (0.85, 0.3, 0.5)[number // 100 % 3]:
            name = f"{rng.integers(10**12):012d}" + "ñ" * int(rng.integers(50)) + f"/{number}"
            x = rng.normal(size=(int(rng.integers(1, 4)), 64)).astype(np.float32)
            store.enrol(name, x, key=IdempotencyKey(f"key of {name}", name.encode()))
            living[name] = x
            most = max(most, store.state().samples)
        else:
            name = list(living)[int(rng.integers(len(living)))]
            store.delete(name, IdempotencyKey(f"end of {name}", name.encode()))
            erased.append((name, living.pop(name)))
    assert len(erased) > 200
    content = b"".join(_bytes(tmp_path).values())
    for name, x in living.items():  # the test can see them
        assert name.encode() in content
        assert all(row.tobytes() in content for row in x)
    assert _left(tmp_path, erased) == ([], [])
    store.close()
    assert _left(tmp_path, erased) == ([], [])
    store = hasty(tmp_path / "gallery.db", 64)
    (rows,) = store._database.reader.execute("SELECT count(*) FROM samples").fetchone()
    assert rows == most  # freed places were taken again
    store.verify()
    assert sum(len(piece[0]) for piece in store.samples(settled=True)) == store.state().samples
    for name in list(living):
        store.delete(name)
    assert store._database.reader.execute(
        "SELECT count(*) FROM samples WHERE subject_id <> ?", (NOBODY,)
    ).fetchone() == (0,)
    store.close()
    assert _left(tmp_path, [*erased, *living.items()]) == ([], [])


def test_neither_name_nor_key_is_kept_under_idempotency_keys(tmp_path, vectors):
    x, key = vectors(2), IdempotencyKey("enrol Zebedee Quux", b"PUT Zebedee Quux")
    store = Store(tmp_path / "gallery.db", MODEL, 32)
    store.enrol("Zebedee Quux", x, key=key)
    store.delete("Zebedee Quux", IdempotencyKey("erase Zebedee Quux", b"DELETE Zebedee Quux"))
    for content in _bytes(tmp_path).values():
        assert b"Zebedee" not in content
    again = store.enrol("Zebedee Quux", x, key=key)  # late: it must not bring the subject back
    assert (again.replayed, again.subject_id, store.state().subjects) == (True, "Zebedee Quux", 0)
    for content in _bytes(tmp_path).values():
        assert b"Zebedee" not in content
    store.close()


def test_two_stores_write_different_digests(tmp_path, vectors):
    """A digest found in one file says nothing about another."""
    digests = set()
    for name in ("one.db", "two.db"):
        store = Store(tmp_path / name, MODEL, 32)
        store.enrol("alice", vectors(1), key=IdempotencyKey("k", b"r"))
        digests |= {
            value for row in store._database.reader.execute("SELECT key, request FROM idempotency") for value in row
        }
        digests |= set(
            store._database.reader.execute("SELECT digest FROM subjects WHERE digest IS NOT NULL").fetchall()
        )
        store.close()
    assert len(digests) == 6


def test_a_log_that_another_programs_reader_holds_is_folded_later(tmp_path, vectors):
    x = vectors(2)
    store = Store(tmp_path / "gallery.db", MODEL, 32)
    store.enrol("alice", x[:1])
    reader = sqlite3.connect(tmp_path / "gallery.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM subjects").fetchone()
    store.delete("alice")
    assert x[0].tobytes() in b"".join(_bytes(tmp_path).values())
    reader.execute("COMMIT")
    reader.close()
    store.check()
    assert x[0].tobytes() not in b"".join(_bytes(tmp_path).values())
    store.close()
