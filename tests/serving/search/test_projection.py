"""The index is kept in step with the store: what fails between them, and what others do to the store, is mended."""

import sqlite3
import threading
import time

import pytest

from serving.gallery import Gallery
from serving.search.projection import GalleryLoading, Status, Stopped
from serving.storage.changes import IdempotencyKey, StoreError, SubjectUnknown
from serving.storage.store import Store
from serving.threshold import Rule
from tests.serving.galleries import MODEL, open_gallery
from trainer.errors import UserError


@pytest.fixture
def gallery(tmp_path):
    opened = open_gallery(tmp_path / "gallery.db")
    yield opened
    opened.close()


def _mended(gallery):
    """After `check` has found the index out of step, and the new one is there."""
    end = time.monotonic() + 30
    gallery.check()
    while gallery.status().state == "rebuilding" and time.monotonic() < end:
        time.sleep(0.002)
    assert gallery.status().state == "ready"
    return gallery.check()


class _Faulty:
    """An index whose next change fails, as it would out of memory."""

    def __init__(self, index):
        self._index = index

    def __getattr__(self, name):
        return getattr(self._index, name)

    def add(self, *_):
        raise MemoryError("no room for the vectors")

    def remove(self, *_):
        raise MemoryError("no room for the mask")


def _break(gallery):
    gallery._projection.index = _Faulty(gallery._projection.index)


def test_a_change_that_the_index_fails_to_make_is_not_lost(gallery, vectors):
    """The store has it; a new index is built. An erased subject is not found even before that."""
    x = vectors(2)
    gallery.enrol("bob", x[1:])
    _break(gallery)
    with pytest.raises(MemoryError):
        gallery.enrol("alice", x[:1])
    assert gallery.identify(x[1], 1).candidates[0].subject_id == "bob"  # searches go on
    assert _mended(gallery).samples == 2
    assert gallery.identify(x[0], 1).candidates[0].subject_id == "alice"
    _break(gallery)
    with pytest.raises(MemoryError):
        gallery.delete("alice")
    assert [c.subject_id for c in gallery.identify(x[0], 5).candidates] == ["bob"]
    with pytest.raises(SubjectUnknown):
        gallery.verify_subject(x[0], "alice")
    assert _mended(gallery).samples == gallery.samples == 1


def test_an_answer_is_not_repeated_before_the_index_has_what_it_tells_of(gallery, vectors, monkeypatch):
    x, key = vectors(1), IdempotencyKey("k", b"digest")
    permits = _slow_pieces(gallery._store, monkeypatch)
    _break(gallery)
    with pytest.raises(MemoryError):
        gallery.enrol("alice", x, key)
    with pytest.raises(GalleryLoading):
        gallery.replay(key, "alice")
    with pytest.raises(GalleryLoading):
        gallery.enrol("alice", x, key)
    permits.release()
    _mended(gallery)
    assert gallery.replay(key, "alice").replayed
    assert gallery.enrol("alice", x, key).replayed
    assert gallery.identify(x[0], 1).candidates[0].subject_id == "alice"
    assert (gallery.size, gallery.samples) == (1, 1)


def test_a_replay_waits_for_an_enrolment_between_store_and_index(gallery, vectors):
    x, key = vectors(1), IdempotencyKey("k", b"digest")
    committed, go_on, answers = threading.Event(), threading.Event(), []
    index = gallery._projection.index
    add = index.add

    def slow(*arguments):
        committed.set()
        assert go_on.wait(10)
        add(*arguments)

    index.add = slow

    def replay():
        answers.append((gallery.replay(key, "alice"), gallery.samples))

    first = threading.Thread(target=gallery.enrol, args=("alice", x, key))
    first.start()
    assert committed.wait(10)
    second = threading.Thread(target=replay)
    second.start()
    second.join(0.2)
    assert not answers
    go_on.set()
    first.join(10)
    second.join(10)
    assert [(done.replayed, samples) for done, samples in answers] == [(True, 1)]


class _FailingFold:
    """A connection whose checkpoints fail with an error of the given class, until it is told otherwise."""

    def __init__(self, connection, error):
        self._connection, self.error = connection, error

    def __getattr__(self, name):
        return getattr(self._connection, name)

    def execute(self, sql, *values):
        if "wal_checkpoint" in sql and self.error is not None:
            raise self.error
        return self._connection.execute(sql, *values)


