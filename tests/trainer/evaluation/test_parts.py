"""The smaller parts of a Report against their definitions: groups, several samples, growth, hard pairs, comparisons."""

from itertools import combinations
from math import comb

import numpy as np
import pytest

from tests.trainer.evaluation.made_up import made_up
from trainer.errors import UserError
from trainer.evaluation import protocols, verification
from trainer.evaluation.comparison import compare
from trainer.evaluation.exhibits import growth, hardest
from trainer.evaluation.groups import differentials
from trainer.evaluation.protocols import Measured, enrolled_rows, measure
from trainer.evaluation.scores import fused
from trainer.evaluation.several import enrolments


@pytest.fixture(autouse=True)
def few_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "REPLICATES", 200)


def measured(vectors: np.ndarray, labels: np.ndarray, **how: object) -> Measured:
    return measure(vectors, labels, [f"identity {k}" for k in range(labels.max() + 1)], **how)


def test_a_group_has_the_errors_of_its_own_pairs_at_the_common_threshold() -> None:
    vectors, labels = made_up(40, 5, 0.9)
    codes = (labels < 15).astype(np.int64)
    found = differentials((vectors, vectors), labels, codes, ["old", "young"], "age", 0.05)
    assert [group.value for group in found.groups] == ["old", "young"]
    for code, group in enumerate(found.groups):
        scores = {True: [], False: []}
        for i, j in combinations(np.flatnonzero(codes == code).tolist(), 2):
            scores[bool(labels[i] == labels[j])].append(float(vectors[i] @ vectors[j]))
        assert (group.mated_pairs, group.non_mated_pairs) == (len(scores[True]), len(scores[False]))
        assert group.fmr == pytest.approx(np.mean(np.array(scores[False]) >= found.threshold))
        assert group.fnmr == pytest.approx(np.mean(np.array(scores[True]) < found.threshold))
        assert group.fmr_interval[0] < group.fmr < group.fmr_interval[1]
    rates = [group.fmr for group in found.groups]
    assert found.fmr_differential == pytest.approx(max(rates) / min(rates))


def test_a_group_without_pairs_says_so() -> None:
    vectors, labels = made_up(30, 4, 0.5)
    found = differentials((vectors, vectors), labels, np.where(labels == 0, 0, 1), ["", "many"], "site", 1e-9)
    assert found.far == pytest.approx(30 / found.groups[1].non_mated_pairs, rel=0.1)  # raised to what is resolved
    assert found.groups[0].value == "(none)"
    assert (found.groups[0].fmr, found.groups[0].reason) == (None, "it takes two subjects, and two samples of one")
    assert found.fmr_differential is None
    assert "fewer than 30 resolve no rate" in found.groups[1].reason


def test_templates_are_normalised_means() -> None:
    vectors, labels = made_up(7, 4, 0.8)
    quality = np.random.default_rng(0).random(28)
    found, names = fused(vectors, labels, quality)
    for row, label in enumerate(names.tolist()):
        mean = (vectors[labels == label] * quality[labels == label, None]).sum(axis=0)
        assert found[row] == pytest.approx(mean / np.linalg.norm(mean), abs=1e-6)
    opposite = np.array([[1.0, 0], [-1, 0], [0, 1]], np.float32)
    assert fused(opposite, np.array([0, 0, 1]))[0].tolist() == [[1, 0], [0, 1]]  # cancelled out: the first one


