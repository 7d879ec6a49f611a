"""A damaged store is refused in one sentence, or gives exactly what was enrolled: bit by bit, and file by file."""

import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from serving.gallery import Gallery
from serving.storage.changes import IdempotencyKey
from serving.storage.store import Store
from serving.threshold import Rule
from trainer.errors import UserError

MODEL = "a" * 32
FLIPS = int(os.environ.get("STORE_FLIPS", "40"))  # 400 for the long run, about a minute
PAGE = Path(__file__).resolve().parents[3] / "docs" / "storage.md"
KEY = IdempotencyKey("key", b"digest")
RULE = Rule(0.5, "a test")


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    """Nothing here waits for the disk: it matters what is written, not when."""
    monkeypatch.setattr("os.fdatasync", lambda _: None)
    monkeypatch.setattr("os.fsync", lambda _: None)


def _open(path, restored=False, dimension=32):
    gallery = Gallery(Store(path, MODEL, dimension, restored=restored), RULE, RULE)
    gallery._store._database.writer.execute("PRAGMA synchronous=OFF")
    try:
        gallery.load()
    except UserError:
        gallery.close()
        raise
    return gallery


def _opened_or_refused(path, dimension=32):
    """None: refused, in one line that names the file."""
    try:
        return _open(path, dimension=dimension)
    except UserError as refusal:
        message = str(refusal)
    assert str(path) in message
    assert "\n" not in message
    return None


def _content(gallery):
    """Everything that the service answers with."""
    samples = {}
    for subject_ids, sample_ids, vectors_BD, *_ in gallery._store.samples():
        for subject_id, sample_id, vector_D in zip(subject_ids, sample_ids, vectors_BD, strict=True):
            samples[sample_id] = (subject_id, vector_D.tobytes())
    return samples, gallery.subjects(0, 1000), gallery.check(), gallery.replay(KEY, "s0"), gallery.model_id


def _fill(path, vectors, count=20):
    gallery = _open(path)
    x = vectors(count)
    for number, row in enumerate(x):
        gallery.enrol(f"s{number}", row[None], None if number else KEY)
    for number in range(0, count, 5):
        if number:
            gallery.delete(f"s{number}")
    content = _content(gallery)
    gallery.close()
    return content


def _erase_all(gallery):
    for row in gallery.subjects(0, 1000):
        gallery.delete(row.subject_id)
    assert gallery.check().subjects == gallery.size == 0


def _refused_or_harmless(path, damaged, sound_mark, expected, place):
    """Whether a store of these bytes is refused; if it is not, all is as it was enrolled and can be erased."""
    for left in path.parent.iterdir():
        left.unlink()
    path.write_bytes(damaged)
    path.with_name(f"{path.name}-mark").write_bytes(sound_mark)
    gallery = _opened_or_refused(path)
    if gallery is None:
        return True
    assert _content(gallery) == expected, place
    _erase_all(gallery)
    gallery.close()
    return False


