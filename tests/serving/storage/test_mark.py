import os

import numpy as np
import pytest

from serving.storage.changes import StoreError
from serving.storage.mark import SECTOR, Mark, MarkDamaged, Reached, make_mark, mark_path, read_mark
from serving.storage.store import Store
from trainer.errors import UserError

MODEL, UID = "a" * 32, bytes(range(16))


@pytest.fixture
def path(tmp_path):
    make_mark(tmp_path / "m", Reached(UID, 7))
    return tmp_path / "m"


def test_it_says_what_was_noted_last(path):
    assert read_mark(path) == Reached(UID, 7)
    mark = Mark(path, Reached(UID, 7))
    for revision in (8, 9, 10, 2**63):
        mark.move(revision)
        assert read_mark(path) == mark.reached == Reached(UID, revision)
    mark.close()
    assert os.stat(path).st_size == 2 * SECTOR
    assert read_mark(path.with_name("none")) is None


def test_a_torn_write_leaves_the_change_before(path):
    mark = Mark(path, Reached(UID, 7))
    mark.move(8)
    before = path.read_bytes()
    mark.move(9)
    after = path.read_bytes()
    mark.close()
    for cut in range(0, 2 * SECTOR, 31):
        path.write_bytes(after[:cut] + before[cut:])
        assert read_mark(path).revision in (8, 9)


def test_a_flipped_bit_never_makes_another_revision(path):
    mark = Mark(path, Reached(UID, 7))
    mark.move(8)
    mark.close()
    sound = path.read_bytes()
    for place in range(SECTOR, SECTOR + 36):
        for bit in (0, 5):
            path.write_bytes(sound[:place] + bytes([sound[place] ^ 1 << bit]) + sound[place + 1 :])
            assert read_mark(path).revision == 8  # the newer slot is the first
            path.write_bytes(
                sound[: place - SECTOR] + bytes([sound[place - SECTOR] ^ 1 << bit]) + sound[place - SECTOR + 1 :]
            )
            assert read_mark(path).revision == 7


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: bytes(len(content)),
        lambda content: np.random.default_rng(0).bytes(len(content)),
    ],
)
def test_what_cannot_be_believed_is_refused(path, damage):
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(MarkDamaged):
        read_mark(path)


def test_the_store_notes_every_change_before_it_answers(tmp_path, vectors):
    store = Store(tmp_path / "gallery.db", MODEL, 32)
    mark = mark_path(tmp_path / "gallery.db")
    x = vectors(1)
    for number in range(5):
        store.enrol(f"s{number}", x)
        assert read_mark(mark).revision == number + 1
    store.delete("s2")
    assert read_mark(mark).revision == 6
    store.close()


def test_a_change_that_could_not_be_noted_is_not_acknowledged_and_noted_before_the_next(tmp_path, vectors, monkeypatch):
    store = Store(tmp_path / "gallery.db", MODEL, 32)
    x = vectors(1)

    def fail(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("serving.storage.mark.os.pwrite", fail)
        for _ in range(3):  # only the first can have been committed
            with pytest.raises(StoreError, match=r"mark .* cannot be written .*nothing was acknowledged"):
                store.enrol("alice", x)
        assert store.state().revision == 1
    store.close()
    store = Store(tmp_path / "gallery.db", MODEL, 32)  # one change ahead is what a power cut leaves too
    assert store.state().samples == 1
    assert read_mark(tmp_path / "gallery.db-mark").revision == 1
    store.close()


def test_a_mark_that_is_an_older_copy_is_refused(tmp_path, vectors):
    store, x = Store(tmp_path / "gallery.db", MODEL, 32), vectors(1)
    old = (tmp_path / "gallery.db-mark").read_bytes()
    store.enrol("alice", x)
    store.enrol("bob", x)
    store.close()
    (tmp_path / "gallery.db-mark").write_bytes(old)
    with pytest.raises(UserError, match=r"is at revision 2, but its mark .* at 0: the mark is an older copy"):
        Store(tmp_path / "gallery.db", MODEL, 32)
