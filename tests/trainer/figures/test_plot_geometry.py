"""Figures of embeddings: they have content, and their lines are where the scores are equal."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.contour import QuadContourSet
from matplotlib.text import Annotation, Text
from numpy.typing import NDArray
from PIL import Image

from tests.drawn import meeting
from trainer.evaluation.plots import save
from trainer.figures.digits import Trained
from trainer.figures.plot_geometry import _columns, _name_directions, _view, angle_figure, geometry_figure
from trainer.objective.geometry import ClassCentres

Matrix = NDArray[np.float64]


def panel(dimension: int, angular: bool, classes: int = 5) -> Trained:
    random = np.random.default_rng(classes)
    turns = np.linspace(0, 2 * np.pi, classes, endpoint=False)
    centres_CD = np.stack([np.cos(turns), np.sin(turns), 0.3 * np.cos(3 * turns)], axis=1)[:, :dimension]
    labels_N = np.repeat(np.arange(classes), 20)
    features_ND = 5 * centres_CD[labels_N] + 0.4 * random.normal(size=(len(labels_N), dimension))
    samples = (features_ND, labels_N)
    centres = ClassCentres(centres_CD[:, None], np.zeros(classes), None)
    return Trained("loss", "a loss", angular, *samples, *samples, centres, learned_CD=None, losses=())


def crosses(axes: Axes) -> Matrix:
    """Where the slanted black crosses are, [M, 2]."""
    lines = [line for line in axes.lines if line.get_marker() == "x" and line.get_color() == "black"]
    return np.concatenate([np.zeros((0, 2)), *(line.get_xydata() for line in lines)])


def unit(rows: Matrix) -> Matrix:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def ink(path: Path) -> float:
    """Standard deviation of the grey values: 0 for a blank page."""
    with Image.open(path) as image:
        return float(np.asarray(image.convert("L"), dtype=np.float64).std())


@pytest.mark.parametrize("dimension", [2, 3])
def test_figures_are_written_with_content(dimension: int, tmp_path: Path) -> None:
    panels = [panel(dimension, angular=False), panel(dimension, angular=True), panel(dimension, True, 3)]
    for name, figure in (("geometry", geometry_figure(panels)), ("angles", angle_figure(panels))):
        pdf, png = save(figure, tmp_path, name)
        assert pdf.read_bytes().startswith(b"%PDF")
        assert len(pdf.read_bytes()) > 5000
        assert ink(png) > 15
        with Image.open(png) as image:
            assert image.width >= 1400  # two columns at 200 dots an inch
        width, height = figure.get_size_inches()
        thirds = np.asarray(Image.open(png).convert("L"), dtype=np.float64)
        for part in np.array_split(thirds, 3, axis=1):
            assert part.std() > 10, f"a panel of {name} is blank ({width} x {height})"


def test_the_same_arrays_give_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("first", "second"):
        save(geometry_figure([panel(2, True)]), tmp_path / folder, "geometry")
    for name in ("geometry.png", "geometry.pdf"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_every_class_is_named_once_and_no_two_names_meet() -> None:
    figure = geometry_figure([panel(2, True, 5)])
    names = [text for text in figure.axes[0].texts if text.get_text().isdigit()]
    assert sorted(text.get_text() for text in names) == list("01234")
    assert not meeting(figure)


def test_no_text_of_a_large_figure_overlaps() -> None:
    """Thirteen panels, as the margin family has, in the plane and of histograms."""
    panels = [panel(2, angular=bool(place % 2), classes=3 + place % 4) for place in range(13)]
    for figure in (geometry_figure(panels), angle_figure(panels)):
        assert not meeting(figure)


def test_names_that_would_meet_are_moved_apart() -> None:
    turns = np.radians([10, 11, 12, 200, 201])
    x_ND = np.stack([np.cos(turns), np.sin(turns)], axis=1)
    directions = np.stack(list(_name_directions(x_ND, np.arange(5)).values()))
    cosines = directions @ directions.T - 2 * np.eye(5)
    assert np.arccos(cosines.max()) > 0.155
    apart = np.arange(3) * 2 * np.pi / 3
    even_ND = np.stack([np.cos(apart), np.sin(apart)], axis=1)
    kept_ND = list(_name_directions(even_ND, np.arange(3)).values())
    np.testing.assert_allclose(kept_ND, even_ND, atol=1e-12)


def test_boundaries_are_where_the_two_best_scores_are_equal() -> None:
    drawn = panel(2, angular=False)
    axes = geometry_figure([drawn]).axes[0]
    lines = [line for line in axes.collections if isinstance(line, QuadContourSet)]
    points = np.concatenate([path.vertices for line in lines for path in line.get_paths()])
    points = points[np.linalg.norm(points, axis=1) > 0.5]  # at the origin all scores are equal
    ordered = np.sort(drawn.scores(points), axis=1)
    assert len(points) > 100
    assert np.abs(ordered[:, -1] - ordered[:, -2]).max() < 0.02


def test_learned_centres_are_crosses_at_their_own_place_in_the_plane() -> None:
    """Also where they lie beyond every sample; arrows stay those of the class centres."""
    random = np.random.default_rng(3)
    drawn = panel(2, angular=False)
    plain = geometry_figure([drawn]).axes[0]
    assert len(crosses(plain)) == 0
    learned_CD = random.normal(size=(5, 2)) * 20
    axes = geometry_figure([replace(drawn, learned_CD=learned_CD)]).axes[0]
    np.testing.assert_array_equal(crosses(axes), learned_CD)
    assert axes.get_xlim()[1] > np.abs(learned_CD).max()
    arrows, before = ([text.xy for text in one.texts if isinstance(text, Annotation)] for one in (axes, plain))
    assert arrows == before
    ring_CD = crosses(geometry_figure([replace(drawn, angular=True, learned_CD=learned_CD)]).axes[0])
    np.testing.assert_allclose(ring_CD / np.linalg.norm(ring_CD, axis=1, keepdims=True), unit(learned_CD))


def test_learned_centres_are_crosses_at_their_direction_on_the_sphere() -> None:
    """A cross on a half is at (right, up) of the unit vector, and the depth that is missing has that half's sign."""
    learned_CD = np.random.default_rng(4).normal(size=(5, 3)) * 7
    axes = geometry_figure([replace(panel(3, angular=False), learned_CD=learned_CD)]).axes[0]
    found_C3 = []
    for x, y in crosses(axes):
        near = x < 0
        right = x + 1.06 if near else x - 1.06
        depth = np.sqrt(1 - right**2 - y**2)
        found_C3.append([depth if near else -depth, right, y])
    back_CD = np.array(found_C3) @ _view()  # of a rotation the inverse is the transpose
    expected_CD = unit(learned_CD)
    assert len(back_CD) == 5
    for one_D in expected_CD:
        assert np.linalg.norm(back_CD - one_D, axis=1).min() < 1e-9


@pytest.mark.parametrize(("panels", "columns"), [(4, 4), (5, 5), (6, 3), (9, 3), (13, 5), (3, 3)])
def test_few_cells_are_left_empty(panels: int, columns: int) -> None:
    assert _columns(panels, 2) == columns


def test_the_accuracy_stands_below_each_panel() -> None:
    drawn = panel(2, angular=False, classes=10)
    by_hand = np.mean(
        [np.argmax(drawn.centres_MD @ x_D) == c for x_D, c in zip(drawn.test_ND, drawn.test_labels_N, strict=True)]
    )
    texts = [text.get_text() for text in geometry_figure([drawn, replace(drawn, centres=None)]).findobj(Text)]
    assert f"test accuracy {100 * by_hand:.1f} %" in texts
    assert f"test accuracy {100 * drawn.accuracy_by_means():.1f} %" in texts
