"""The protocols against loops over probes, and what they do with chance, duplicates and too little data."""

import json

import numpy as np
import pytest

from trainer.errors import UserError
from trainer.evaluation import verification
from trainer.evaluation.intervals import of_mean
from trainer.evaluation.protocols import enrolled_rows, measure, one_shot_searches, quick, unenrolled_identities
from trainer.evaluation.report import Report, thinned
from trainer.evaluation.verification import ten_fold, whole_identities


def identities(count: int, samples: int, dimension: int, spread: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors: a random centre per identity, and normal deviations from it. Labels in shuffled order."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(count, 1, dimension))
    vectors = (centres + spread * generator.normal(size=(count, samples, dimension))).reshape(-1, dimension)
    order = generator.permutation(len(vectors))
    labels = np.repeat(np.arange(count), samples)[order]
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)[order], labels


@pytest.fixture(autouse=True)
def few_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "REPLICATES", 50)


def evaluate(*held: object, **how: object) -> Report:
    return measure(*held, **how).report


def names(count: int) -> list[str]:
    return [f"identity {k}" for k in range(count)]


def test_the_first_sample_of_each_identity_is_enrolled() -> None:
    labels = np.array([3, 1, 3, 0, 1, 0])
    assert enrolled_rows(labels).tolist() == [3, 1, 0]


def test_drawn_enrolments_differ_and_are_of_the_right_identity() -> None:
    _, labels = identities(30, 5, 4, 0.5)
    draws = [enrolled_rows(labels, seed) for seed in range(4)]
    assert all((labels[rows] == np.arange(30)).all() for rows in draws)
    assert len({tuple(rows) for rows in draws}) == 4
    assert (enrolled_rows(labels, 2) == draws[2]).all()


def test_rank1_and_fnir_are_those_of_the_loop_over_probes() -> None:
    vectors, labels = identities(40, 8, 16, 1.0)
    report = evaluate(vectors, labels, names(40), unenrolled_share=0.3)
    first = {c: vectors[list(labels).index(c)] for c in range(40)}
    probes = [i for i in range(len(labels)) if i != list(labels).index(labels[i])]
    right = [max(first, key=lambda c: float(vectors[i] @ first[c])) == labels[i] for i in probes]
    assert report.one_shot.rank1 == pytest.approx(np.mean(right))
    assert report.one_shot.probes == len(probes) == 40 * 7

    strangers = set(unenrolled_identities(labels, 0.3, 0).tolist())
    assert len(strangers) == 12
    gallery = {c: v for c, v in first.items() if c not in strangers}
    non_mated = sorted(
        max(float(vectors[i] @ g) for g in gallery.values()) for i in range(len(labels)) if labels[i] in strangers
    )
    mated = [i for i in probes if labels[i] not in strangers]
    point = report.open_set.points[2]
    assert point.fpir == 0.1
    assert point.threshold is not None
    assert sum(s >= point.threshold for s in non_mated) == len(non_mated) // 10
    missed = [float(vectors[i] @ first[labels[i]]) < point.threshold for i in mated]
    assert point.fnir == pytest.approx(np.mean(missed))
    wrong = [
        miss or max(gallery, key=lambda c: float(vectors[i] @ gallery[c])) != labels[i]
        for i, miss in zip(mated, missed, strict=True)
    ]
    assert point.fnir_rank1 == pytest.approx(np.mean(wrong))
    assert point.low is not None
    assert point.high is not None
    assert point.low <= point.fnir <= point.high
    assert (report.open_set.gallery_size, report.open_set.non_mated_probes) == (28, 96)


def test_quick_gives_the_figures_of_the_full_report() -> None:
    vectors, labels = identities(60, 12, 16, 1.0)
    report = evaluate(vectors, labels, names(60))
    assert report.open_set.points[1].fnir is not None
    assert quick(vectors, labels) == (report.one_shot.rank1, report.open_set.points[1].fnir)


