"""What a store keeps of subjects beside their vectors: metadata, qualities, images; and what changes them."""

import sqlite3
import threading
from contextlib import closing

import numpy as np
import pytest

from serving.storage.changes import (
    Attached,
    Changed,
    IdempotencyKey,
    KeyReused,
    LastSample,
    RevisionConflict,
    SampleUnknown,
    StoreError,
    SubjectFull,
    SubjectUnknown,
)
from serving.storage.metadata import MetadataRefused
from serving.storage.store import Store
from tests.serving.galleries import MODEL, open_gallery
from trainer.errors import UserError

FULL = Attached(
    {"site": "north", "age": 41, "height": 1.8, "staff": True},
    [0.25, None],
    [{"camera": "ä1"}, {}],
    [bytes(range(256)) * 70, None],
)


@pytest.fixture
def store(tmp_path):
    with closing(Store(tmp_path / "gallery.db", MODEL, 32)) as opened:
        yield opened


def test_what_was_attached_comes_back(tmp_path, vectors):
    x = vectors(3)
    with closing(Store(tmp_path / "gallery.db", MODEL, 32)) as store:
        done = store.enrol("alice", x[:2], attached=FULL)
        store.enrol("bob", x[2:])
        assert (done.revision, done.number) == (1, store.subjects(0, 1)[0].position)
    with closing(Store(tmp_path / "gallery.db", MODEL, 32)) as store:
        store.verify()
        (piece,) = store.samples(settled=True)
        np.testing.assert_array_equal(piece.qualities_B, [0.25, np.nan, np.nan])
        row, samples = store.subject("alice")
        assert piece.numbers_B.tolist() == [row.position, row.position, row.position + 1]
        assert (row.metadata, row.samples, row.revision) == (FULL.metadata, 2, 1)
        assert [type(value) for value in row.metadata.values()] == [str, int, float, bool]
        assert store.subjects(0, 9)[0] == row
        first, second = samples
        assert (first.sample_id, first.quality, first.metadata, first.image) == (
            done.sample_ids[0],
            0.25,
            {"camera": "ä1"},
            True,
        )
        assert (second.quality, second.metadata, second.image) == (None, {}, False)
        found, vector_D = store.sample("alice", first.sample_id)
        assert found == first
        np.testing.assert_array_equal(vector_D, x[0])
        assert store.image("alice", first.sample_id) == FULL.images[0]
        assert store.image("alice", second.sample_id) is None
        assert store.subject("bob")[0].metadata == {}


def test_what_is_not_there_is_unknown(store, vectors):
    store.enrol("alice", vectors(1))
    other = store.enrol("bob", vectors(1)).sample_ids[0]
    for ask in (
        lambda: store.subject("nobody"),
        lambda: store.sample("nobody", other),
        lambda: store.update("nobody", {}),
        lambda: store.merge("alice", "nobody"),
        lambda: store.merge("nobody", "alice"),
        lambda: store.delete_sample("nobody", other),
    ):
        with pytest.raises(SubjectUnknown, match="no subject 'nobody'"):
            ask()
    for sample_id in (other, "", "not an id", "0" * 32):
        for ask in (store.sample, store.image, store.delete_sample):
            with pytest.raises(SampleUnknown, match="has no sample"):
                ask("alice", sample_id)
    assert store.state().revision == 2


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({f"k{number}": 1 for number in range(33)}, "33 keys; at most 32"),
        ({"": 1}, "the key ''"),
        ({"k" * 65: 1}, "1 to 64 characters"),
        ({"k": None}, "'k' is a NoneType"),
        ({"k": [1]}, "'k' is a list"),
        ({"k": float("nan")}, "finite"),
        ({"k": float("-inf")}, "finite"),
        ({"k": 10**400}, "at most 2"),
        ({"k": "ä" * 2100}, "bytes as JSON; at most 4096"),
        ({"k": "\ud800"}, "surrogate"),
    ],
)
def test_metadata_that_cannot_be_is_refused(store, vectors, metadata, told):
    store.enrol("alice", vectors(1), attached=Attached({"kept": 1}))
    for ask in (
        lambda: store.update("alice", metadata),
        lambda: store.enrol("alice", vectors(1), attached=Attached(metadata)),
        lambda: store.enrol("bob", vectors(1), attached=Attached(samples=[metadata])),
        lambda: store.enrol_many([("bob", vectors(1)), ("eve", vectors(1))], attached=[Attached(), Attached(metadata)]),
    ):
        with pytest.raises(MetadataRefused, match=told):
            ask()
    assert store.state().revision == 1
    assert store.subject("alice")[0].metadata == {"kept": 1}


@pytest.mark.parametrize("size", [4096 - len('{"k":""}'), 252 - 4 - len('{"k":""}'), 256 - 4 - len('{"k":""}')])
def test_metadata_of_any_length_that_is_allowed(store, vectors, size):
    store.enrol("alice", vectors(1), attached=Attached({"k": "v" * size}))
    assert store.subject("alice")[0].metadata == {"k": "v" * size}


