"""Figures of the margins: content, readable without colour, and tables that hold the numbers given."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from PIL import Image

from tests.drawn import meeting
from trainer.evaluation.plots import save
from trainer.figures.margins import BoundaryRow, CurveGroup, MarginCurve, boundary_markdown, boundary_records
from trainer.figures.plot_margins import (
    boundary_plane_figure,
    boundary_table_figure,
    gradient_figure,
    negatives_figure,
    psi_figure,
)

THETA = np.linspace(0.5, 179.5, 181)


def curve(name: str, m: float) -> MarginCurve:
    psi = np.cos(np.radians(THETA)) - m
    return MarginCurve(name, rf"{name}, $m = {m}$", 64.0, THETA, psi, np.ones(181), -64 / (1 + np.exp(8 * psi)))


@pytest.fixture
def groups() -> list[CurveGroup]:
    return [CurveGroup(f"g{n}", f"group {n}", [curve(f"a{k}", k / 10) for k in range(n + 2)]) for n in range(5)]


@pytest.fixture
def rows() -> list[BoundaryRow]:
    region = tuple((float(a), float(a)) for a in range(0, 181, 30))
    wide = tuple((float(a), float(a + 30)) for a in range(0, 151, 30))
    return [
        BoundaryRow("normface", "NormFace", r"s(\cos\theta_1-\cos\theta_2)=0", "s = 0", "", 90.0, 45.0, 0.0, region),
        BoundaryRow("arcface", "ArcFace", r"\theta_1=0", "|x| = 0", "$m=0.5$", 90.0, 30.676, 28.648, wide),
        BoundaryRow("elastic", "ElasticFace", r"\theta_1=0", "|x| = 0", "$m_i=0.5$", 90.0, None, None, wide),
    ]


def drawn(groups: list[CurveGroup], rows: list[BoundaryRow]) -> dict[str, Figure]:
    return {
        "psi": psi_figure(groups),
        "gradients": gradient_figure(groups),
        "negatives": negatives_figure(groups[0]),
        "planes": boundary_plane_figure(rows),
        "table": boundary_table_figure(rows),
    }


def test_figures_are_written_with_content(groups: list[CurveGroup], rows: list[BoundaryRow], tmp_path: Path) -> None:
    for name, figure in drawn(groups, rows).items():
        pdf, png = save(figure, tmp_path, name)
        assert pdf.read_bytes().startswith(b"%PDF")
        with Image.open(png) as image:
            assert np.asarray(image.convert("L"), dtype=np.float64).std() > 10, name


def test_no_text_overlaps(groups: list[CurveGroup], rows: list[BoundaryRow]) -> None:
    for name, figure in drawn(groups, rows).items():
        assert not meeting(figure), name


def test_curves_differ_without_colour(groups: list[CurveGroup]) -> None:
    for axes in gradient_figure(groups).axes:
        styles = [(str(line.get_linestyle()), line.get_marker()) for line in axes.lines if isinstance(line, Line2D)]
        assert len(set(styles)) == len(styles)


def test_the_lines_are_the_arrays(groups: list[CurveGroup]) -> None:
    above, below = gradient_figure(groups).axes[0], gradient_figure(groups).axes[5]
    np.testing.assert_array_equal(above.lines[1].get_ydata(), groups[0].curves[1].slope_T)
    np.testing.assert_array_equal(below.lines[1].get_ydata(), -groups[0].curves[1].gradient_T / 64)


def test_the_table_as_markdown_and_as_records(rows: list[BoundaryRow]) -> None:
    lines = boundary_markdown(rows).splitlines()
    assert lines[3] == r"| arcface | `\|x\| = 0` | m = 0.5 | 30.68° | 28.65° |"
    assert lines[4].endswith("| none | none |")
    assert boundary_records(rows)[1] == {
        "name": "arcface",
        "boundary": "|x| = 0",
        "setting": "m = 0.5",
        "apart_degrees": 90.0,
        "boundary_degrees": 30.676,
        "gap_degrees": 28.648,
    }


def test_margins_with_the_same_regions_share_a_panel(rows: list[BoundaryRow]) -> None:
    figure = boundary_plane_figure(rows)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["NormFace", "ArcFace, $m=0.5$"]
    assert any("As ArcFace: ElasticFace." in text.get_text() for text in figure.findobj(Text))
