"""How well a face can be recognised, as far as its picture tells: sharpness, size, light, pose, length of vector."""

import math
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, ValidationError, model_validator

from trainer.detection.align import Points, Template
from trainer.errors import UserError
from trainer.strict import Strict

# How far the nose's tip and the corners of the mouth stand out before the eyes, in distances between the eyes: coarse
# means of adult heads.
_NOSE, _MOUTH = 0.5, 0.1
_FAIR_SHARPNESS, _FAIR_CONTRAST = 0.02, 0.1  # of which `score` makes a half
_WORDS = {
    "sharpness": "too blurred", "size": "too small", "contrast": "too flat", "norm": "of too short a vector",
    "yaw": "turned too far aside", "pitch": "tilted too far up or down", "roll": "leaning too far",
}  # fmt: skip


class Quality(Strict):
    """Measures of a crop as the model sees it. Each says its own; none is a probability of being recognised."""

    sharpness: float = Field(description="variance of the Laplacian over that of the grey values; falls with blur")
    size: float = Field(description="pixels of the photograph under one side of the crop")
    brightness: float = Field(description="mean grey value, 0 to 1")
    contrast: float = Field(description="standard deviation of the grey values over its largest, 0 to 1")
    yaw: float | None = Field(None, description="degrees that the head is turned, estimated from the landmarks")
    pitch: float | None = Field(None, description="degrees that it nods")
    roll: float | None = Field(None, description="degrees that it leans; alignment has turned it upright")
    norm: float | None = Field(None, description="length of the vector, where the model's loss makes it tell quality")
    score: float = Field(
        description="the worst of the above but the norm, each brought to 0 to 1: ranks pictures of one identity"
    )


class Bounds(Strict):
    """What is asked of a face; None: anything. Angles are the most to either side, the others the least."""

    sharpness: float | None = Field(None, ge=0)
    size: float | None = Field(None, ge=0)
    brightness: tuple[float, float] | None = Field(None, description="the least and the most")
    contrast: float | None = Field(None, ge=0, le=1)
    yaw: float | None = Field(None, ge=0, le=90)
    pitch: float | None = Field(None, ge=0, le=90)
    roll: float | None = Field(None, ge=0, le=180)
    norm: float | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _light_is_a_range(self) -> Self:
        if self.brightness is not None and not 0 <= self.brightness[0] < self.brightness[1] <= 1:
            raise ValueError("brightness is a range within 0 to 1")
        return self

    def faults(self, quality: Quality) -> list[str]:
        """What is wrong with a face, in words; a measure that is not known is not asked for."""
        found = []
        if self.brightness is not None:
            low, high = self.brightness
            if not low <= quality.brightness <= high:
                what = "too dark" if quality.brightness < low else "too bright"
                found.append(f"{what} (brightness {quality.brightness:.3g}; {low:g} to {high:g} is asked for)")
        for name, words in _WORDS.items():
            bound, value = getattr(self, name), getattr(quality, name)
            if bound is None or value is None:
                continue
            most = name in ("yaw", "pitch", "roll")
            if (abs(value) > bound) if most else (value < bound):
                found.append(
                    f"{words} ({name} {value:.3g}; {'at most' if most else 'at least'} {bound:g} is asked for)"
                )
        return found

    @classmethod
    def read(cls, text: str, told: "Bounds | None" = None) -> "Bounds":
        """From words such as `manifest,size=60,brightness=0.2..0.9`, where `manifest` stands for `told`.

        Raises:
            UserError: another word, or a value that is not allowed.
        """
        values: dict[str, object] = {}
        for word in filter(None, map(str.strip, text.split(","))):
            name, _, value = word.partition("=")
            if word == "manifest":
                values |= (told or cls()).model_dump(exclude_none=True)
            elif name in cls.model_fields:
                values[name] = value.split("..") if name == "brightness" else value
            else:
                raise UserError(f"'{word}' asks for no quality; allowed: manifest, {'=N, '.join(cls.model_fields)}=N")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(map(str, fault["loc"])) or "brightness"
            raise UserError(f"the quality that is asked for, '{text}': {where}: {fault['msg']}") from error


def judge(
    crop: Image.Image, size: float, landmarks_52: Points | None = None, template: Template | None = None
) -> Quality:
    """The quality of a crop in the model's own size; pose where there are landmarks.

    Args:
        size: pixels of the photograph under one side of the crop.
    """
    grey_HW = np.asarray(crop.convert("L"), np.float32)
    variance = float(grey_HW.var())
    sharpness = float(_laplacian(grey_HW).var()) / variance if variance > 0 else 0.0
    brightness, contrast = float(grey_HW.mean()) / 255, math.sqrt(variance) / 127.5
    facing, angles = 1.0, {}
    if landmarks_52 is not None and template is not None:
        yaw, pitch, roll = pose(landmarks_52, template)
        angles = {"yaw": yaw, "pitch": pitch, "roll": roll}
        facing = max(0.0, math.cos(math.radians(yaw))) * max(0.0, math.cos(math.radians(pitch)))
    score = min(
        sharpness / (sharpness + _FAIR_SHARPNESS),
        size / (size + math.sqrt(crop.width * crop.height)),
        4 * brightness * (1 - brightness),
        contrast / (contrast + _FAIR_CONTRAST),
        facing,
    )
    found = {"sharpness": sharpness, "size": size, "brightness": brightness, "contrast": contrast, "score": score}
    return Quality(**{name: float(f"{value:.4g}") for name, value in (found | angles).items()})


def _laplacian(grey_HW: NDArray[np.float32]) -> NDArray[np.float32]:
    """Four times each inner pixel less its neighbours.

    Its variance over that of the picture is the mean of |w|^4 under the power spectrum. A Gaussian blur multiplies the
    spectrum by exp(-s^2 |w|^2), which moves weight to low frequencies: so it falls with any blur, of any picture, up to
    the edges; and it does not change with the light.
    """
    inner = 4 * grey_HW[1:-1, 1:-1]
    return inner - grey_HW[:-2, 1:-1] - grey_HW[2:, 1:-1] - grey_HW[1:-1, :-2] - grey_HW[1:-1, 2:]


def pose(landmarks_52: Points, template: Template) -> tuple[float, float, float]:
    """Yaw, pitch and roll in degrees of a mean head whose landmarks are seen so: scaled orthographic projection.

    The head is the template with depth. The 2 x 3 matrix that maps it to the landmarks in the sense of least squares is
    brought to the nearest scaled rotation (the linear step of DeMenthon and Davis 1995, "Model-based object pose in 25
    lines of code"). Positive: turned to the picture's left, nose lowered, leaning to the picture's right.
    """
    head_53 = np.column_stack([template.points_52, np.zeros(5)])
    eyes = float(np.linalg.norm(head_53[1] - head_53[0]))
    head_53[2:, 2] = -eyes * np.array([_NOSE, _MOUTH, _MOUTH])  # z points into the picture
    seen_52 = landmarks_52 - landmarks_52.mean(axis=0)
    linear_32 = np.linalg.lstsq(head_53 - head_53.mean(axis=0), seen_52, rcond=None)[0]
    u, _, vt = np.linalg.svd(linear_32.T, full_matrices=False)
    first, second = u @ vt
    third = np.cross(first, second)
    yaw = math.degrees(math.asin(float(np.clip(-third[0], -1, 1))))
    pitch = math.degrees(math.atan2(third[1], third[2]))
    roll = math.degrees(math.atan2(second[0], first[0]))
    return yaw, pitch, roll
