"""Snapshots of an index: whole, checked, followed by what was erased, or not used at all."""

import contextlib
import logging
import os
import threading
import uuid
from functools import partial

import numpy as np
import pytest

from serving.search.blocks import Block, of_sample, of_subjects
from serving.search.index import Index
from serving.search.snapshot import Snapshot, Source, snapshot_path

SOURCE = Source("ab" * 16, "a" * 32, 32, "")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("serving.search.blocks.FIRST_ROWS", 50)
    monkeypatch.setattr("serving.search.blocks.BLOCK_BYTES", 0)
    monkeypatch.setattr("serving.search.snapshot.CHUNK", 8)


def _filled(x, form="exact"):
    index = Index(32, form=form)
    index.add(_names(len(x)), [uuid.uuid4().bytes for _ in x], x, np.arange(len(x)))
    return index


def _names(count):
    return [f"s{number}" for number in range(count)]


def _never():
    return False


def _written(tmp_path, index, revision=7):
    snapshot = Snapshot(tmp_path / "gallery.db", SOURCE)
    index.share(snapshot.write(index.parts(), revision, _never))
    return snapshot


def _opened(tmp_path, named, source=SOURCE, form="exact"):
    snapshot, index = Snapshot(tmp_path / "gallery.db", source), Index(32, form=form)
    parts = snapshot.open(2)
    index.take(parts, named, of_subjects([]))
    return snapshot, index


def _found(index, x):
    return [candidates[0].subject_id for candidates in index.search(x, 1)]


def _content(tmp_path):
    parts = []
    for path in sorted(snapshot_path(tmp_path / "gallery.db").glob("*")):
        with contextlib.suppress(FileNotFoundError):  # replaced meanwhile
            parts.append(path.read_bytes())
    return b"".join(parts)


@pytest.mark.parametrize("form", ["exact", "fp16", "int8"])
def test_what_was_written_is_searched_after_a_start(tmp_path, vectors, form):
    x = vectors(130)
    index = _filled(x[:120], form)
    before = index.search(x, 5)
    _written(tmp_path, index)
    assert index.search(x, 5) == before
    snapshot, again = _opened(tmp_path, enumerate(_names(120)), form=form)
    assert (snapshot.revision, again.samples, again.subjects) == (7, 120, 120)
    assert again.search(x, 5) == before
    again.add(["new"], [uuid.uuid4().bytes], x[129:], np.array([500]))
    assert _found(again, x[129:]) == ["new"]
    assert sum(path.stat().st_mode & 0o077 for path in snapshot.folder.iterdir()) == 0
    assert snapshot.folder.stat().st_mode & 0o077 == 0


def test_only_blocks_that_grew_are_written_again_and_old_files_go(tmp_path, vectors):
    x = vectors(130)
    index = _filled(x[:120])
    snapshot = _written(tmp_path, index)
    before = set(snapshot.folder.iterdir())
    index.add(["new"], [uuid.uuid4().bytes], x[129:], np.array([500]))
    snapshot.write(index.parts(), 8, _never)
    after = set(snapshot.folder.iterdir())
    assert len(before) == len(after) == 4  # three blocks of 50 rows, the last with room, and the index of them
    assert len(before & after) == 3
    index.remove(*_names(45))  # what is left of the first block moves into another one
    snapshot.erase(of_subjects(range(45)))
    assert not any(row.tobytes() in _content(tmp_path) for row in x[:45])
    snapshot.write(index.parts(), 9, _never)
    assert _found(_opened(tmp_path, [*enumerate(_names(120)), (500, "new")])[1], x[[45, 129]]) == ["s45", "new"]


