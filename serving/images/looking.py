"""What a process that decodes makes of an image: the model's pixels, of all of it or of each face, and its quality."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from trainer.data.image import Preprocessing, as_pixels
from trainer.detection.align import align, footprint
from trainer.detection.quality import Quality, judge
from trainer.strict import Strict

if TYPE_CHECKING:  # ONNX Runtime is loaded where there is a detector
    from trainer.detection.detector import Detector, Face

_ASPECT, _SMALLER, _LARGER = 1.25, 2, 8  # of an aligned crop: it may be so much out of shape, smaller or larger
Box = tuple[float, float, float, float]
Which = Literal["only", "largest", "all"]  # of the faces in a photograph


class Seen(Strict):
    """What was found in an image and brought to the model's size: a face, or all of it where there is no detector."""

    box: Box | None = Field(None, description="left, top, right, bottom in pixels of the image; null: all of it")
    landmarks: list[tuple[float, float]] | None = Field(
        None, description="eyes, nose, corners of the mouth, in pixels of the image"
    )
    detection_score: float | None = Field(None, description="how sure the detector is that it is a face, 0 to 1")
    quality: Quality


class ImageAnswer(Seen):
    """What was found in an image: a face, or all of it where the service has no detector."""

    image: str = Field(description="part of the form, and its number where there are several")
    warning: str | None = Field(None, description="why the image may not be what the model expects")
    faults: list[str] = Field([], description="what of its quality is worse than the service asks for")


@dataclass(frozen=True)
class Picture:
    """An image as the model sees it.

    Attributes:
        seen, pixels_FCHW: its faces, the largest first; or one entry that is all of it.
        left_out: faces beyond the most that are looked at.
        size: width and height as it was sent, upright.
        detect_s: seconds that finding its faces took.
    """

    seen: Sequence[Seen]
    pixels_FCHW: NDArray[np.uint8]
    left_out: int
    size: tuple[int, int]
    detect_s: float = 0.0


class Looker:
    """Finds the faces of images, or takes them whole. Opened in the process that uses it."""

    def __init__(self, preprocessing: Preprocessing, detector: Path | None, most_faces: int) -> None:
        self._preprocessing, self._most = preprocessing, most_faces
        self._detector = None if detector is None else _opened(detector)

    @property
    def finds_faces(self) -> bool:
        return self._detector is not None

    def look(self, image: Image.Image) -> Picture:
        if self._detector is None:
            size = float(np.sqrt(image.width * image.height))
            pixels_CHW = as_pixels(image, self._preprocessing)
            return Picture([Seen(quality=judge(_picture(pixels_CHW), size))], pixels_CHW[None], 0, image.size)
        start = time.perf_counter()
        faces = self._detector.find(image)
        seconds = time.perf_counter() - start
        looked = [self._face(image, face) for face in faces[: self._most]]
        pixels_FCHW = np.empty((len(looked), *self._preprocessing.shape_CHW), np.uint8)
        for row, (_, pixels_CHW) in enumerate(looked):
            pixels_FCHW[row] = pixels_CHW
        return Picture([seen for seen, _ in looked], pixels_FCHW, len(faces) - len(looked), image.size, seconds)

    def _face(self, image: Image.Image, face: "Face") -> tuple[Seen, NDArray[np.uint8]]:
        assert self._detector is not None
        template, landmarks_52 = self._detector.manifest.template, face.landmarks_52
        crop = align(image, landmarks_52, template)
        seen = Seen(
            box=tuple(round(value, 2) for value in face.box),
            landmarks=[(round(x, 2), round(y, 2)) for x, y in landmarks_52.tolist()],
            detection_score=round(face.score, 4),
            quality=judge(crop, footprint(landmarks_52, template), landmarks_52, template),
        )
        return seen, as_pixels(crop, self._preprocessing)


def unlike_a_crop(size: tuple[int, int], form: Preprocessing) -> bool:
    """Whether an image is far from an aligned crop in shape or size, so that nobody can have aligned it."""
    (width, height), shape = size, form.width / form.height
    aspect = width / height / shape
    scale = np.sqrt(width * height / (form.width * form.height))
    return not (1 / _ASPECT <= aspect <= _ASPECT and 1 / _SMALLER <= scale <= _LARGER)


def _picture(pixels_CHW: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(pixels_CHW[0] if len(pixels_CHW) == 1 else pixels_CHW.transpose(1, 2, 0))


def _opened(folder: Path) -> "Detector":
    from trainer.detection.detector import Detector

    return Detector.open(folder)
