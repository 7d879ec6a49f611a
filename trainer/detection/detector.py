"""A Detector: a folder with `detector.onnx` and `manifest.json`; a photograph to its faces, largest first."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from trainer.detection.align import LANDMARKS, Points, footprint
from trainer.detection.manifest import DetectorManifest, Level
from trainer.errors import UserError
from trainer.onnx import RUNTIME_ERRORS, VERSION, Session, first_line, open_session

MODEL_FILE = "detector.onnx"
MANIFEST_FILE = "manifest.json"
MOST_BYTES = {MODEL_FILE: 1 << 29, MANIFEST_FILE: 1 << 20}
MOST_CANDIDATES = 2000  # the best of so many places are looked at: suppression costs their square
LARGEST = 100_000  # pixels: what lies or reaches farther is no place in a photograph
Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Face:
    """Where a face is, in pixels of the photograph.

    Attributes:
        box: left, top, right, bottom; may reach over the edge.
        score: how sure the detector is, 0 to 1.
        landmarks_52: eyes, nose, corners of the mouth; see `align`.
    """

    box: tuple[float, float, float, float]
    score: float
    landmarks_52: Points

    @property
    def area(self) -> float:
        left, top, right, bottom = self.box
        return (right - left) * (bottom - top)


class Detector:
    """An opened detector. `find` may be called from several threads at once."""

    def __init__(self, session: Session, manifest: DetectorManifest, detector_id: str) -> None:
        self._session, self.manifest, self.detector_id = session, manifest, detector_id
        self._input: str = session.get_inputs()[0].name
        self._names = [name for level in manifest.outputs for name in (level.scores, level.boxes, level.landmarks)]

    @classmethod
    def open(cls, folder: Path | str, threads: int = 1) -> "Detector":
        """Open a detector's folder and try it on an empty picture.

        `detector_id` is the start of SHA-256 over the manifest (canonical JSON), a zero byte and the ONNX file.

        Raises:
            UserError: not a detector, or a model that does not give what its manifest names.
        """
        folder = Path(folder)
        try:
            manifest = DetectorManifest.model_validate_json(_content(folder / MANIFEST_FILE))
        except ValidationError as error:
            fault = error.errors()[0]
            what = f"{fault['msg']} at '{'.'.join(map(str, fault['loc'])) or 'the top'}'"
            raise UserError(f"'{folder / MANIFEST_FILE}' is not a detector's manifest: {what}; mend it") from error
        onnx, path = _content(folder / MODEL_FILE), folder / MODEL_FILE
        canonical = json.dumps(manifest.model_dump(), sort_keys=True).encode()
        try:
            detector = cls(
                open_session(onnx, threads), manifest, hashlib.sha256(canonical + b"\0" + onnx).hexdigest()[:32]
            )
        except RUNTIME_ERRORS as error:
            what = f"is not a model that ONNX Runtime {VERSION} can run: {first_line(error)}"
            raise UserError(f"'{path}' {what}; give another detector") from error
        given = {output.name for output in detector._session.get_outputs()}
        if missing := [name for name in detector._names if name not in given]:
            raise UserError(f"'{path}' has no output '{missing[0]}', which its manifest names; it has {sorted(given)}")
        try:
            detector.find(Image.new("RGB", (64, 64)))
        except (*RUNTIME_ERRORS, ValueError) as error:
            what = f"does not do what its manifest says: {first_line(error)}"
            raise UserError(f"'{path}' {what}; mend the manifest") from error
        return detector

    def find(self, image: Image.Image) -> list[Face]:
        """The faces in a photograph in mode "L" or "RGB", the largest first.

        Raises:
            ValueError: the model's outputs do not have the shapes that the manifest gives them.
        """
        pixels, scale = self._pixels(image)
        outputs = self._session.run(self._names, {self._input: pixels})
        parts = [self._read(level, outputs[3 * i : 3 * i + 3]) for i, level in enumerate(self.manifest.outputs)]
        scores_N, boxes_N4, landmarks_N52 = (np.concatenate(part) for part in zip(*parts, strict=True))
        kept = suppress(boxes_N4, scores_N, self.manifest.nms_iou)
        # From places in the input to places in the photograph, both counted from the centre of the first pixel.
        boxes_N4, landmarks_N52 = ((found[kept] + 0.5) / scale - 0.5 for found in (boxes_N4, landmarks_N52))
        faces = [
            Face(tuple(box_4.tolist()), float(score), landmarks_52)
            for box_4, score, landmarks_52 in zip(boxes_N4, scores_N[kept], landmarks_N52, strict=True)
        ]
        usable = [face for face in faces if 1 <= footprint(face.landmarks_52, self.manifest.template) <= LARGEST]
        return sorted(usable, key=lambda face: face.area, reverse=True)

    def _pixels(self, image: Image.Image) -> tuple[NDArray[np.float32], float]:
        """The model's input, and input pixels per pixel of the photograph."""
        manifest = self.manifest
        scale = min(manifest.width / image.width, manifest.height / image.height)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        mode = "L" if manifest.mode == "L" else "RGB"
        canvas = Image.new(mode, (manifest.width, manifest.height))
        canvas.paste(image.convert(mode).resize(size, Image.Resampling.BILINEAR))
        values_HWC = np.asarray(canvas, np.float32).reshape(manifest.height, manifest.width, -1)
        if manifest.mode == "BGR":
            values_HWC = values_HWC[:, :, ::-1]
        mean, std = (np.array(numbers, np.float32) for numbers in (manifest.mean, manifest.std))
        values_HWC = np.divide(values_HWC - mean, std, dtype=np.float32)
        batch = values_HWC[None] if manifest.layout == "NHWC" else values_HWC.transpose(2, 0, 1)[None]
        return np.ascontiguousarray(batch), scale

    def _read(self, level: Level, outputs: Sequence[NDArray[np.float32]]) -> tuple[Numbers, Numbers, Numbers]:
        """Scores [N], boxes [N, 4] and landmarks [N, 5, 2] of the places that may be faces, in pixels of the input."""
        scores_N = np.asarray(outputs[0], np.float64).ravel()
        places = len(scores_N)
        boxes_N4 = np.asarray(outputs[1], np.float64).reshape(places, 4)
        landmarks_N52 = np.asarray(outputs[2], np.float64).reshape(places, LANDMARKS, 2)
        if level.stride is not None:
            cells_N2 = self._cells(level.stride, places)
            low_N2, high_N2 = boxes_N4[:, :2] * -level.stride, boxes_N4[:, 2:] * level.stride
            boxes_N4 = np.concatenate([cells_N2 + low_N2, cells_N2 + high_N2], axis=1)
            landmarks_N52 = landmarks_N52 * level.stride + cells_N2[:, None]
        sides_N2 = boxes_N4[:, 2:] - boxes_N4[:, :2]
        apart_N = np.linalg.norm(landmarks_N52[:, 1] - landmarks_N52[:, 0], axis=1)
        sound_N = (np.abs(boxes_N4) < LARGEST).all(axis=1) & (np.abs(landmarks_N52) < LARGEST).all(axis=(1, 2))
        good_N = sound_N & (scores_N >= self.manifest.score_threshold) & (sides_N2.min(axis=1) > 0) & (apart_N > 0)
        best = np.flatnonzero(good_N)
        best = best[np.argsort(-scores_N[best], kind="stable")[:MOST_CANDIDATES]]
        return scores_N[best], boxes_N4[best], landmarks_N52[best]

    def _cells(self, stride: int, places: int) -> Numbers:
        """x and y of the cell of each place."""
        rows, columns = -(-self.manifest.height // stride), -(-self.manifest.width // stride)
        each, rest = divmod(places, rows * columns)
        if rest or not each:
            raise ValueError(f"{places} places do not fill {rows} x {columns} cells of {stride} pixels")
        y, x = np.divmod(np.arange(rows * columns), columns)
        return np.repeat(np.column_stack([x, y]) * float(stride), each, axis=0)


def suppress(boxes_N4: Numbers, scores_N: Numbers, most_iou: float) -> list[int]:
    """The rows that stay where boxes overlap: each one that overlaps no better one by more, best first."""
    order = np.argsort(-scores_N, kind="stable")[:MOST_CANDIDATES]
    areas_N = np.prod(boxes_N4[:, 2:] - boxes_N4[:, :2], axis=1)
    kept: list[int] = []
    while len(order):
        best, others = int(order[0]), order[1:]
        kept.append(best)
        low = np.maximum(boxes_N4[best, :2], boxes_N4[others, :2])
        high = np.minimum(boxes_N4[best, 2:], boxes_N4[others, 2:])
        common = np.prod(np.maximum(high - low, 0), axis=1)
        order = others[common <= most_iou * (areas_N[best] + areas_N[others] - common)]
    return kept


def _content(path: Path) -> bytes:
    try:
        if path.stat().st_size > (most := MOST_BYTES[path.name]):
            raise UserError(f"'{path}' has more than {most} bytes; it is no detector's")
        return path.read_bytes()
    except OSError as error:
        told = f"'{path.parent}' is not a detector: '{path.name}' cannot be read ({error.strerror})"
        raise UserError(f"{told}; its folder holds {MODEL_FILE} and {MANIFEST_FILE}") from error