@pytest.mark.parametrize("reopened", [False, True])
def test_what_is_erased_is_in_no_file_and_the_rest_stays_sound(tmp_path, vectors, reopened):
    x = vectors(120)
    index = _filled(x)
    snapshot = _written(tmp_path, index)
    if reopened:
        snapshot, index = _opened(tmp_path, enumerate(_names(120)))
    ids = [candidates[0].sample_id for candidates in index.search(x, 1)]
    for number in (3, 60, 119):
        assert x[number].tobytes() in _content(tmp_path)
        index.remove(f"s{number}")
        snapshot.erase(of_subjects([number]))
        assert x[number].tobytes() not in _content(tmp_path)
        assert uuid.UUID(ids[number]).bytes not in _content(tmp_path)
    snapshot, again = _opened(tmp_path, ((n, name) for n, name in enumerate(_names(120)) if n not in (3, 60, 119)))
    assert (snapshot.revision, again.samples) == (7, 117)
    assert _found(again, x[[2, 59, 118]]) == ["s2", "s59", "s118"]


def test_what_is_erased_while_a_snapshot_is_written_is_not_in_it(tmp_path, vectors, monkeypatch):
    """Between two blocks, and while a block is flushed."""
    x = vectors(120)
    index = _filled(x)
    snapshot = Snapshot(tmp_path / "gallery.db", SOURCE)
    flush, erased = os.fdatasync, iter([3, 60, 119])

    def meanwhile(file):
        monkeypatch.setattr("serving.search.snapshot.os.fdatasync", flush)
        if (number := next(erased, None)) is not None:
            index.remove(f"s{number}")
            snapshot.erase(of_subjects([number]))
            assert x[number].tobytes() not in _content(tmp_path)
        monkeypatch.setattr("serving.search.snapshot.os.fdatasync", meanwhile)
        flush(file)

    monkeypatch.setattr("serving.search.snapshot.os.fdatasync", meanwhile)
    snapshot.write(index.parts(), 7, _never)
    monkeypatch.setattr("serving.search.snapshot.os.fdatasync", flush)
    assert not any(x[number].tobytes() in _content(tmp_path) for number in (3, 60, 119))
    assert _opened(tmp_path, enumerate(_names(120)))[1].samples == 117


class _Racing(Block):
    """Does something as soon as its vectors have been read."""

    then = None

    @property
    def vectors_NE(self):
        vectors_NE = self.__dict__["vectors_NE"]
        if self.then is not None:
            (then, self.then), vectors_NE = (self.then, None), vectors_NE.copy()
            then()
        return vectors_NE


@pytest.mark.parametrize("one_sample", [False, True])
def test_what_is_erased_while_its_block_is_copied_is_not_in_the_file(tmp_path, vectors, one_sample):
    """Between the copies of its number and of its vector."""
    x = vectors(20)
    index, ids = Index(32), [uuid.uuid4().bytes for _ in x]
    index.add(["other"] + ["s"] * 19, ids, x, np.array([0] + [1] * 19))
    (block,) = index._view.blocks
    block.__class__ = _Racing
    block.then = partial(index.remove_sample, "s", ids[5]) if one_sample else partial(index.remove, "s")
    snapshot = Snapshot(tmp_path / "gallery.db", SOURCE)
    snapshot.write([(block, 20)], 7, _never)
    snapshot.erase(of_sample([1], ids[5]) if one_sample else of_subjects([1]))
    assert x[5].tobytes() not in _content(tmp_path)
    assert ids[5] not in _content(tmp_path)


@pytest.mark.parametrize("fault", ["flip", "cut", "missing", "index", "no json", "other file", "stray"])
def test_a_snapshot_that_is_damaged_is_not_used_and_told(tmp_path, vectors, caplog, fault):
    x = vectors(120)
    snapshot = _written(tmp_path, _filled(x))
    blocks = sorted(snapshot.folder.glob("*.block"))
    content = bytearray(blocks[0].read_bytes())
    if fault == "flip":
        content[int(np.random.default_rng().integers(len(content)))] ^= 4
        blocks[0].write_bytes(content)
    elif fault == "cut":
        blocks[0].write_bytes(content[:-1])
    elif fault == "missing":
        blocks[0].unlink()
    elif fault == "other file":  # as large, and sound in itself
        one, other = (path for path in blocks if path.stat().st_size == max(b.stat().st_size for b in blocks))
        one.write_bytes(other.read_bytes())
    elif fault == "index":
        index = snapshot.folder / "index.json"
        index.write_text(index.read_text().replace('"revision": 7', '"revision": 6'))
    elif fault == "no json":
        (snapshot.folder / "index.json").write_bytes(b"\xff{")
    else:
        (snapshot.folder / "index.json").unlink()
    with caplog.at_level(logging.WARNING, "hypersphere.serving"):
        found, index = _opened(tmp_path, [])
    assert (found.revision, index.samples) == (None, 0)
    assert ("is not used" in caplog.text) == (fault not in ("stray", "missing"))
    assert not snapshot.folder.exists()


