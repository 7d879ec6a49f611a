import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from tests.detectors import DRAWN, MARKS, painted, placed, template
from trainer.detection.align import Template, align, footprint, similarity

CROP = Template.model_validate(template(64))
angles, scales, shifts = st.floats(-180, 180), st.floats(0.05, 20), st.floats(-500, 500)


def turned(points_52: np.ndarray, degrees: float, scale: float, x: float, y: float) -> np.ndarray:
    turn = np.deg2rad(degrees)
    matrix = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return points_52 @ matrix.T + (x, y)


@given(angles, scales, shifts, shifts)
def test_a_similarity_is_found_again(degrees: float, scale: float, x: float, y: float) -> None:
    seen_52 = turned(CROP.points_52, degrees, scale, x, y)
    matrix_23 = similarity(seen_52, CROP.points_52)
    assert np.allclose(seen_52 @ matrix_23[:, :2].T + matrix_23[:, 2], CROP.points_52, atol=1e-6)
    assert footprint(seen_52, CROP) == pytest.approx(64 * scale)


@settings(max_examples=50)
@given(st.integers(0, 1000))
def test_no_similarity_comes_nearer(seed: int) -> None:
    """Of points that are no similar figure, mirrored ones among them: small changes of the answer are worse."""
    generator = np.random.default_rng(seed)
    seen_52 = generator.normal(size=(5, 2)) * 30
    if seed % 2:
        seen_52 = CROP.points_52 * (-1, 1) + generator.normal(size=(5, 2))
    matrix_23 = similarity(seen_52, CROP.points_52)
    (a, b), (c, d) = matrix_23[:, :2]
    assert a == pytest.approx(d)
    assert b == pytest.approx(-c)  # so the determinant is a^2 + b^2: no reflection

    def error(a: float, b: float, x: float, y: float) -> float:
        moved = np.column_stack([a * seen_52[:, 0] + b * seen_52[:, 1] + x, a * seen_52[:, 1] - b * seen_52[:, 0] + y])
        return float(np.square(moved - CROP.points_52).sum())

    best = np.array([a, b, *matrix_23[:, 2]])
    for step in np.vstack([np.eye(4), -np.eye(4)]) * (1e-3, 1e-3, 1e-1, 1e-1):
        assert error(*best) <= error(*(best + step))


@pytest.mark.parametrize("degrees", [0, 15, 90, -120, 180])
@pytest.mark.parametrize("side", [40, 64, 130, 400])
def test_the_crop_is_the_upright_face(degrees: float, side: float) -> None:
    photo, (marks,) = placed([(3, 320, 240, side, degrees)])
    crop = np.asarray(align(photo, marks, CROP), float)
    wanted = np.asarray(painted(3).resize((64, 64), Image.Resampling.BICUBIC), float)
    assert np.abs(crop - wanted)[3:-3, 3:-3].mean() < (4 if side >= 64 else 9)  # a smaller face has less to show


def test_an_upright_face_of_the_crops_size_stays_as_it_is() -> None:
    face = painted(5).resize((64, 64), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(align(face, CROP.points_52, CROP), int) - np.asarray(face, int)).max() <= 1


def test_fine_lines_do_not_become_patterns() -> None:
    """Stripes of one pixel under a crop of a sixteenth are grey, whatever the turn."""
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (DRAWN * 2, DRAWN)))
    for degrees in (0, 3, 45):
        seen_52 = turned(np.array(MARKS) * DRAWN - DRAWN / 2, degrees, 1.9, DRAWN, DRAWN)
        crop = np.asarray(align(stripes, seen_52, CROP), float)
        assert np.abs(crop - 127.5)[8:-8, 8:-8].max() < 10


def test_outside_the_photograph_is_black() -> None:
    white = Image.new("RGB", (100, 100), "white")
    crop = np.asarray(align(white, turned(CROP.points_52, 0, 1, -32, 20), CROP))
    assert (crop[:, :30] == 0).all()
    assert (crop[:, 34:] == 255).all()
    far = np.asarray(align(white, turned(CROP.points_52, 10, 9, 5000, 5000), CROP))
    assert (far == 0).all()


def test_a_template_must_be_a_face() -> None:
    good = template(64)
    for points in ([[np.nan, 1]] * 5, [[1, 1]] * 5, [[-5, 20], [40, 20], [30, 35], [20, 50], [40, 50]]):
        with pytest.raises(ValidationError, match="the points must lie in the crop"):
            Template.model_validate(good | {"points": points})