@pytest.mark.parametrize(
    "error", [sqlite3.OperationalError("disk I/O error"), sqlite3.DatabaseError("malformed"), MemoryError("none left")]
)
def test_an_erased_subject_is_gone_even_where_its_log_cannot_be_folded(gallery, vectors, error):
    """Whatever the error; and the folding is done later."""
    x, store = vectors(2), gallery._store
    gallery.enrol("alice", x[:1])
    gallery.enrol("bob", x[1:])
    store._database.writer = failing = _FailingFold(store._database.writer, error)
    try:
        gallery.delete("alice")
    except MemoryError:
        assert error.args == ("none left",)
    assert "alice" not in {candidate.subject_id for candidate in gallery.identify(x[0], 5).candidates}
    folder = store.path.parent
    assert x[0].tobytes() in b"".join(path.read_bytes() for path in folder.iterdir())
    failing.error = None
    assert _mended(gallery).subjects == 1
    assert x[0].tobytes() not in b"".join(path.read_bytes() for path in folder.iterdir())


def test_nothing_is_answered_before_loading(tmp_path, vectors):
    x = vectors(2)
    first = open_gallery(tmp_path / "gallery.db")
    first.enrol("alice", x)
    first.close()
    gallery = Gallery(Store(tmp_path / "gallery.db", MODEL, 32), Rule(0.5, ""), Rule(0.5, ""))
    assert (gallery.status().state, gallery.enrolled().samples) == ("loading", 2)
    for ask in (
        lambda: gallery.identify(x[0], 1),
        lambda: gallery.verify_subject(x[0], "alice"),
        lambda: gallery.enrol("bob", x),
        lambda: gallery.delete("alice"),
        lambda: gallery.replay(IdempotencyKey("k", b""), "alice"),
        lambda: gallery.subjects(0, 1),
        gallery.check,
    ):
        with pytest.raises(GalleryLoading):
            ask()
    assert gallery.verify(x[0], x[0]).decision == "match"
    with pytest.raises(Stopped):
        gallery.load(stopping=lambda: True)
    assert gallery.status() == Status("loading", 0, 2)
    gallery.load()
    assert gallery.status() == Status("ready", 2, 2)
    assert gallery.identify(x[0], 1).decision == "match"
    gallery.close()


def test_an_index_that_does_not_fit_in_memory_is_told(tmp_path, vectors, monkeypatch):
    store = Store(tmp_path / "gallery.db", MODEL, 32)
    store.enrol("alice", vectors(1))

    def fail(*_):
        raise MemoryError

    gallery = Gallery(store, Rule(0.5, ""), Rule(0.5, ""))
    monkeypatch.setattr("serving.search.projection.Index.add", fail)
    with pytest.raises(UserError, match="there is not enough memory for the index"):
        gallery.load()
    gallery.close()


def _slow_pieces(store, monkeypatch):
    """Rows are read one by one; each read waits for a permit."""
    monkeypatch.setattr("serving.storage.reading.ROWS_A_READ", 1)
    permits, read = threading.Semaphore(0), type(store).samples

    def samples(settled=False):
        for piece in read(store, settled):
            yield piece
            assert permits.acquire(timeout=20)

    monkeypatch.setattr(store, "samples", samples)
    return permits


def test_searches_and_changes_go_on_while_an_index_is_built(gallery, vectors, monkeypatch):
    """Also those of subjects that the new index has seen already, or has not, or that take freed places."""
    x = vectors(20)
    for number in range(8):
        gallery.enrol(f"s{number}", x[number : number + 1])
    permits = _slow_pieces(gallery._store, monkeypatch)
    _break(gallery)
    with pytest.raises(MemoryError):
        gallery.enrol("s8", x[8:9])
    gallery._projection.index = gallery._projection.index._index  # from here on it can be changed again
    gallery.check()
    for _ in range(4):
        permits.release()
    while gallery.status().done < 4:
        time.sleep(0.001)
    assert gallery.status().state == "rebuilding"
    gallery.delete("s1")
    gallery.delete("s6")
    gallery.enrol("s2", x[12:13])
    gallery.enrol("s7", x[17:18])
    gallery.enrol("new", x[19:20])
    assert gallery.status().state == "rebuilding"
    expected = {"s0": [0], "s2": [2, 12], "s3": [3], "s4": [4], "s5": [5], "s7": [7, 17], "new": [19]}

    def assert_found(subjects):
        for subject_id, rows in subjects.items():
            for row in rows:
                assert gallery.identify(x[row], 1).candidates[0].subject_id == subject_id
        for row in (1, 6):
            assert gallery.identify(x[row], 1).decision == "unknown"

    assert_found(expected)
    for _ in range(20):
        permits.release()
    monkeypatch.undo()
    assert _mended(gallery).samples == 10
    assert_found(expected | {"s8": [8]})