def test_collapsed_embeddings_score_as_chance() -> None:
    vectors = np.zeros((200, 8), np.float32)
    vectors[:, 0] = 1
    report = evaluate(vectors, np.arange(200) // 5, names(40))
    assert report.one_shot.rank1 == pytest.approx(1 / 40)
    assert report.one_shot.cmc[9] == pytest.approx(10 / 40)
    assert report.one_shot.confusions == []
    assert (report.verification.auc, report.verification.eer) == (0.5, 0.5)
    assert report.open_set.points[2].fnir == 1.0  # every threshold that keeps the FPIR refuses everyone


def test_random_embeddings_score_near_chance() -> None:
    vectors, _ = identities(1000, 1, 32, 0.0)
    report = evaluate(vectors, np.arange(1000) % 50, names(50))
    assert report.one_shot.low <= 0.02 <= report.one_shot.high
    assert report.verification.auc == pytest.approx(0.5, abs=0.02)


def test_confusions_name_the_identity_that_was_taken_instead() -> None:
    angle = {0: (0.0, 1.6), 1: (1.5, 1.5), 2: (3.0, 3.0)}
    vectors = np.array([[np.cos(a), np.sin(a)] for pair in angle.values() for a in pair], np.float32)
    report = evaluate(vectors, np.array([0, 0, 1, 1, 2, 2]), ["a", "b", "c"])
    assert [c.model_dump() for c in report.one_shot.confusions] == [
        {"identity": "a", "taken_for": "b", "probes": 1, "of": 1}
    ]
    assert report.one_shot.rank1 == pytest.approx(2 / 3)


def test_the_report_survives_json_and_is_the_same_for_the_same_seed() -> None:
    vectors, labels = identities(30, 6, 8, 0.7)
    report = evaluate(vectors, labels, names(30), seed=3, source="made up", model_id="abc")
    assert Report.model_validate_json(report.to_json()) == report
    assert "NaN" not in report.to_json()
    assert evaluate(vectors, labels, names(30), seed=3, source="made up", model_id="abc") == report
    other = evaluate(vectors, labels, names(30), seed=4, source="made up", model_id="abc")
    assert other.open_set != report.open_set
    assert json.loads(report.to_json())["source"] == "made up"
    unresolved = [p for p in report.verification.tar_at_far if p.tar is None]
    assert [p.far for p in unresolved] == [1e-3, 1e-4, 1e-5, 1e-6]  # 15 675 non-mated pairs
    assert "tar_at_far_0.0001" not in report.scalars()
    assert report.scalars()["rank1"] == report.one_shot.rank1


def test_the_interval_of_a_mean_covers_the_rate_of_the_population() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        skill = generator.beta(2, 1, size=60)  # subjects differ: their probes are not independent trials
        values = (generator.random((60, 10)) < skill[:, None]).astype(float)
        low, high = of_mean(values.ravel(), np.repeat(np.arange(60), 10))
        hits += low <= 2 / 3 <= high
    assert 178 <= hits <= 199  # 95 % of 200, less than 4 standard deviations off


@pytest.mark.parametrize(
    ("labels", "count", "message"),
    [
        ([0, 1, 2, 3], 4, "0 mated and 6 non-mated pairs"),
        ([0, 0, 0, 0], 1, "two classes or more"),
        ([0, 0, 1, 4], 4, "label 4 has no name among 4 classes"),
        ([0, 0, -1, 1], 4, "label -1 has no name"),
    ],
)
def test_too_little_or_foreign_data_is_an_error(labels: list[int], count: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(np.eye(4), np.array(labels), names(count))


def test_a_quick_look_at_samples_without_a_second_one_is_an_error() -> None:
    with pytest.raises(UserError, match="leave no probe"):
        quick(np.eye(4), np.arange(4))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan")])
def test_an_impossible_share_is_an_error(share: float) -> None:
    with pytest.raises(UserError, match="between 0 and 1"):
        unenrolled_identities(np.arange(10), share, 0)


def test_identities_of_one_sample_are_distractors() -> None:
    vectors, labels = identities(20, 1, 8, 0.0)
    vectors, labels = np.concatenate([vectors, vectors[:3]]), np.concatenate([labels, labels[:3]])
    probe_labels, found = one_shot_searches(vectors, labels, enrolled_rows(labels))
    assert probe_labels.tolist() == labels[:3].tolist()
    assert found.ahead_P.tolist() == [0, 0, 0]


def test_ten_folds_share_no_identity_and_need_enough_of_them() -> None:
    vectors, labels = identities(60, 6, 16, 0.3)
    found = ten_fold(vectors, vectors, labels, 0)
    assert found is not None
    assert found.accuracy > 0.98
    assert found.pairs <= 6000
    few, few_labels = identities(15, 6, 16, 0.3)
    assert ten_fold(few, few, few_labels, 0) is None


def test_whole_identities_are_kept_up_to_the_limit() -> None:
    labels = np.repeat(np.arange(50), 10)
    rows = whole_identities(labels, 123, seed=0)
    assert (np.unique(labels[rows], return_counts=True)[1] == 10).all()
    assert len(rows) == 120
    assert len(whole_identities(labels, 500, seed=0)) == 500


def test_a_thinned_curve_keeps_its_ends_and_its_shape() -> None:
    falling = np.linspace(1, 0, 100_000) ** 3
    rising = np.linspace(0, 1, 100_000)
    kept = thinned(falling, rising)
    assert (kept[0], kept[-1]) == (0, 99_999)
    assert len(kept) <= 800
    assert np.abs(np.interp(rising, rising[kept], falling[kept]) - falling).max() < 1e-3
    small = falling[falling > 1e-9]
    drawn = np.interp(np.log10(small[::-1]), np.log10(falling[kept][:-1][::-1]), rising[kept][:-1][::-1])
    assert np.abs(drawn - rising[: len(small)][::-1]).max() < 0.02