def test_attached_must_fit_the_vectors(store, vectors):
    for wrong in (Attached(qualities=[1.0]), Attached(samples=[{}] * 3), Attached(images=[b""])):
        with pytest.raises(ValueError, match="for 2 vectors"):
            store.enrol("alice", vectors(2), attached=wrong)
    for quality in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="quality"):
            store.enrol("alice", vectors(1), attached=Attached(qualities=[quality]))
    assert store.state().revision == 0


def test_subjects_are_filtered_by_their_metadata(store, vectors):
    x = vectors(1)
    for number in range(40):
        parity = "even" if number % 2 == 0 else "odd"
        metadata = {"parity": parity, "third": number % 3, "half": number / 2, "big": number > 19}
        store.enrol(f"s{number}", x, attached=Attached(metadata))
    store.update("s6", {"parity": "odd"})
    store.delete("s12")
    store.enrol("s18", x, attached=Attached({"third": 0, "parity": "even", "big": 1}))
    assert store.matching({"parity": "even", "third": 0}) == ["s0", "s18", "s24", "s30", "s36"]
    first = store.subjects(0, 2, {"parity": "even", "third": 0})
    rest = store.subjects(first[-1].position, 10, {"third": 0.0, "parity": "even"})  # 0.0 is 0, the order is nothing
    assert [row.subject_id for row in first + rest] == ["s0", "s18", "s24", "s30", "s36"]
    assert store.matching({"half": 3.5}) == ["s7"]
    assert store.matching({"half": 4}) == ["s8"]
    assert store.matching({"big": True})[0] == "s20"
    assert store.matching({"big": 1}) == ["s18"]  # a number is no truth value
    assert store.matching({"big": "true"}) == store.matching({"unknown": 1}) == []
    assert len(store.matching({})) == store.state().subjects == 39
    plan = store._database.reader.execute(
        "EXPLAIN QUERY PLAN SELECT name " + store._matching({"a": 1, "b": 2}, 0)[0], (1, 0, 2)
    )
    assert "SCAN" not in str(plan.fetchall())
    assert "TEMP B-TREE" not in str(plan.fetchall())


def test_a_change_is_refused_where_another_came_before(store, vectors):
    first = store.enrol("alice", vectors(2))
    store.enrol("bob", vectors(2))
    assert store.subject("alice")[0].revision == first.revision == 1
    second = store.update("alice", {"a": 1}, expected=1)
    assert (second.revision, second.samples) == (3, 2)
    for change in (
        lambda: store.update("alice", {"a": 2}, expected=1),
        lambda: store.delete("alice", expected=1),
        lambda: store.merge("alice", "bob", expected=1),
        lambda: store.delete_sample("alice", first.sample_ids[0], expected=1),
    ):
        with pytest.raises(RevisionConflict, match="is at revision 3, not 1") as refusal:
            change()
        assert refusal.value.revision == 3
    assert store.delete_sample("alice", first.sample_ids[0], expected=3).revision == 4
    assert store.merge("alice", "bob", expected=4).revision == 5
    assert store.delete("alice", expected=5).samples == 3


def test_of_many_writers_who_expect_the_same_one_is_let_through(store, vectors):
    store.enrol("alice", vectors(1))
    outcomes = []

    def write(number):
        try:
            outcomes.append(store.update("alice", {"writer": number}, expected=1).revision)
        except RevisionConflict as refusal:
            outcomes.append(-refusal.revision)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(outcomes) == [-2] * 7 + [2]


def test_a_sample_is_deleted_but_not_the_last_one(store, vectors):
    done = store.enrol("alice", vectors(3), attached=Attached(samples=[{"n": number} for number in range(3)]))
    assert store.delete_sample("alice", done.sample_ids[1]).samples == 2
    assert [row.metadata for row in store.subject("alice")[1]] == [{"n": 0}, {"n": 2}]
    store.delete_sample("alice", done.sample_ids[0])
    with pytest.raises(LastSample, match="delete the subject"):
        store.delete_sample("alice", done.sample_ids[2])
    assert store.state().samples == 1


def test_subjects_are_merged(store, vectors):
    x = vectors(5)
    one = store.enrol("alice", x[:2], attached=Attached({"kept": 1}))
    other = store.enrol(
        "alicia", x[2:4], attached=Attached({"lost": 1}, [0.5, 0.7], [{"n": 2}, {"n": 3}], [b"second", None])
    )
    store.enrol("bob", x[4:])
    with pytest.raises(ValueError, match="into itself"):
        store.merge("alice", "alice")
    with pytest.raises(SubjectFull):
        store.merge("alice", "alicia", max_samples=3)
    assert store.merge("alice", "alicia").samples == 4
    row, samples = store.subject("alice")
    assert (row.metadata, row.samples) == ({"kept": 1}, 4)
    assert [sample.sample_id for sample in samples] == one.sample_ids + other.sample_ids
    assert [(sample.quality, sample.metadata) for sample in samples[2:]] == [(0.5, {"n": 2}), (0.7, {"n": 3})]
    assert store.image("alice", other.sample_ids[0]) == b"second"
    assert store.matching({"lost": 1}) == []
    np.testing.assert_array_equal(store.samples_of("alice").vectors_BD, x[:4])
    with pytest.raises(SubjectUnknown):
        store.subject("alicia")
    assert (store.state().subjects, store.state().samples) == (2, 5)
    store.verify()
    list(store.samples(settled=True))


