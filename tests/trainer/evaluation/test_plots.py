"""Figures are drawn for good, bad and tiny evaluations alike, and show the figures of the report."""

import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from trainer.evaluation import plots
from trainer.evaluation.plots import course_plot, draw_cmc, draw_det, draw_open_set, draw_roc, draw_scores, report_plots
from trainer.evaluation.protocols import measure
from trainer.evaluation.report import Report

NAMES = ["roc.png", "det.png", "scores.png", "open_set.png", "cmc.png"]


def report_of(identities: int, samples: int, spread: float) -> Report:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(identities, 1, 16)) + spread * generator.normal(size=(identities, samples, 16))
    vectors = vectors.reshape(-1, 16) / np.linalg.norm(vectors.reshape(-1, 16), axis=1, keepdims=True)
    labels = np.repeat(np.arange(identities), samples)
    return measure(vectors, labels, [str(k) for k in range(identities)]).report


@pytest.fixture(scope="module")
def report() -> Report:
    return report_of(60, 10, 0.8)


PARTS = {
    draw_roc: ("verification",),
    draw_det: ("verification",),
    draw_scores: ("verification", "open_set"),
    draw_open_set: ("open_set",),
    draw_cmc: ("one_shot",),
}


def drawn(draw: Callable[..., None], report: Report) -> Axes:
    axes: Axes = Figure().add_subplot()
    draw(axes, *(getattr(report, part) for part in PARTS[draw]))
    return axes


def texts(axes: Axes) -> str:
    return " | ".join([axes.get_title(loc="left"), *(text.get_text() for text in axes.texts)])


@pytest.mark.parametrize(
    ("identities", "samples", "spread"),
    [(60, 10, 0.0), (60, 10, 50.0), (2, 2, 0.1)],
    ids=["perfect", "chance", "least"],
)
def test_every_evaluation_has_its_figures(identities: int, samples: int, spread: float, tmp_path: Path) -> None:
    paths = report_plots(report_of(identities, samples, spread), tmp_path / "new" / "folder")
    assert [path.name for path in paths] == NAMES
    for path in paths:
        with Image.open(path) as image:
            assert image.size == (700, 550)
            grey = np.asarray(image.convert("L"))
        assert 0.002 < np.mean(grey < 96) < 0.5  # ink, and not too much of it


def test_the_same_report_gives_the_same_bytes(report: Report, tmp_path: Path) -> None:
    first = [path.read_bytes() for path in report_plots(report, tmp_path / "a")]
    assert [path.read_bytes() for path in report_plots(report, tmp_path / "b")] == first


def test_curves_pass_through_the_operating_points(report: Report) -> None:
    point = report.verification.tar_at_far[0]
    assert point.tar is not None
    far, tar = drawn(draw_roc, report).lines[0].get_data()
    assert np.max(np.asarray(tar)[np.asarray(far) <= point.far]) == pytest.approx(point.tar, abs=5e-3)
    found = report.open_set.points[2]
    assert found.fnir is not None
    fpir, fnir = drawn(draw_open_set, report).lines[0].get_data()
    assert np.min(np.asarray(fnir)[np.asarray(fpir) <= found.fpir]) == pytest.approx(found.fnir, abs=5e-3)


def test_figures_carry_the_numbers_of_the_report(report: Report) -> None:
    assert f"AUC {report.verification.auc:.4f}" in texts(drawn(draw_roc, report))
    assert "EER" in texts(drawn(draw_det, report))
    assert "30 enrolled, 30 not" in texts(drawn(draw_open_set, report))
    shown = [text.get_text() for text in drawn(draw_open_set, report).get_legend().get_texts()]
    point = report.open_set.points[2]
    assert f"{100 * point.fnir:.4g} % at 10 %" in shown
    assert f"rank 1: {100 * report.one_shot.rank1:.4g} %" in texts(drawn(draw_cmc, report))
    labels = [text.get_text() for text in drawn(draw_scores, report).get_legend().get_texts()]
    threshold = report.open_set.points[1].threshold
    assert labels[:2] == ["non-mated pairs", "mated pairs"]
    assert f"FPIR 1 %: {threshold:.3f}" in labels


def test_no_label_lies_upon_another_where_errors_are_many() -> None:
    """FNIR is then nearly the same at all operating points."""
    axes = drawn(draw_open_set, report_of(60, 20, 1.6))
    axes.figure.savefig(BytesIO())
    inside = legend.get_texts() if (legend := axes.get_legend()) else []
    boxes = [text.get_window_extent() for text in (*axes.texts, *inside)]
    assert len(boxes) >= 3
    assert not any(one.overlaps(other) for place, one in enumerate(boxes) for other in boxes[:place])


def test_axes_are_named_and_have_units(report: Report) -> None:
    for draw in (draw_roc, draw_det, draw_scores, draw_open_set, draw_cmc):
        axes = drawn(draw, report)
        assert axes.get_xlabel()
        assert axes.get_ylabel()
    axes = drawn(draw_roc, report)
    axes.figure.canvas.draw()
    assert all(label.get_text().endswith("%") for label in axes.get_yticklabels() if label.get_text())


def test_the_rest_of_the_evaluation_needs_neither_torch_nor_matplotlib() -> None:
    """The service imports it where only numpy and pydantic are installed."""
    code = (
        "import sys; import trainer.evaluation.protocols, trainer.evaluation.calibration;"
        "print(sorted({'torch', 'matplotlib', 'scipy', 'sklearn', 'ray', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_course_of_a_run_shows_every_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "Figure", lambda **how: figures.append(Figure(**how)) or figures[-1])
    course = [(10, {"within_between": 3.0, "self_duality": 1.0}), (20, {"within_between": 2.0}), (30, {"last": 1.0})]
    assert course_plot(course, tmp_path / "course.png") == tmp_path / "course.png"
    lines = {axes.get_title(loc="left"): axes.lines[0].get_xydata().tolist() for axes in figures[0].axes}
    assert lines == {
        "last": [[30, 1.0]], "self duality": [[10, 1.0]], "within between": [[10, 3.0], [20, 2.0]],
    }  # fmt: skip
    with Image.open(tmp_path / "course.png") as image:
        assert np.asarray(image.convert("L"), dtype=np.float64).std() > 5
    first = (tmp_path / "course.png").read_bytes()
    course_plot(course, tmp_path / "course.png")
    assert (tmp_path / "course.png").read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["course.png"]