def test_a_flipped_bit_anywhere_is_refused_or_harmless(tmp_path, vectors):
    """Harmless: everything is as it was enrolled, and everybody can be erased."""
    path, mark = tmp_path / "gallery.db", tmp_path / "gallery.db-mark"
    expected = _fill(path, vectors)
    sound, sound_mark = path.read_bytes(), mark.read_bytes()
    places = np.random.default_rng(1).integers(0, 8 * len(sound), FLIPS)
    # Where little damage does much: SQLite's header and the first pages' heads.
    places = [*places, *np.random.default_rng(2).integers(0, 8 * 100, FLIPS // 4)]
    refused = 0
    for place in map(int, places):
        damaged = bytearray(sound)
        damaged[place // 8] ^= 1 << place % 8
        refused += _refused_or_harmless(path, damaged, sound_mark, expected, place)
    assert refused > FLIPS / 8


def _used(path, table):
    """The bytes of a table's rows, as places in the file."""
    connection = sqlite3.connect(path)
    size = connection.execute("PRAGMA page_size").fetchone()[0]
    pages = [page for (page,) in connection.execute("SELECT pageno FROM dbstat WHERE name = ?", (table,))]
    connection.close()
    content = path.read_bytes()
    return [place for page in pages for place in range((page - 1) * size, page * size) if content[place]]


@pytest.mark.parametrize(
    "table", ["gallery", "subjects", "subjects_by_digest", "samples", "samples_of_subject", "idempotency"]
)
def test_a_flipped_bit_in_the_rows_of_each_table_is_found(tmp_path, vectors, table):
    path, mark = tmp_path / "gallery.db", tmp_path / "gallery.db-mark"
    expected = _fill(path, vectors)
    places = _used(path, table)
    sound, sound_mark = path.read_bytes(), mark.read_bytes()
    refused, rng = 0, np.random.default_rng(3)
    for place in map(int, rng.choice(places, min(len(places), max(6, FLIPS // 6)), replace=False)):
        damaged = bytearray(sound)
        damaged[place] ^= 1 << int(rng.integers(8))
        refused += _refused_or_harmless(path, damaged, sound_mark, expected, place)
    assert refused >= 3


def test_rows_of_another_time_are_found_though_every_one_is_sound(tmp_path, vectors):
    """As a half-written file, or a log replayed onto another database, would mix them; counts agree."""
    path = tmp_path / "gallery.db"
    _fill(path, vectors)
    connection = sqlite3.connect(path, isolation_level=None)
    (seal,) = connection.execute("SELECT checksum FROM samples WHERE id = 4").fetchone()
    connection.execute(
        "UPDATE samples SET (sample_id, checksum, vector, created, subject_id) = "
        "(SELECT sample_id, checksum, vector, created, subject_id FROM samples WHERE id = 5) WHERE id = 4"
    )
    connection.close()
    assert seal
    with pytest.raises(UserError, match="not all of them the right ones"):
        _open(path)


def test_definitions_that_were_changed_are_refused(tmp_path, vectors):
    path = tmp_path / "gallery.db"
    _fill(path, vectors)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("CREATE TRIGGER t AFTER INSERT ON subjects BEGIN SELECT 1; END")
    connection.close()
    with pytest.raises(UserError, match="the definitions of its tables do not have their checksum"):
        _open(path)


# The table of docs/storage.md, file by file. ---------------------------------------------------------------------

LIFE = """
import os, sys, numpy as np
from pathlib import Path
from serving.storage.store import Store
store = Store(Path(sys.argv[1]), "a" * 32, 1024)
x = np.eye(1024, dtype=np.float32)
for number in range(int(sys.argv[2]), int(sys.argv[3])):
    store.enrol(f"s{number}", x[number][None])
os._exit(0)  # as a kill would: nothing is closed
"""
FILES = {"database": "", "log": "-wal", "index of the log": "-shm", "mark": "-mark"}
DAMAGES = ("missing", "empty", "truncated", "one bit flipped", "an older copy", "another store's")


def _live(path, start, end):
    """A life of the store that ends in a kill, with a log that was not folded."""
    subprocess.run([sys.executable, "-c", LIFE, path, str(start), str(end)], check=True)


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """The files of a killed store, of an earlier kill of it, and of another store that was killed."""
    folder = tmp_path_factory.mktemp("copies")
    now, earlier, other = (folder / name for name in ("now", "earlier", "other"))
    for each in (now, other):
        each.mkdir()
    _live(now / "gallery.db", 0, 12)
    shutil.copytree(now, earlier)
    _live(now / "gallery.db", 12, 20)
    _open(now / "gallery.db", dimension=1024).close()  # folds the log
    _live(now / "gallery.db", 20, 30)
    _live(other / "gallery.db", 0, 30)
    assert (now / "gallery.db-wal").stat().st_size
    return folder


def _damage(file, damage, copies):
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "one bit flipped":
        # In what counts: a vector, the newest change in the log, the revision in the mark's newer slot.
        vector = content.find(np.eye(1024, dtype=np.float32)[3].tobytes()) if file.name == "gallery.db" else 0
        place = {"gallery.db": vector, "gallery.db-wal": len(content) - 200}.get(file.name, 30)
        changed = bytearray(content)
        changed[place] ^= 4
        file.write_bytes(changed)
    else:
        shutil.copy(copies / ("earlier" if damage == "an older copy" else "other") / file.name, file)


def _verdict(path):
    gallery = _opened_or_refused(path, dimension=1024)
    if gallery is None:
        return "refused"
    assert {row.subject_id for row in gallery.subjects(0, 100)} == {f"s{number}" for number in range(30)}
    _erase_all(gallery)
    gallery.close()
    return "repaired"


def _documented():
    """{(file, damage): verdict} as the page says."""
    head, *rows = re.findall(r"^\| (.*) \|$", PAGE.read_text().split("<!-- verdicts -->")[1], re.MULTILINE)
    damages = head.split(" | ")[1:]
    return {
        (cells[0], damage): verdict
        for cells in (row.split(" | ") for row in rows)
        for damage, verdict in zip(damages, cells[1:], strict=True)
    }


def test_the_page_has_every_case():
    assert set(_documented()) == {(file, damage) for file in FILES for damage in DAMAGES}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_the_verdict_is_the_one_of_the_page(copies, tmp_path, file, damage):
    folder = tmp_path / "store"
    shutil.copytree(copies / "now", folder)
    _damage(folder / f"gallery.db{FILES[file]}", damage, copies)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith("-shm")}
    verdict = _verdict(folder / "gallery.db")
    assert verdict == _documented()[file, damage]
    if verdict == "refused":  # and left as it was, so that the operator can put back what is missing
        after = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith("-shm")}
        assert {name: content for name, content in after.items() if content} == {
            name: content for name, content in before.items() if content
        }


def test_a_lost_log_is_refused_by_name_and_a_restored_backup_is_taken(copies, tmp_path):
    shutil.copytree(copies / "now", tmp_path / "store")
    path = tmp_path / "store" / "gallery.db"
    (tmp_path / "store" / "gallery.db-wal").unlink()
    with pytest.raises(
        UserError,
        match=r"is at revision 20, but 30 changes were acknowledged.*gallery.db-wal' is missi"
        r"ng.*--restored",
    ):
        _open(path, dimension=1024)
    gallery = _open(path, restored=True, dimension=1024)
    assert gallery.size == 20
    gallery.close()
    gallery = _open(path, dimension=1024)  # once is enough
    assert gallery.size == 20
    gallery.close()


@pytest.mark.parametrize("version", ["sqlite3 .backup", "VACUUM INTO"])
def test_a_backup_made_while_running_is_restored(tmp_path, vectors, version):
    gallery = _open(tmp_path / "gallery.db")
    x = vectors(3)
    gallery.enrol("alice", x[:1])
    other = sqlite3.connect(tmp_path / "gallery.db")
    if version == "VACUUM INTO":
        other.execute("VACUUM INTO ?", (str(tmp_path / "copy.db"),))
    else:
        copy = sqlite3.connect(tmp_path / "copy.db")
        other.backup(copy)
        copy.close()
    other.close()
    gallery.enrol("bob", x[1:2])
    gallery.close()
    with pytest.raises(UserError, match=r"copy.db-mark' of the store .* is missing"):
        _open(tmp_path / "copy.db")
    copy = _open(tmp_path / "copy.db", restored=True)
    assert [row.subject_id for row in copy.subjects(0, 5)] == ["alice"]
    copy.enrol("carol", x[2:])
    copy.close()


def test_a_new_gallery_beside_an_old_mark_is_refused(tmp_path, vectors):
    _fill(tmp_path / "gallery.db", vectors, 3)
    (tmp_path / "gallery.db").unlink()
    with pytest.raises(UserError, match=r"is missing or empty, but its mark .* remove the mark"):
        _open(tmp_path / "gallery.db", restored=True)
    assert not (tmp_path / "gallery.db").exists()
