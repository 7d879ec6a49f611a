"""Five landmarks to the crop that a model was trained on: the best similarity transform, and the pixels under it.

Points are (x, y) with the centre of the first pixel at (0, 0), as OpenCV and InsightFace count.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, model_validator

from trainer.strict import Strict

Points = NDArray[np.float64]
LANDMARKS = 5  # the eye that is left in the picture, the right one, the nose's tip, left and right corner of the mouth
LARGEST_SIDE = 1024


class Template(Strict):
    """The crop: its size in pixels, and where in it the five landmarks lie."""

    height: int = Field(ge=8, le=LARGEST_SIDE)
    width: int = Field(ge=8, le=LARGEST_SIDE)
    points: tuple[tuple[float, float], ...] = Field(
        min_length=LANDMARKS, max_length=LANDMARKS, description="eyes, nose, corners of the mouth; left ones first"
    )

    @model_validator(mode="after")
    def _is_a_face(self) -> "Template":
        inside = all(0 <= x < self.width and 0 <= y < self.height for x, y in self.points)  # false for NaN, too
        (left, eyes_y), (right, _), _, (mouth_left, mouth_y), (mouth_right, _) = self.points
        if not (inside and left < right and mouth_left < mouth_right and eyes_y < mouth_y):
            raise ValueError("the points must lie in the crop, left before right, and the eyes above the mouth")
        return self

    @property
    def points_52(self) -> Points:
        return np.array(self.points, np.float64)


def similarity(from_52: Points, to_52: Points) -> Points:
    """The rotation, scale and shift [2, 3] that bring points nearest to others in the sense of least squares.

    Umeyama 1991, "Least-squares estimation of transformation parameters between two point patterns", eqs. 40 to 43.
    Never a reflection. Points that all coincide have no scale: the result is not finite.
    """
    from_mean, to_mean = from_52.mean(axis=0), to_52.mean(axis=0)
    from_c, to_c = from_52 - from_mean, to_52 - to_mean
    u, singular, vt = np.linalg.svd(to_c.T @ from_c / len(from_52))
    signs = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt)) or 1.0])
    rotation = u @ np.diag(signs) @ vt
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = (singular * signs).sum() / from_c.var(axis=0).sum()
        return np.column_stack([scale * rotation, to_mean - scale * rotation @ from_mean])


def footprint(landmarks_52: Points, template: Template) -> float:
    """Pixels of the photograph under one side of the crop, whose sides are taken in their geometric mean."""
    matrix_23 = similarity(landmarks_52, template.points_52)
    scale = float(np.sqrt(abs(np.linalg.det(matrix_23[:, :2]))))
    return float(np.sqrt(template.height * template.width)) / scale if scale > 0 else 0.0


def align(image: Image.Image, landmarks_52: Points, template: Template) -> Image.Image:
    """The crop in which the landmarks lie as near as can be to the template's; black outside the photograph.

    Bicubic. A face that is much larger than the crop is first averaged down, else its finest lines would turn into
    patterns.
    """
    inverse_23 = _inverse(similarity(landmarks_52, template.points_52))
    # Pillow counts from the pixel's corner, so that the centre of the first is at (0.5, 0.5).
    inverse_23[:, 2] += 0.5 - inverse_23[:, :2] @ (0.5, 0.5)
    shrink = int(np.sqrt(abs(np.linalg.det(inverse_23[:, :2]))))
    if shrink >= 2:
        corners = np.array([(0, 0), (template.width, 0), (0, template.height), (template.width, template.height)])
        reached = corners @ inverse_23[:, :2].T + inverse_23[:, 2]
        low = np.clip(np.floor(reached.min(axis=0)) - 2 * shrink, 0, image.size).astype(int)
        high = np.clip(np.ceil(reached.max(axis=0)) + 2 * shrink, 0, image.size).astype(int)
        if (high > low).all():
            image = image.reduce(shrink, box=(*low.tolist(), *high.tolist()))
            inverse_23[:, 2] -= low
            inverse_23 /= shrink
    size, numbers = (template.width, template.height), tuple(inverse_23.ravel().tolist())
    return image.transform(size, Image.Transform.AFFINE, numbers, Image.Resampling.BICUBIC)


def _inverse(matrix_23: Points) -> Points:
    turn = np.linalg.inv(matrix_23[:, :2])
    return np.column_stack([turn, -turn @ matrix_23[:, 2]])
