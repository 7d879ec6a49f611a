"""After a deletion was acknowledged, no file of the store holds the subject's name or vectors: free bytes included."""

import sqlite3

import numpy as np
import pytest

from serving.storage.changes import Attached, IdempotencyKey
from serving.storage.rows import NOBODY
from serving.storage.store import Store

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


class _Crowd:
    """Subjects with all that can be attached, in a store that changes; `gone`: pieces of everything that was erased."""

    def __init__(self, store, seed):
        self.store, self.rng, self.gone = store, np.random.default_rng(seed), []
        self.described, self.samples = {}, {}  # {subject: piece of its metadata}, {subject: {sample: its pieces}}

    def _word(self, most):
        return self.rng.integers(97, 123, int(self.rng.integers(16, most))).astype(np.uint8).tobytes().decode()

    def enrol(self, name=None):
        name, count = name or self._word(120), int(self.rng.integers(1, 4))
        x = self.rng.normal(size=(count, 64)).astype(np.float32)
        words = [self._word(900) for _ in range(count)]
        images = [self.rng.bytes(int(self.rng.integers(20, 9000))) for _ in range(count)]
        attached = Attached(None, [0.5] * count, [{"word": word} for word in words], images)
        ids = self.store.enrol(name, x, attached=attached).sample_ids
        mine = self.samples.setdefault(name, {})
        for sample_id, row, word, image in zip(ids, x, words, images, strict=True):
            marks = [image[start : start + 16] for start in range(0, len(image) - 16, 400)]
            mine[sample_id] = [row[16:32].tobytes(), word[:16].encode(), word[-16:].encode(), *marks]

    def update(self, name):
        word = self._word(1500)
        self.store.update(name, {"first": word, "second": 5})
        self.gone += self.described.get(name, [])
        self.described[name] = [word[:16].encode(), word[-16:].encode()]

    def delete(self, name):
        self.store.delete(name)
        self._forget(name)
        self.gone += [piece for pieces in self.samples.pop(name).values() for piece in pieces]

    def delete_sample(self, name):
        if len(mine := self.samples[name]) > 1:
            sample_id = str(self.rng.choice(list(mine)))
            self.store.delete_sample(name, sample_id)
            self.gone += mine.pop(sample_id)

    def merge(self, name):
        other = str(self.rng.choice(list(self.samples)))
        if other != name and len(self.samples[name]) + len(self.samples[other]) < 50:
            self.store.merge(name, other)
            self._forget(other)
            self.samples[name] |= self.samples.pop(other)

    def _forget(self, name):
        self.gone += [name.encode(), *self.described.pop(name, [])]

    def there(self):
        pieces = [piece for mine in self.samples.values() for some in mine.values() for piece in some]
        return [
            *pieces,
            *(name.encode() for name in self.samples),
            *(p for some in self.described.values() for p in some),
        ]


@pytest.mark.parametrize("seed", range(2))
def test_nothing_erased_of_what_was_attached_is_left(tmp_path, hasty, seed):
    store = hasty(tmp_path / "gallery.db", 64)
    crowd, rng = _Crowd(store, seed), np.random.default_rng(seed)
    acts = [crowd.update, crowd.enrol, crowd.delete, crowd.delete_sample, crowd.merge]
    for number in range(300):
        if len(crowd.samples) < 5 or rng.random() < (0.6, 0.1, 0.3)[number // 60 % 3]:
            crowd.enrol()
        else:
            acts[int(rng.integers(len(acts)))](str(rng.choice(list(crowd.samples))))
    content = b"".join(_bytes(tmp_path).values())
    assert len(crowd.gone) > 500
    assert [piece for piece in crowd.gone if piece in content] == []
    there = crowd.there()  # the test can see it, but for what happens to lie in two rows
    assert sum(piece not in content for piece in there) < len(there) / 20
    store.verify()
    assert sum(len(piece.subject_ids) for piece in store.samples(settled=True)) == store.state().samples
    store.close()
    store = crowd.store = hasty(tmp_path / "gallery.db", 64)
    names = list(crowd.samples)
    rng.shuffle(names)
    for name in names:
        crowd.delete(name)
    store.close()
    content = b"".join(_bytes(tmp_path).values())
    assert [piece for piece in crowd.gone if piece in content] == []
    assert crowd.there() == []


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
