import threading

import numpy as np
import pytest

from serving.gallery import Gallery, Probe
from serving.storage.changes import SubjectUnknown
from serving.storage.store import Store
from serving.threshold import Rule
from tests.serving.galleries import MODEL, open_gallery
from tests.serving.test_threshold import CURVE


@pytest.fixture
def gallery(tmp_path):
    opened = open_gallery(tmp_path / "gallery.db")
    yield opened
    opened.close()


def _near(vector, score):
    """A unit vector whose inner product with `vector` is `score`."""
    other = np.zeros_like(vector)
    other[int(np.abs(vector).argmin())] = 1
    other -= vector * (other @ vector)
    other /= np.linalg.norm(other)
    return (score * vector + np.sqrt(1 - score**2) * other).astype(np.float32)


def test_decisions_follow_the_threshold(gallery, vectors):
    x = vectors(2)
    assert gallery.identify(x[0], 5).decision == "unknown"
    gallery.enrol("alice", x[:1])
    for score, decision in ((0.99, "match"), (0.61, "match"), (0.59, "unknown")):
        found = gallery.identify(_near(x[0], score), 5)
        assert (found.decision, found.gallery_size) == (decision, 1)
        assert found.candidates[0].score == pytest.approx(score, abs=1e-5)
    assert gallery.verify(x[0], _near(x[0], 0.51)).decision == "match"
    assert gallery.verify(x[0], _near(x[0], 0.49)).decision == "no_match"


def test_each_decision_takes_the_threshold_of_the_size_at_hand(tmp_path, vectors):
    start = CURVE.at(100, 0.01)
    rule = Rule(start.value, "a test", 0.01, (start.low, start.high), 100, CURVE)
    opened = Gallery(Store(tmp_path / "gallery.db", MODEL, 32), Rule(0.5, ""), rule)
    opened.load()
    x = vectors(40)
    small, large = CURVE.at(1, 0.01).value, CURVE.at(40, 0.01).value
    between = _near(x[0], (small + large) / 2)
    opened.enrol("alice", x[:1])
    found = opened.identify(between, 1)
    assert (found.decision, found.rule.value, found.rule.gallery_size) == ("match", small, 1)
    for number in range(1, 40):
        opened.enrol(f"s{number}", x[number : number + 1])
    found = opened.identify(between, 1)
    assert (found.decision, found.rule.value, found.rule.gallery_size) == ("unknown", large, 40)
    assert found.candidates[0].subject_id == "alice"
    opened.close()


def test_a_subject_is_as_near_as_its_nearest_sample(gallery, vectors):
    x = vectors(1)[0]
    done = gallery.enrol("alice", np.stack([_near(x, 0.2), _near(x, 0.9), _near(x, 0.4)]))
    found = gallery.identify(x, 5).candidates
    assert [(c.subject_id, c.sample_id) for c in found] == [("alice", done.sample_ids[1])]
    verified = gallery.verify_subject(x, "alice")
    assert (verified.decision, verified.sample_id) == ("match", done.sample_ids[1])
    with pytest.raises(SubjectUnknown):
        gallery.verify_subject(x, "bob")


def test_the_index_is_rebuilt_from_the_store(tmp_path, vectors):
    x = vectors(300)
    gallery = open_gallery(tmp_path / "gallery.db")
    for number in range(50):
        gallery.enrol(f"s{number}", x[6 * number : 6 * number + 6])
    gallery.delete("s7")
    before = [gallery.identify(row, 10) for row in x]
    gallery.close()
    gallery = open_gallery(tmp_path / "gallery.db")
    assert [gallery.identify(row, 10) for row in x] == before
    assert (gallery.size, gallery.samples) == (49, 294)
    gallery.close()


def test_bad_vectors_reach_neither_store_nor_index(gallery):
    with pytest.raises(ValueError, match="length"):
        gallery.enrol("alice", np.ones((1, 32), np.float32))
    with pytest.raises(ValueError, match="takes"):
        gallery.enrol("alice", np.ones((1, 31), np.float32))
    assert gallery.check().samples == 0


def test_acknowledged_changes_are_seen_by_everybody(gallery, vectors):
    """Linearizability, of each subject's register: `enrol` and `delete` write it, `identify` reads it.

    A reader notes what had been acknowledged before it asked and what after; a subject acknowledged as present
    throughout must be found, one acknowledged as absent throughout must not.
    """
    x = vectors(24)
    acknowledged: dict[int, tuple[int, bool]] = dict.fromkeys(range(24), (0, False))  # version, present
    finished, faults = threading.Event(), []

    def change(numbers, seed):
        rng = np.random.default_rng(seed)
        for _ in range(40):
            number = int(rng.choice(numbers))
            version, present = acknowledged[number]
            acknowledged[number] = (version + 1, present)  # odd: under way
            if present:
                gallery.delete(f"s{number}")
            else:
                gallery.enrol(f"s{number}", x[number : number + 1])
            acknowledged[number] = (version + 2, not present)

    def read(seed):
        rng = np.random.default_rng(seed)
        while not finished.is_set():
            number = int(rng.integers(24))
            before = acknowledged[number]
            candidates = gallery.identify(x[number], 1).candidates
            found = bool(candidates) and candidates[0].subject_id == f"s{number}"
            after = acknowledged[number]
            if before == after and before[0] % 2 == 0 and found != before[1]:
                faults.append((number, before, found))

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    writers = [threading.Thread(target=change, args=(range(k, 24, 3), k)) for k in range(3)]
    for thread in readers + writers:
        thread.start()
    for thread in writers:
        thread.join(60)
    finished.set()
    for thread in readers:
        thread.join(60)
    assert not faults
    present = {f"s{number}" for number, (_, there) in acknowledged.items() if there}
    assert {row.subject_id for row in gallery.subjects(0, 100)} == present
    assert all(version > 0 for version, _ in acknowledged.values())
    assert gallery.check().subjects == len(present) == gallery.size


def test_a_search_among_some_is_that_of_a_gallery_of_these(tmp_path, vectors):
    """Its candidates, size and threshold, also where it waits together with searches among others."""
    start = CURVE.at(100, 0.01)
    rule = Rule(start.value, "a test", 0.01, (start.low, start.high), 100, CURVE)
    opened = Gallery(Store(tmp_path / "gallery.db", MODEL, 32), Rule(0.5, ""), rule)
    opened.load()
    x = vectors(40)
    opened.enrol_many([(f"s{number}", x[number : number + 1]) for number in range(40)])
    few, nobody = {"s3", "s4", "not enrolled"}, frozenset()
    filters = [few, None, nobody, few, ["s0"]] * 4
    answers = [opened.submit(Probe(x[0], 3, among)) for among in filters]
    for among, answer in zip(filters, answers, strict=True):
        found = answer.result(10)
        enrolled = {f"s{number}" for number in range(40)}
        allowed = enrolled if among is None else enrolled.intersection(among)
        scores = {name: float(x[int(name[1:])] @ x[0]) for name in allowed}
        assert [one.subject_id for one in found.candidates] == sorted(scores, key=lambda name: -scores[name])[:3]
        assert found.gallery_size == len(allowed)
        assert found.rule.value == CURVE.at(max(1, len(allowed)), 0.01).value
    opened.delete("s3")
    assert [one.subject_id for one in opened.identify(x[3], 3, few).candidates] == ["s4"]
    opened.close()