def test_a_store_that_cannot_be_read_any_more_is_told_and_searches_go_on(gallery, vectors):
    x = vectors(3)
    gallery.enrol("alice", x[:1])
    gallery.enrol("bob", x[1:2])
    writer = gallery._store._database.writer
    writer.execute("UPDATE samples SET vector = zeroblob(128) WHERE id = 1")
    _break(gallery)
    with pytest.raises(MemoryError):
        gallery.delete("bob")
    while gallery.status().state != "failed":
        try:
            gallery.check()
        except StoreError:
            break
        time.sleep(0.002)
    assert "does not have its checksum" in gallery.status().reason
    with pytest.raises(StoreError, match="cannot be built"):
        gallery.check()
    with pytest.raises(StoreError, match="cannot be built"):
        gallery.enrol("carol", x[2:])
    assert [c.subject_id for c in gallery.identify(x[1], 5).candidates] == ["alice"]


@pytest.mark.parametrize("change", ["remove", "replace"])
@pytest.mark.parametrize("file", ["", "-wal", "-mark"])
def test_files_that_are_moved_away_are_noticed(gallery, vectors, change, file):
    x = vectors(2)
    gallery.enrol("alice", x[:1])
    path = gallery._store.path.with_name(gallery._store.path.name + file)
    aside = path.rename(path.with_name("aside"))
    if change == "replace":
        path.write_bytes(aside.read_bytes())
    with pytest.raises(StoreError, match="was removed or replaced while the store was open"):
        gallery.check()
    with pytest.raises(StoreError, match="was removed or replaced while the store was open"):
        gallery.enrol("bob", x[1:])
    assert gallery.identify(x[0], 1).decision == "match"
    aside.replace(path)
    assert gallery.check().samples == 1
    gallery.enrol("bob", x[1:])


def test_a_change_by_another_program_is_seen(gallery, vectors):
    x = vectors(2)
    gallery.enrol("alice", x[:1])
    gallery._store.enrol("bob", x[1:])  # not through the gallery
    assert gallery.identify(x[1], 1).decision == "unknown"
    assert _mended(gallery).samples == 2
    assert gallery.identify(x[1], 1).candidates[0].subject_id == "bob"


def test_a_failing_disk_leaves_both_as_they_were(gallery, vectors):
    x = vectors(400 * 8).reshape(400, 8, 32)
    writer = gallery._store._database.writer
    writer.execute("PRAGMA max_page_count = 20")
    acknowledged = 0

    def fill():
        nonlocal acknowledged
        for number, rows in enumerate(x):
            gallery.enrol(f"s{number}", rows)
            acknowledged += 1

    with pytest.raises(StoreError):
        fill()
    assert gallery.check().samples == gallery.samples == 8 * acknowledged
    assert gallery.identify(x[acknowledged, 0], 1).candidates[0].subject_id != f"s{acknowledged}"
    assert gallery.identify(x[acknowledged - 1, 0], 1).candidates[0].subject_id == f"s{acknowledged - 1}"
    writer.execute("PRAGMA max_page_count = 100000")
    gallery.enrol("after", x[acknowledged])
    assert gallery.identify(x[acknowledged, 0], 1).candidates[0].subject_id == "after"


def test_a_vector_that_is_none_is_found_at_the_start(tmp_path, vectors):
    store = Store(tmp_path / "gallery.db", MODEL, 32)
    store.enrol("alice", 2 * vectors(1))
    gallery = Gallery(store, Rule(0.5, ""), Rule(0.5, ""))
    with pytest.raises(UserError, match="cannot be one of an embedder's"):
        gallery.load()
    assert gallery.status().state == "failed"
    with pytest.raises(StoreError, match="cannot be one of an embedder's"):
        gallery.identify(vectors(1)[0], 1)
    gallery.close()
