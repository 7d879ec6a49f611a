"""Protocols from files: what is read, what is refused, and the figures against loops over the lists."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from tests.trainer.evaluation.made_up import made_up
from trainer.errors import UserError
from trainer.evaluation import verification
from trainer.evaluation.listed import measure_lists, read_protocol, templates
from trainer.evaluation.lists import Lists


@pytest.fixture(autouse=True)
def few_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "REPLICATES", 50)


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_list_of_pairs(tmp_path: Path) -> None:
    lists = read_protocol(
        written(tmp_path / "pairs.txt", "a/1.png b/1.png 0\na/1.png a/2.png 1\n\na/2.png,c.png,0\n".replace(",", " "))
    )
    assert list(lists.images) == ["a/1.png", "b/1.png", "a/2.png", "c.png"]
    assert lists.pairs_P2.tolist() == [[0, 1], [0, 2], [2, 3]]
    assert lists.same_P.tolist() == [False, True, False]
    assert lists.subject_T.tolist() == [0, 1, 0, 2]
    assert lists.folds_P.tolist() == [0, 3, 6]


@pytest.mark.parametrize("separator", [" ", "\t", ","])
def test_folds_and_separators(tmp_path: Path, separator: str) -> None:
    rows = [("a", "b", "1", "x"), ("a", "c", "0", "x"), ("d", "e", "1", "y")]
    lists = read_protocol(written(tmp_path / "p.csv", "\n".join(separator.join(row) for row in rows)))
    assert lists.folds_P.tolist() == [0, 0, 1]


def test_the_pairs_of_lfw(tmp_path: Path) -> None:
    lists = read_protocol(
        written(tmp_path / "pairs.txt", "2\t1\nAda\t1\t4\nAda\t1\tBen_J\t2\nCy\t1\t2\nCy\t2\tAda\t4\n")
    )
    assert lists.images[:3] == ["Ada/Ada_0001.jpg", "Ada/Ada_0004.jpg", "Ben_J/Ben_J_0002.jpg"]
    assert lists.same_P.tolist() == [True, False, True, False]
    assert lists.folds_P.tolist() == [0, 0, 1, 1]
    assert lists.subjects == ["Ada", "Ben_J", "Cy"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "lists no pair"),
        ("a b 2\n", r"line 1: 'a b 2' is no pair"),
        ("a b 1\na b\n", "line 2: 'a b' is no pair"),
        ("a b 1\nb c 1\na c 0\n", "pair 3 is called different, but other lines make both images the same"),
        ("a a 1\n", "pair 1 compares an image with itself"),
        ("../../etc/passwd b 0\n", r"'\.\./\.\./etc/passwd' leads out of the images' folder"),
        ("/etc/passwd b 0\n", "'/etc/passwd' leads out"),
        ("10 300\nAda 1 2\n", "lists 1 pairs, but its first line announces 6000"),
        ("1 1\nAda x 2\nAda 1 Ben 2\n", "line 2: 'Ada x 2' is neither"),
    ],
)
def test_a_malformed_list_is_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_protocol(written(tmp_path / "pairs.txt", text))


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pairs.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is no text"):
        read_protocol(tmp_path / "pairs.txt")
    with pytest.raises(UserError, match="No such file"):
        read_protocol(tmp_path / "none.txt")


def test_omniglots_runs(tmp_path: Path) -> None:
    for run in ("run01", "run02"):
        lines = [f"{run}/test/item0{k}.png {run}/training/class0{3 - k}.png" for k in (1, 2)]
        written(tmp_path / "all_runs" / run / "class_labels.txt", "\n".join(lines))
    lists = read_protocol(tmp_path / "all_runs")
    assert list(lists.images)[:4] == [f"run01/{name}" for name in (
        "training/class01.png", "training/class02.png", "test/item01.png", "test/item02.png")]  # fmt: skip
    assert [(s.gallery_G.tolist(), s.probes_P.tolist()) for s in lists.searches] == [([0, 1], [2, 3]), ([4, 5], [6, 7])]
    assert lists.subject_T.tolist() == [0, 1, 1, 0, 2, 3, 3, 2]
    one = read_protocol(tmp_path / "all_runs" / "run01" / "class_labels.txt")
    assert one.images[2] == "test/item01.png"
    vectors = np.eye(8, dtype=np.float32)[[0, 1, 1, 0, 2, 3, 2, 3]]  # all of run 1 are right, none of run 2
    report = measure_lists(vectors, lists, seed=0, source="runs", model_id="m").report
    assert report.one_shot is not None
    assert (report.one_shot.rank1, report.one_shot.rank1_draws, report.one_shot.gallery_size) == (0.5, [1.0, 0.0], 2)
    assert (report.verification, report.open_set) == (None, None)


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no class_labels"):
        read_protocol(tmp_path)
    written(tmp_path / "class_labels.txt", "run01/test/item01.png\n")
    with pytest.raises(UserError, match=r"line 1: 'run01/test/item01\.png' is not a test and a training image"):
        read_protocol(tmp_path)


IJB = {
    "g1.csv": "TEMPLATE_ID,SUBJECT_ID,FILENAME,SIGHTING_ID\n1,ada,a1.png,10\n1,ada,a2.png,11\n2,ben,b1.png,12\n",
    "g2.csv": "TEMPLATE_ID,SUBJECT_ID,FILENAME,SIGHTING_ID\n3,cy,c1.png,13\n",
    "probes.csv": (
        "TEMPLATE_ID,SUBJECT_ID,FILENAME,SIGHTING_ID\n"
        "4,ada,a3.png,20\n4,ada,a4.png,20\n4,ada,a5.png,21\n5,cy,c2.png,22\n"
    ),
    "match.csv": "1,4\n2,4\n3,5\n",
    "protocol.yaml": "pairs: match.csv\ngalleries: [g1.csv, g2.csv]\nprobes: probes.csv\n",
}


def ijb(folder: Path, **changed: str) -> Path:
    for name, text in {**IJB, **{key.replace("_", "."): value for key, value in changed.items()}}.items():
        written(folder / name, text)
    return folder / "protocol.yaml"


def test_templates_are_compared_and_searched(tmp_path: Path) -> None:
    lists = read_protocol(ijb(tmp_path))
    assert list(lists.images) == ["a1.png", "a2.png", "b1.png", "c1.png", "a3.png", "a4.png", "a5.png", "c2.png"]
    assert lists.pairs_P2.tolist() == [[0, 3], [1, 3], [2, 4]]
    assert lists.same_P.tolist() == [True, False, True]
    assert [(s.gallery_G.tolist(), s.probes_P.tolist()) for s in lists.searches] == [([0, 1], [3, 4]), ([2], [3, 4])]
    vectors, _ = made_up(8, 1, 0.0, dimension=5)
    found = templates(vectors, lists)
    unit = lambda v: v / np.linalg.norm(v)  # noqa: E731
    assert found[3] == pytest.approx(
        unit(unit(vectors[4] + vectors[5]) + vectors[6]), abs=1e-6
    )  # two frames, one medium
    assert found[0] == pytest.approx(unit(vectors[0] + vectors[1]), abs=1e-6)
    report = measure_lists(vectors, lists, seed=0, source="ijb", model_id="m").report
    assert report.open_set is not None
    assert (report.open_set.mated_probes, report.open_set.non_mated_probes) == (2, 2)
    best = sorted([found[4] @ found[0], found[4] @ found[1]])[-1], found[3] @ found[2]
    assert max(report.open_set.thresholds[:-1]) >= max(best) - 1e-5


def test_insightfaces_lists_have_no_heading(tmp_path: Path) -> None:
    written(tmp_path / "tid_mid.txt", "1.jpg 7 1\n2.jpg 7 2\n3.jpg 9 3\n4.jpg 11 4\n")
    written(tmp_path / "labels.txt", "7 9 1\n9 11 0\n")
    lists = read_protocol(written(tmp_path / "p.yaml", "templates: tid_mid.txt\npairs: labels.txt\n"))
    assert lists.same_P.tolist() == [True, False]
    assert lists.template_I.tolist() == [0, 0, 1, 2]
    assert lists.subject_T[0] == lists.subject_T[1]
    assert lists.subject_T[1] != lists.subject_T[2]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"protocol_yaml": "pears: match.csv\n"}, "is no protocol: Extra inputs"),
        ({"protocol_yaml": "galleries: [g1.csv]\n"}, "compares nothing"),
        ({"protocol_yaml": "!!python/object/apply:os.system [ls]\n"}, "is no protocol"),
        ({"protocol_yaml": "- 1\n"}, "is no protocol"),
        ({"match_csv": "1,99\n"}, "template 99 is in no table"),
        ({"match_csv": "1,4,1\n2,4,1\n"}, "pair 2 is called the same, but is of two subjects"),
        ({"match_csv": "1,4,0\n2,4,0\n"}, "pair 1 is called not the same, but is of one subject"),
        ({"match_csv": "1,4,5\n"}, "is not two templates"),
        ({"g2_csv": IJB["probes.csv"]}, "template 4 is enrolled and a probe as well"),
        ({"g2_csv": "TEMPLATE_ID,FILENAME\n3,c1.png\n"}, "is no table of templates"),
        ({"g2_csv": "TEMPLATE_ID,SUBJECT_ID,FILENAME\n1,cy,c1.png\n"}, "belongs to subject cy, but to ada elsewhere"),
        ({"g2_csv": "TEMPLATE_ID,SUBJECT_ID,FILENAME\n3,cy\n"}, "line 2: 2 words, but the first line has 3"),
        ({"g2_csv": "TEMPLATE_ID,SUBJECT_ID,FILENAME\n3,cy,../c.png\n"}, "leads out"),
    ],
)
def test_a_malformed_protocol_is_one_sentence(tmp_path: Path, changed: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_protocol(ijb(tmp_path, **changed))


def test_probes_that_are_enrolled_are_told_by_name(tmp_path: Path) -> None:
    probes = IJB["probes.csv"] + "6,ben,b1.png,30\n"
    lists = read_protocol(ijb(tmp_path, probes_csv=probes))
    vectors, _ = made_up(8, 1, 0.0, dimension=5)
    (remark,) = measure_lists(vectors, lists, seed=0, source="ijb", model_id="m").report.remarks
    assert remark == "1 images of probes are enrolled as well, such as 'b1.png': searches find them too easily"


def test_listed_pairs_have_the_figures_of_all_pairs() -> None:
    vectors, labels = made_up(25, 4, 0.9)
    pairs = np.array(list(combinations(range(100), 2)))
    rows = np.arange(100)
    lists = Lists([f"{k}.png" for k in rows], rows, rows, rows, labels, [str(k) for k in range(25)],
                  pairs_P2=pairs, same_P=np.equal(*labels[pairs].T), folds_P=np.arange(len(pairs)) % 10)  # fmt: skip
    found = measure_lists(vectors, lists, seed=0, source="", model_id="m").report.verification
    whole, _, _ = verification.verification(vectors, labels, 0)
    assert found is not None
    for name in ("mated_pairs", "non_mated_pairs", "subjects"):
        assert getattr(found, name) == getattr(whole, name)
    assert found.eer == pytest.approx(whole.eer, abs=1e-3)
    assert found.eer_interval == pytest.approx(whole.eer_interval, abs=2e-3)
    assert found.ten_fold is not None
    assert 0.8 < found.ten_fold.accuracy < 1


def test_pairs_of_one_kind_give_no_rates(tmp_path: Path) -> None:
    lists = read_protocol(written(tmp_path / "p.txt", "a b 1\nc d 1\n"))
    with pytest.raises(UserError, match="2 mated and 0 non-mated pairs give no error rates"):
        measure_lists(np.eye(4, dtype=np.float32), lists, seed=0, source="", model_id="m")