@pytest.mark.parametrize("change", [{"uid": "cd" * 16}, {"model_id": "b" * 32}, {"width": 33}, {"scores": "x"}])
def test_a_snapshot_of_something_else_is_not_used(tmp_path, vectors, caplog, change):
    _written(tmp_path, _filled(vectors(60)))
    source = Source(**{**vars(SOURCE), **change})
    with caplog.at_level(logging.WARNING, "hypersphere.serving"):
        assert Snapshot(tmp_path / "gallery.db", source).open(1) == []
    assert "another store, model or cohort" in caplog.text


def test_a_write_that_is_stopped_or_fails_leaves_the_snapshot_before(tmp_path, vectors, monkeypatch):
    x = vectors(200)
    index = _filled(x[:120])
    snapshot = _written(tmp_path, index)
    index.add(_names(200)[120:], [uuid.uuid4().bytes for _ in x[120:]], x[120:], np.arange(120, 200))
    before, asked = set(snapshot.folder.iterdir()), iter([False, True])
    assert snapshot.write(index.parts(), 9, lambda: next(asked)) == []
    assert set(snapshot.folder.iterdir()) == before

    def full(*_):
        raise OSError(28, "no room")

    monkeypatch.setattr("serving.search.snapshot.write_file", full)
    with pytest.raises(OSError, match="no room"):
        snapshot.write(index.parts(), 9, _never)
    assert set(snapshot.folder.iterdir()) == before
    assert _opened(tmp_path, enumerate(_names(120)))[0].revision == 7


def test_erasure_that_cannot_be_flushed_takes_the_snapshot_away(tmp_path, vectors, monkeypatch, caplog):
    x = vectors(60)
    snapshot = _written(tmp_path, _filled(x))

    def broken(_):
        raise OSError(5, "the disk is broken")

    monkeypatch.setattr("serving.search.snapshot.os.fdatasync", broken)
    snapshot.erase(of_subjects([1]))
    assert not snapshot.folder.exists()
    assert "the disk is broken" in caplog.text
    assert snapshot.revision is None


def test_a_subject_that_was_given_to_another_is_erased_with_that_one(tmp_path, vectors):
    x = vectors(60)
    index = _filled(x)
    snapshot = _written(tmp_path, index)
    index.merge("s1", "s2")
    snapshot.relabel(2, 1)
    assert _found(index, x[2:3]) == ["s1"]
    index.remove("s1")
    snapshot.erase(of_subjects([1]))
    assert x[2].tobytes() not in _content(tmp_path)
    assert _opened(tmp_path, enumerate(_names(60)))[1].samples == 58


def test_searches_and_deletions_go_on_while_snapshots_are_written(tmp_path, vectors):
    x = vectors(300)
    index, stop, faults = _filled(x, "int8"), threading.Event(), []
    snapshot = Snapshot(tmp_path / "gallery.db", SOURCE)

    def search():
        while not stop.is_set():
            if _found(index, x[290:]) != _names(300)[290:]:
                faults.append(1)

    def write():
        revision = 0
        while not stop.is_set():
            revision += 1
            index.share(snapshot.write(index.parts(), revision, _never))

    threads = [threading.Thread(target=search), threading.Thread(target=write)]
    for thread in threads:
        thread.start()
    for number in range(0, 290, 3):
        index.remove(f"s{number}")
        snapshot.erase(of_subjects([number]))
        assert x[number].tobytes() not in _content(tmp_path)
    stop.set()
    for thread in threads:
        thread.join(20)
    assert not faults
