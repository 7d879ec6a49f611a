"""The images of a request to vectors: decoded, faces found and judged in processes of their own, embedded together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serving.batching import Closed
from serving.errors import ApiError, stopping
from serving.images.decoding import Decoders, DecodersClosed, ImageRefused, Limits
from serving.images.embedding import Embedding
from serving.images.looking import ImageAnswer, Picture, Seen, Which, unlike_a_crop
from serving.settings import Settings
from serving.telemetry.metrics import Metrics
from trainer.data.image import Preprocessing
from trainer.detection.detector import Detector
from trainer.detection.quality import Bounds
from trainer.embedder import Embedder
from trainer.errors import UserError


@dataclass(frozen=True)
class Crop:
    """A face, or an image that was taken whole, and its unit vector.

    Attributes:
        image: what messages call the image.
        part, number: where it was in the request; the number counts from 1.
        faults: what of its quality is worse than is asked for.
        warning: what else the client should know.
    """

    image: str
    part: str
    number: int
    seen: Seen
    vector_D: NDArray[np.float32]
    faults: list[str]
    warning: str | None

    @property
    def worth(self) -> float:
        """The one number that is kept with a sample."""
        quality = self.seen.quality
        return quality.score if quality.norm is None else quality.norm


class Images:
    """What turns images into vectors for one model. Methods may be called from several threads."""

    def __init__(self, embedder: Embedder, form: Preprocessing, settings: Settings, metrics: Metrics) -> None:
        """Raises UserError where the detector cannot be used, or aligns to another size than the model reads."""
        self._form, self._settings, self._metrics = form, settings, metrics
        asked = embedder.manifest.quality
        if settings.detector is not None:
            asked = _checked(settings.detector, form, asked)
        self._bounds = Bounds.read(settings.min_quality, asked)
        self._refuse_unknown(self._bounds, embedder.manifest.norms is not None)
        limits = Limits(
            seconds=settings.decode_cpu_s,
            pixels=settings.max_pixels,
            detect_seconds=settings.detect_cpu_s,
            faces=settings.max_faces,
        )
        self._decoders = Decoders(form, settings.workers, limits, settings.detector)
        self._embedding = Embedding(embedder, metrics.embedded)
        metrics.queue("decode", embedder.model_id, lambda: self._decoders.waiting)
        metrics.queue("embed", embedder.model_id, lambda: self._embedding.waiting)

    def _refuse_unknown(self, asked: Bounds, norms: bool) -> None:
        """What nobody measures must not seem to be asked for."""
        names = asked.model_dump(exclude_none=True).keys()
        if self._settings.detector is None and (angles := sorted(names & {"yaw", "pitch", "roll"})):
            raise UserError(f"--min-quality asks for {angles[0]}, which only a detector tells; add --detector")
        if "norm" in names and not norms:
            raise UserError("--min-quality asks for norm, which this model does not tell; leave it out")

    def close(self) -> None:
        """End decoding and embedding. Idempotent."""
        self._decoders.close()
        self._embedding.close()

    def crops(self, files: Mapping[str, Sequence[bytes]], parts: Sequence[str], which: Which = "only") -> list[Crop]:
        """The faces of the image files in these parts, in order; without a detector, each image as it is.

        Args:
            which: of the faces of an image: the only one, the largest, or all, the largest first.

        Raises:
            ApiError: an image cannot be used, shows no face or (for "only") several, or is of less quality than is
                asked for; of "all", only where no face of the request is good enough.
        """
        images = [(part, number, image) for part in parts for number, image in enumerate(files.get(part, ()), 1)]
        names = [part if len(files[part]) == 1 else f"{part} {number}" for part, number, _ in images]
        pictures = self._pictures(images, names)
        chosen = [
            (name, part, number, picture, row)
            for name, (part, number, _), picture in zip(names, images, pictures, strict=True)
            for row in _rows(picture, which, name, {"part": part, "number": number})
        ]
        try:
            pixels_BCHW = np.stack([picture.pixels_FCHW[row] for *_, picture, row in chosen])
            x_BD, norms_B = self._embedding.embed(pixels_BCHW)
        except UserError as error:
            raise ApiError(422, "bad_image", str(error), {"parts": list(parts)}) from error
        except Closed as error:
            raise stopping() from error
        self._metrics.images.inc(len(images))
        crops = []
        for at, (name, part, number, picture, row) in enumerate(chosen):
            seen = picture.seen[row]
            if norms_B is not None:
                quality = seen.quality.model_copy(update={"norm": float(f"{norms_B[at]:.4g}")})
                seen = seen.model_copy(update={"quality": quality})
            faults = self._bounds.faults(seen.quality)
            crops.append(Crop(name, part, number, seen, x_BD[at], faults, self._warning(picture, name)))
        refused = [crop for crop in crops if crop.faults]
        if refused and (which != "all" or len(refused) == len(crops)):
            raise poor(refused[0])
        return crops

    def _pictures(self, images: Sequence[tuple[str, int, bytes]], names: Sequence[str]) -> list[Picture]:
        limit = self._settings.max_image_bytes
        for (part, number, image), name in zip(images, names, strict=True):
            if len(image) > limit:
                message = f"image '{name}' has {len(image)} bytes; at most {limit} are allowed: send it smaller"
                facts = {"part": part, "number": number, "max_bytes": limit}
                raise ApiError(413, "image_too_large", message, facts)
        try:
            with self._metrics.stage("decode"):
                pictures = self._decoders.decode([image for _, _, image in images], names)
        except ImageRefused as error:
            part, number, _ = images[error.number]
            status = 415 if error.code == "not_an_image" else 422
            raise ApiError(status, error.code, error.message, {"part": part, "number": number}) from error
        except DecodersClosed as error:
            raise stopping() from error
        if self._settings.detector is not None:
            for picture in pictures:
                self._metrics.detected(picture.detect_s, len(picture.seen))
        return pictures

    def _warning(self, picture: Picture, name: str) -> str | None:
        if picture.left_out:
            return f"image '{name}' shows {picture.left_out} more faces than the {self._settings.max_faces} looked at"
        if self._settings.detector is None and unlike_a_crop(picture.size, self._form):
            (width, height), form = picture.size, self._form
            return (
                f"image '{name}' of {width} x {height} pixels was stretched to {form.width} x {form.height}: this "
                "service has no detector and expects crops like those of the training; faces must be aligned"
            )
        return None


def told(crops: Sequence[Crop]) -> list[ImageAnswer]:
    """What answers say of them."""
    return [
        ImageAnswer(**dict(crop.seen), image=crop.image, warning=crop.warning, faults=crop.faults) for crop in crops
    ]


def poor(crop: Crop) -> ApiError:
    """422 for a face that is of less quality than the service asks for."""
    quality = crop.seen.quality.model_dump(exclude_none=True)
    facts = {"part": crop.part, "number": crop.number, "faults": crop.faults, "quality": quality}
    return ApiError(422, "poor_quality", f"image '{crop.image}' is {', '.join(crop.faults)}; take another one", facts)


def _rows(picture: Picture, which: Which, name: str, facts: dict[str, object]) -> range:
    found = len(picture.seen) + picture.left_out
    if not found:
        raise ApiError(422, "no_face", f"image '{name}' shows no face that the detector finds; take another one", facts)
    if found > 1 and which == "only":
        message = f"image '{name}' shows {found} faces, and one is allowed here; cut it out, or send face=largest"
        raise ApiError(422, "several_faces", message, facts | {"faces": found})
    return range(len(picture.seen) if which == "all" else 1)


def _checked(folder: Path, form: Preprocessing, asked: Bounds) -> Bounds:
    """What the detector's manifest asks of a face, over what the embedder's does."""
    manifest = Detector.open(folder).manifest
    template = manifest.template
    if (template.width, template.height) != (form.width, form.height):
        raise UserError(
            f"the detector '{folder}' aligns faces to {template.width} x {template.height} pixels, and the model reads "
            f"{form.width} x {form.height}; give the template of its training in the detector's manifest"
        )
    return Bounds(**(asked.model_dump(exclude_none=True) | manifest.quality.model_dump(exclude_none=True)))