def test_several_samples_are_the_loop_over_probes() -> None:
    vectors, labels = made_up(40, 6, 1.1)
    strangers = np.arange(30, 40)
    quality = np.random.default_rng(1).random(len(labels))
    found = {one.way: one for one in enrolments(vectors, labels, strangers, 0.1, quality_N=quality, seed=0)}
    rows = {label: np.flatnonzero(labels == label) for label in range(30)}
    probes = [(row, label) for label in range(30) for row in rows[label][3:]]
    score = {
        "first": lambda v, r: float(v @ vectors[r[0]]),
        "maximum": lambda v, r: float(max(v @ vectors[k] for k in r[:3])),
        "mean": lambda v, r: float(v @ (m := vectors[r[:3]].sum(axis=0)) / np.linalg.norm(m)),
        "quality": lambda v, r: float(v @ (m := quality[r[:3]] @ vectors[r[:3]]) / np.linalg.norm(m)),
    }
    for way, of in score.items():
        right = [max(rows, key=lambda label: of(vectors[row], rows[label])) == mine for row, mine in probes]
        assert found[way].rank1 == pytest.approx(np.mean(right)), way
        best = sorted(max(of(vectors[row], r) for r in rows.values()) for row in np.flatnonzero(labels >= 30))
        threshold = best[-len(best) // 10 - 1]
        missed = [of(vectors[row], rows[mine]) <= threshold for row, mine in probes]
        assert found[way].fnir == pytest.approx(np.mean(missed), abs=1 / len(probes)), way
    assert found["first"].samples == 1
    assert found["mean"].samples == 3


@pytest.mark.parametrize("bad", [-0.1, np.nan, np.inf])
def test_impossible_qualities_are_refused(bad: float) -> None:
    vectors, labels = made_up(6, 4, 0.5)
    with pytest.raises(UserError, match="qualities are numbers of 0 or more"):
        enrolments(vectors, labels, np.array([0]), 0.1, quality_N=np.full(24, bad), seed=0)


def test_growth_is_the_mean_over_all_galleries() -> None:
    vectors, labels = made_up(7, 3, 1.5, dimension=4)
    enrolled = enrolled_rows(labels)
    found = growth((vectors, vectors), labels, enrolled, 0.6)
    assert found.sizes == [1, 2, 3, 4, 5, 6]
    for size, fpir in zip(found.sizes, found.fpir, strict=True):
        hits = []
        for row in range(len(labels)):
            others = [k for k in range(7) if k != labels[row]]
            for gallery in combinations(others, size):
                hits.append(any(vectors[row] @ vectors[enrolled[k]] >= 0.6 for k in gallery))
        assert len(hits) == 21 * comb(6, size)
        assert fpir == pytest.approx(np.mean(hits))


def test_the_hardest_pairs_are_those_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.evaluation.scores.BLOCK", 900)
    vectors, labels = made_up(30, 4, 0.8)
    found = hardest(vectors, labels, vectors)
    best: dict[tuple[int, int], float] = {}
    for i, j in combinations(range(len(labels)), 2):
        key = tuple(sorted((int(labels[i]), int(labels[j]))))
        keep = min if key[0] == key[1] else max
        best[key] = keep(best.get(key, float(vectors[i] @ vectors[j])), float(vectors[i] @ vectors[j]))
    matches = sorted((s for (a, b), s in best.items() if a != b), reverse=True)[:8]
    assert [pair.score for pair in found.matches] == pytest.approx(matches, abs=1e-6)
    assert [pair.score for pair in found.non_matches] == pytest.approx(
        sorted(s for (a, b), s in best.items() if a == b)[:8], abs=1e-6
    )
    assert all(labels[pair.first] != labels[pair.second] for pair in found.matches)


def test_a_better_embedder_is_called_better_and_an_equal_one_is_not() -> None:
    good, labels = made_up(120, 5, 0.7)
    noise = np.random.default_rng(5).normal(size=good.shape)
    worse = good + 0.12 * noise
    worse = (worse / np.linalg.norm(worse, axis=1, keepdims=True)).astype(np.float32)
    seen = [measured(one, labels).seen.named(name) for one, name in ((good, "good"), (worse, "worse"))]
    found = compare(*seen, seed=0, replicates=200)
    assert found.sentence.startswith("good errs less by "), found
    eer = found.differences[0]
    assert (eer.what, eer.interval[1] < 0) == ("EER", True)
    assert eer.difference == pytest.approx(eer.first - eer.second)
    assert eer.sentence.startswith("EER: good errs less than worse, by ")
    same = compare(seen[0], seen[0].named("copy"), seed=0, replicates=50)
    assert all(one.interval == (0, 0) for one in same.differences)
    assert same.sentence == f"These {len(same.differences)} measures do not tell good and copy apart."


def test_a_pair_of_equally_good_embedders_is_told_apart_seldom() -> None:
    """Both see the same centres through noise of their own: 60 draws, 5 % of errors are meant."""
    wrong = {"EER": 0, "rank-1 error": 0}
    for repetition in range(60):
        clean, labels = made_up(60, 4, 0.8, seed=repetition)
        generator = np.random.default_rng([repetition, 1])
        seen = []
        for name in "AB":
            noisy = clean + 0.1 * generator.normal(size=clean.shape)
            noisy = (noisy / np.linalg.norm(noisy, axis=1, keepdims=True)).astype(np.float32)
            pairs = verification.verification(noisy, labels, 0)[1:]
            closed = protocols.one_shot_searches(noisy, labels, enrolled_rows(labels))
            seen.append(protocols.Seen(name, pairs, closed, None))
        for one in compare(*seen, seed=0, replicates=200).differences:
            if one.what in wrong:
                wrong[one.what] += not one.interval[0] <= 0 <= one.interval[1]
    assert max(wrong.values()) <= 9, wrong


def test_different_probes_cannot_be_compared() -> None:
    first = measured(*made_up(20, 4, 0.5)).seen
    with pytest.raises(UserError, match="not measured on the same pairs"):
        compare(first.named("a"), measured(*made_up(20, 5, 0.5)).seen.named("b"), seed=0, replicates=10)


def test_doubtful_data_is_told_by_name() -> None:
    vectors, labels = made_up(20, 4, 0.5)
    keep = (labels != 3) & ~((labels == 7) & (np.arange(80) != np.flatnonzero(labels == 7)[0]))
    vectors, labels = vectors[keep], labels[keep]
    probe = np.flatnonzero(labels == 0)
    vectors[probe[1]] = vectors[probe[0]]
    remarks = measured(vectors, labels).report.remarks
    assert len(remarks) == 3
    assert "1 identities have no sample, such as 'identity 3'" in remarks[0]
    assert "1 identities have one sample, such as 'identity 7'" in remarks[1]
    assert "1 probes score 1 with the enrolled sample" in remarks[2]


def test_collapsed_embeddings_are_told() -> None:
    vectors = np.zeros((60, 4), np.float32)
    vectors[:, 0] = 1
    (remark,) = measured(vectors, np.arange(60) // 3).report.remarks
    assert remark == "all pairs score 1.0000: the embeddings have collapsed, and every figure is chance"