def test_every_change_is_done_once_under_its_key(store, vectors):
    ids = store.enrol("alice", vectors(3)).sample_ids
    store.enrol("bob", vectors(2))
    changes = (
        lambda key: store.update("alice", {"a": 1}, key),
        lambda key: store.delete_sample("alice", ids[0], key),
        lambda key: store.merge("alice", "bob", key=key),
    )
    for number, change in enumerate(changes):
        key = IdempotencyKey(f"k{number}", b"digest")
        first, again = change(key), change(key)
        assert (first.replayed, again.replayed) == (False, True)
        assert (again.samples, again.revision) == (first.samples, first.revision)
        with pytest.raises(KeyReused):
            change(IdempotencyKey(f"k{number}", b"other"))
        with pytest.raises(KeyReused):
            store.delete("alice", key)
    assert store.state().revision == 5


def test_changes_since_a_revision(store, vectors):
    x = vectors(1)
    numbers = {name: store.enrol(name, x).number for name in ("a", "b", "c", "d")}
    start = store.state().revision
    assert store.changes_since(start) == []
    store.enrol("b", x)
    store.delete("c")
    store.merge("a", "d")
    numbers["e"] = store.enrol_many([("e", x), ("b", x)]).results[0].number
    found = {change.number: change.subject_id for change in store.changes_since(start)}
    assert found == {numbers[name]: name if name in "abe" else None for name in "abcde"}
    assert store.changes_since(store.state().revision - 1) == [Changed(numbers[name], name) for name in "be"]
    assert len(store.changes_since(0)) == 5
    assert store.changes_since(store.state().revision + 1) is None
    assert store.changes_since(-1) is None


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE metadata SET content = zeroblob(256) WHERE id = 1",
        "UPDATE metadata SET owner = owner + 1 WHERE id = 1",
        "UPDATE images SET content = zeroblob(4000) WHERE id = 2",
        "DELETE FROM images WHERE id = 3",
        "DELETE FROM images",
        "DELETE FROM metadata WHERE id = 2",
        "UPDATE subjects SET updated = updated + 1 WHERE digest IS NOT NULL",
        "UPDATE subjects SET revision = revision + 1 WHERE digest IS NOT NULL",
        "UPDATE subjects SET revision = revision - 1 WHERE digest IS NULL AND checksum <> zeroblob(16)",
        "UPDATE samples SET quality = x'0000000000000000' WHERE id = 1",
        "DELETE FROM attributes WHERE rowid_of = 1",
        "UPDATE attributes SET subject_id = subject_id + 1",
        "INSERT INTO attributes VALUES (5, 5)",
    ],
)
def test_damage_to_what_was_attached_is_found(tmp_path, vectors, damage):
    with closing(Store(tmp_path / "gallery.db", MODEL, 32)) as store:
        store.enrol("alice", vectors(2), attached=FULL)
        store.enrol("bob", vectors(1))
        store.delete("bob")
    with closing(sqlite3.connect(tmp_path / "gallery.db", isolation_level=None)) as connection:
        damage = damage.replace("rowid_of = 1", "attribute = (SELECT min(attribute) FROM attributes)")
        assert connection.execute(damage).rowcount
    with pytest.raises(UserError, match="is damaged"):
        open_gallery(tmp_path / "gallery.db")


def test_damage_is_found_when_it_is_read(store, vectors):
    done = store.enrol("alice", vectors(2), attached=FULL)
    with closing(sqlite3.connect(store.path, isolation_level=None)) as connection:
        connection.execute("DELETE FROM images WHERE id = 3")
    with pytest.raises(StoreError, match="not whole"):
        store.image("alice", done.sample_ids[0])


def test_searches_follow_the_changes_at_once(tmp_path, vectors):
    x = vectors(4)
    with closing(open_gallery(tmp_path / "gallery.db")) as gallery:
        ids = gallery.enrol("alice", x[:2], attached=Attached({"site": "north"})).sample_ids
        gallery.enrol("alicia", x[2:3])
        gallery.enrol("bob", x[3:])
        gallery.delete_sample("alice", ids[0])
        assert gallery.identify(x[0], 1).decision == "unknown"
        assert gallery.identify(x[1], 1).candidates[0].sample_id == ids[1]
        gallery.merge("alice", "alicia")
        assert [one.subject_id for one in gallery.identify(x[2], 3).candidates] == ["alice", "bob"]
        assert (gallery.size, gallery.samples) == (2, 3)
        gallery.update("alice", {"site": "south"})
        assert [row.subject_id for row in gallery.subjects(0, 9, {"site": "south"})] == ["alice"]
        assert gallery.check().revision == gallery.revision == 6
        assert gallery.status().state == "ready"  # store and index agree: none is being built
        before = [gallery.identify(row, 3) for row in x]
    with closing(open_gallery(tmp_path / "gallery.db")) as gallery:
        assert [gallery.identify(row, 3) for row in x] == before
