import threading
import uuid

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import serving.search.scan
from serving.search.index import Index
from trainer.evaluation.normalise import Normaliser

FEW = st.integers(1, 6)


def _expected(rows, query, top_k):
    """Score everything, take each subject's maximum, sort: the definition."""
    best = {}
    for subject_id, _, vector in rows:
        score = float(np.dot(vector.astype(np.float64), query.astype(np.float64)))
        best[subject_id] = max(best.get(subject_id, -2.0), score)
    return sorted(best.items(), key=lambda item: -item[1])[:top_k]


def _rows(rng, subjects, samples, dimension=8):
    x = rng.normal(size=(samples, dimension))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    owners = rng.integers(0, subjects, samples)
    return [(f"s{owner}", uuid.uuid4().bytes, row) for owner, row in zip(owners, x, strict=True)]


NUMBERS = {}  # of names, as a store would give them


def _add(index, names, x, sample_ids=None):
    ids = [uuid.uuid4().bytes for _ in names] if sample_ids is None else sample_ids
    index.add(names, ids, x, np.array([NUMBERS.setdefault(name, len(NUMBERS)) for name in names], np.int64))


def _fill(index, rows):
    _add(index, [row[0] for row in rows], np.stack([row[2] for row in rows]), [row[1] for row in rows])


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 7 rows, and every scan shared out among the cores."""
    monkeypatch.setattr("serving.search.blocks.FIRST_ROWS", 7)
    monkeypatch.setattr("serving.search.blocks.BLOCK_BYTES", 0)
    monkeypatch.setattr("serving.search.index.SPLIT", 0)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    subjects=FEW,
    samples=st.integers(1, 300),
    top_k=FEW,
    removed=st.integers(0, 3),
    cores=st.integers(1, 3),
    form=st.sampled_from(["exact", "fp16", "int8"]),
    dimension=st.sampled_from([3, 8, 32]),
)
def test_search_is_the_definition(small_blocks, seed, subjects, samples, top_k, removed, cores, form, dimension):
    """Few subjects with very many samples make the search go deeper than its first try; in whatever form it scans."""
    rng = np.random.default_rng(seed)
    rows = _rows(rng, subjects, samples, dimension)
    index = Index(dimension, cores, form=form)
    _fill(index, rows)
    for number in range(removed):
        held = [row for row in rows if row[0] != f"s{number}"]
        assert index.remove(f"s{number}") == len(rows) - len(held)
        rows = held
    if rows:
        more = _rows(rng, subjects, 5, dimension)
        _fill(index, more)
        rows += more
    assert (index.samples, index.subjects) == (len(rows), len({row[0] for row in rows}))
    queries = np.stack([row[2] for row in _rows(rng, 1, 3, dimension)])
    owner = {row[1]: row for row in rows}
    some = {f"s{number}" for number in range(0, subjects, 2)}
    only = [row for row in rows if row[0] in some]
    for query, found in zip(queries, index.search(queries, top_k, index.numbers(some)), strict=True):
        assert [candidate.subject_id for candidate in found] == [name for name, _ in _expected(only, query, top_k)]
    for query, found in zip(queries, index.search(queries, top_k), strict=True):
        expected = _expected(rows, query, top_k)
        assert [candidate.subject_id for candidate in found] == [subject_id for subject_id, _ in expected]
        np.testing.assert_allclose([c.score for c in found], [score for _, score in expected], atol=1e-6)
        for candidate in found:
            subject_id, _, vector = owner[uuid.UUID(candidate.sample_id).bytes]
            assert subject_id == candidate.subject_id
            assert float(vector @ query) == pytest.approx(candidate.score, abs=1e-6)
            assert index.compare(query, subject_id).score == pytest.approx(candidate.score, abs=1e-6)


@pytest.mark.parametrize("kind", ["z", "t", "s", "as", "csls"])
def test_normalised_scores_are_searched_exactly(kind):
    rng = np.random.default_rng(4)
    rows, cohort, query = _rows(rng, 30, 90), _rows(rng, 1, 40), _rows(rng, 1, 1)[0][2]
    normaliser = Normaliser(kind, np.stack([row[2] for row in cohort]))
    index = Index(8, normaliser=normaliser)
    _fill(index, rows)
    index.remove("s3")
    rows = [row for row in rows if row[0] != "s3"]
    scores = {
        row[1]: float((normaliser.probes(query[None]) @ normaliser.enrolled(row[2][None]).T)[0, 0]) for row in rows
    }
    best = {name: max(scores[row[1]] for row in rows if row[0] == name) for name in {row[0] for row in rows}}
    (found,) = index.search(query[None], 10)
    assert [candidate.subject_id for candidate in found] == sorted(best, key=lambda name: -best[name])[:10]
    for candidate in found:
        assert candidate.score == pytest.approx(best[candidate.subject_id], abs=1e-5)
        assert index.compare(query, candidate.subject_id).score == pytest.approx(candidate.score, abs=1e-5)
    assert index.score(query, rows[0][2]) == pytest.approx(scores[rows[0][1]], abs=1e-5)


def test_one_subject_with_most_samples_does_not_crowd_out_the_others():
    rng = np.random.default_rng(0)
    query = np.eye(8, dtype=np.float32)[:1]
    near = np.eye(8, dtype=np.float32)[[0]] + rng.normal(scale=0.01, size=(2000, 8)).astype(np.float32)
    near /= np.linalg.norm(near, axis=1, keepdims=True)
    index = Index(8)
    _add(index, ["crowd"] * 2000, near)
    _add(index, ["a", "b"], np.eye(8, dtype=np.float32)[1:3])
    (found,) = index.search(query, 3)
    assert found[0].subject_id == "crowd"
    assert {candidate.subject_id for candidate in found[1:]} == {"a", "b"}


def test_batches_large_enough_for_matrix_products_give_the_same_scores(vectors):
    x = vectors(500, dimension=256)
    index = Index(256)
    _add(index, [f"s{i % 100}" for i in range(500)], x)
    queries = vectors(40, seed=1, dimension=256)
    together = index.search(queries, 10)
    for query, found in zip(queries, together, strict=True):
        (alone,) = index.search(query[None], 10)
        assert [c.subject_id for c in found] == [c.subject_id for c in alone]
        np.testing.assert_allclose([c.score for c in found], [c.score for c in alone], atol=1e-6)


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (np.full((1, 8), np.nan, np.float32), "length nan"),
        (np.full((1, 8), np.inf, np.float32), "length inf"),
        (np.ones((1, 8), np.float32), "length 2.828"),
        (np.zeros((1, 8), np.float32), "length 0"),
        (np.eye(9, dtype=np.float32)[:1], r"the index takes \[B, 8\]"),
        (np.eye(8, dtype=np.float32)[0], r"the index takes \[B, 8\]"),
    ],
)
def test_what_faiss_would_take_in_silence_is_refused(vector, message):
    index = Index(8)
    with pytest.raises(ValueError, match=message):
        _add(index, ["a"], vector)
    with pytest.raises(ValueError, match=message):
        index.search(vector, 1)
    assert index.samples == 0


def test_an_empty_index_finds_nobody(vectors):
    index = Index(32)
    assert index.search(vectors(2), 5) == [[], []]
    assert index.compare(vectors(1)[0], "nobody") is None
    assert index.remove("nobody") == 0


def test_a_hidden_subject_is_found_by_nobody_and_goes_with_the_next_removal(vectors):
    x = vectors(60)
    index = Index(32)
    _add(index, [f"s{number % 20}" for number in range(60)], x)
    index.hide("s7")
    index.hide("nobody")
    assert (index.subjects, index.samples) == (19, 57)
    assert index.compare(x[7], "s7") is None
    (found,) = index.search(x[7:8], 20)
    assert len(found) == 19
    assert "s7" not in {candidate.subject_id for candidate in found}
    index.add(
        ["s7"], [uuid.uuid4().bytes], x[:1], np.array([2000])
    )  # somebody of that name comes back, without the old samples
    assert index.compare(x[7], "s7").score < 0.9
    assert index.remove("s8", "s9") == 9
    assert (index.subjects, index.samples) == (18, 52)
    assert {candidate.subject_id for candidate in index.search(x[7:8], 20)[0]} == {
        f"s{number}" for number in range(20) if number not in (8, 9)
    }


@pytest.mark.parametrize("step", ["isin", "flatnonzero"])
def test_a_removal_that_runs_out_of_memory_hides_and_mixes_nothing_up(vectors, monkeypatch, step):
    x = vectors(30)
    index = Index(32)
    _add(index, [f"s{number}" for number in range(30)], x)

    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(f"serving.search.index.np.{step}", fail)
        with pytest.raises(MemoryError):
            index.remove("s3")
    for number in range(30):
        (found,) = index.search(x[number : number + 1], 1)
        assert (found[0].subject_id == f"s{number}") == (number != 3)
    index.remove("s4")
    assert (index.subjects, index.samples) == (28, 28)


def test_a_block_that_is_mostly_gone_gives_its_memory_back(small_blocks, vectors):
    x = vectors(700)
    index = Index(32)
    _add(index, [f"s{number}" for number in range(700)], x)
    for number in range(690):
        index.remove(f"s{number}")
    held = sum(len(block) for block in index._view.blocks)
    assert held <= 20  # rows, for 10
    for number in range(690, 700):
        (found,) = index.search(x[number : number + 1], 1)
        assert found[0].subject_id == f"s{number}"


def test_a_removed_vector_is_nowhere_in_memory(vectors):
    x = vectors(40)
    index = Index(32)
    _add(index, [f"s{number}" for number in range(40)], x)
    (block,) = index._view.blocks
    index.remove("s5")
    assert not block.vectors_NE[5].any()
    assert not block.sample_N[5].any()


def test_a_change_does_not_wait_for_a_search(vectors, monkeypatch):
    x = vectors(40)
    index = Index(32)
    _add(index, ["a"] * 40, x)
    scanning, changed = threading.Event(), threading.Event()
    knn = serving.search.scan.faiss.knn_inner_product

    def slow(*arguments, **named):
        scanning.set()
        assert changed.wait(10)
        return knn(*arguments, **named)

    monkeypatch.setattr("serving.search.scan.faiss.knn_inner_product", slow)
    found = []
    thread = threading.Thread(target=lambda: found.extend(index.search(x[:1], 5)))
    thread.start()
    assert scanning.wait(10)
    _add(index, ["b"], x[:1])
    index.remove("a")
    changed.set()
    thread.join(10)
    assert found == [[]]  # neither what came after it began, nor what is gone by its end


def test_searches_beside_changes_never_see_half_of_one(small_blocks, vectors):
    """Each subject has one vector; a search for it finds it with score 1 or not at all, never somebody else's row."""
    x = vectors(200)
    index = Index(32)
    stable = [f"stable{i}" for i in range(100)]
    _add(index, stable, x[:100])
    done, faults = threading.Event(), []

    def search():
        while not done.is_set():
            for number in (3, 50, 99):
                (found,) = index.search(x[number : number + 1], 1)
                if found[0].subject_id != f"stable{number}" or found[0].score < 0.999:
                    faults.append(found)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(15):
        for number in range(100, 200):
            _add(index, [f"fleeting{number}"], x[number : number + 1])
        for number in range(100, 200):
            index.remove(f"fleeting{number}")
    done.set()
    for thread in threads:
        thread.join(10)
    assert not faults
    assert (index.samples, index.subjects) == (100, 100)


@pytest.mark.parametrize("form", ["fp16", "int8"])
def test_codes_are_searched_beside_additions(vectors, form):
    """Of a block that is being added to, a search sees the rows that its view has, and no others."""
    x = vectors(900)
    index, done, faults = Index(32, form=form), threading.Event(), []
    _add(index, ["first"], x[:1])

    def search():
        while not done.is_set():
            try:
                if index.search(x[:1], 3)[0][0].subject_id != "first":
                    faults.append("another")
            except Exception as error:  # noqa: BLE001 (whatever it is, the test fails)
                faults.append(repr(error))

    thread = threading.Thread(target=search)
    thread.start()
    for number in range(1, 900):
        _add(index, [f"later{number}"], x[number : number + 1])
    done.set()
    thread.join(10)
    assert not faults
