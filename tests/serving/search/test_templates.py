"""One template a subject in place of its samples: the mean, or the mean weighted by quality."""

import sqlite3
from contextlib import closing
from itertools import pairwise

import numpy as np
import pytest

from serving.gallery import Gallery
from serving.search.templates import templates, whole_subjects
from serving.storage.changes import Attached
from serving.storage.reading import Piece
from serving.storage.store import Store
from serving.threshold import Rule
from tests.serving.galleries import MODEL

RULE = Rule(0.5, "a test")


def _gallery(path, template, normaliser=None):
    opened = Gallery(Store(path, MODEL, 32), RULE, RULE, normaliser=normaliser, template=template)
    opened.load()
    return opened


def _piece(x, numbers, qualities=None):
    qualities = [np.nan] * len(x) if qualities is None else qualities
    return Piece([f"s{n}" for n in numbers], [bytes([1]) * 16] * len(x), x, np.array(qualities), np.array(numbers))


def _expected(rows, weights):
    """As a plain loop."""
    total = sum(weight * row.astype(float) for row, weight in zip(rows, weights, strict=True))
    return (total / np.linalg.norm(total)).astype(np.float32)


def test_a_mean_has_length_one_and_its_samples_direction(vectors):
    x = vectors(6)
    made = templates(_piece(x, [3, 3, 3, 5, 7, 7]), "mean")
    assert (made.subject_ids, made.numbers_B.tolist()) == (["s3", "s5", "s7"], [3, 5, 7])
    for row, part in zip(made.vectors_BD, (x[:3], x[3:4], x[4:]), strict=True):
        np.testing.assert_allclose(row, _expected(part, [1] * len(part)), atol=1e-6)


def test_a_better_sample_counts_more_and_an_unknown_one_as_the_usual(vectors):
    x = vectors(9)
    nan = np.nan
    qualities = [0.2, 0.8, nan, nan, nan, -1, 0.5, 0.0, -2]
    made = templates(_piece(x, [1, 1, 1, 2, 2, 3, 3, 4, 4], qualities), "weighted")
    for row, expected in zip(
        made.vectors_BD,
        (_expected(x[:3], [0.2, 0.8, 0.5]), _expected(x[3:5], [1, 1]), x[6], x[7]),
        strict=True,
    ):
        np.testing.assert_allclose(row, expected, atol=1e-6)


def test_opposite_samples_have_no_direction_so_the_first_one_stands(vectors):
    x = np.concatenate([vectors(1), -vectors(1)])
    np.testing.assert_array_equal(templates(_piece(x, [1, 1]), "mean").vectors_BD, x[:1])


@pytest.mark.parametrize("size", [1, 2, 3, 7, 20])
def test_pieces_are_cut_between_subjects(vectors, size):
    numbers = [1, 1, 1, 2, 3, 3, 4, 4, 4, 4, 4, 9]
    whole = _piece(vectors(12), numbers)
    cut = [Piece(*(column[start : start + size] for column in whole)) for start in range(0, 12, size)]
    found = list(whole_subjects(cut))
    assert [number for piece in found for number in piece.numbers_B] == numbers
    assert all(set(a.numbers_B).isdisjoint(b.numbers_B) for a, b in pairwise(found))
    assert list(whole_subjects([])) == []


@pytest.mark.parametrize("template", ["mean", "weighted"])
def test_every_change_makes_the_template_anew(tmp_path, vectors, template, monkeypatch):
    """In the index as in one that is built anew from the store, bit by bit; samples of a subject lie far apart."""
    monkeypatch.setattr("serving.storage.reading.ROWS_A_READ", 7)
    rng, x = np.random.default_rng(0), vectors(200)
    names = [f"s{number}" for number in range(12)]
    with closing(_gallery(tmp_path / "gallery.db", template)) as gallery:
        for number in range(0, 120, 2):
            name, pair = names[int(rng.integers(12))], x[number : number + 2]
            gallery.enrol(name, pair, attached=Attached(qualities=list(rng.random(2))))
        gallery.enrol_many([("new", x[120:121]), ("s0", x[121:122]), ("new", x[122:123])])
        gallery.delete("s1")
        gallery.merge("s2", "s3")
        sample = gallery.subject("s4")[1][0].sample_id
        gallery.delete_sample("s4", sample)
        assert gallery.size == gallery.check().subjects
        assert gallery.samples == gallery.check().samples > gallery.size
        assert gallery.status().state == "ready"
        found = [gallery.identify(row, 5) for row in x]
        compared = gallery.verify_subject(x[0], "s2")
        assert {one.sample_id for answer in found for one in answer.candidates} == {None}
        assert {one.subject_id for answer in found for one in answer.candidates} == {*names, "new"} - {"s1", "s3"}
        with closing(sqlite3.connect(tmp_path / "gallery.db")) as connection:
            known = connection.execute(
                "SELECT vector, quality FROM samples JOIN subjects ON subjects.id = subject_id "
                "WHERE name = ? ORDER BY samples.id",
                (b"s4",),
            ).fetchall()
        rows = [np.frombuffer(vector, "<f4") for vector, _ in known]
        weights = [np.frombuffer(quality, "<f8")[0] if template == "weighted" else 1.0 for _, quality in known]
        assert gallery.verify_subject(x[0], "s4").score == pytest.approx(
            float(_expected(rows, weights) @ x[0]), abs=1e-6
        )
    with closing(_gallery(tmp_path / "gallery.db", template)) as gallery:
        assert [gallery.identify(row, 5) for row in x] == found
        assert gallery.verify_subject(x[0], "s2") == compared


def test_a_snapshot_of_templates_is_for_the_same_template_only(tmp_path, vectors, monkeypatch):
    monkeypatch.setattr("serving.search.keeping.LEAST_SAMPLES", 1)
    path, x = tmp_path / "gallery.db", vectors(60)
    with closing(_gallery(path, "mean")) as gallery:
        gallery.enrol_many([(f"s{number // 2}", row[None]) for number, row in enumerate(x)])
    assert (tmp_path / "gallery.db-index").is_dir()
    with closing(_gallery(path, "mean")) as gallery:
        assert gallery._projection._examining is not None  # it began with the snapshot
        for number in range(0, 20, 2):
            gallery.enrol(f"s{number}", vectors(1, seed=number + 1))
        gallery.delete_sample("s1", gallery.subject("s1")[1][0].sample_id)
        assert gallery.verify_subject(x[3], "s1").score == pytest.approx(1, abs=1e-6)
        found = [gallery.identify(row, 3) for row in x]
    content = b"".join(file.read_bytes() for file in (tmp_path / "gallery.db-index").iterdir())
    old = templates(_piece(x[2:4], [1, 1]), "mean").vectors_BD[0]
    assert old.tobytes() not in content  # a part of it was erased
    with closing(_gallery(path, "mean")) as gallery:
        assert [gallery.identify(row, 3) for row in x] == found
    with closing(_gallery(path, "maximum")) as gallery:
        assert gallery._projection._examining is None
        assert gallery.identify(x[0], 1).candidates[0].score == pytest.approx(1, abs=1e-6)
