"""The loaded embedders: images to unit vectors, and what is held against embeddings that a client sent."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serving.errors import ApiError, invalid
from serving.images.looking import Which
from serving.images.vectors import Crop, Images
from serving.search.index import NORM_TOLERANCE
from serving.settings import Settings
from serving.telemetry.metrics import Metrics
from serving.threshold import rules
from trainer.data.image import Preprocessing
from trainer.embedder import Embedder, read_cohort
from trainer.errors import UserError

Vectors = NDArray[np.float32]


class Model:
    """An opened embedder, what turns images into its vectors, and the rules that its scores are decided by.

    `crops` and `vectors` may be called from several threads.
    """

    def __init__(self, folder: Path, settings: Settings, metrics: Metrics) -> None:
        """Raises UserError where it cannot be used, or there is no threshold."""
        self._settings = settings
        # One call at a time embeds for all requests: see `embedding`.
        self.embedder = Embedder.open(folder, settings.threads * settings.workers)
        manifest = self.embedder.manifest
        self.model_id, self.dimension = manifest.model_id, manifest.dimension
        self.verify_rule, self.identify_rule = rules(manifest, settings.verify_threshold, settings.identify_threshold)
        self.normaliser = read_cohort(folder, manifest)
        form = self.embedder.preprocessing
        if settings.detector is not None and not isinstance(form, Preprocessing):
            raise UserError(
                f"--detector finds faces in images, and the model '{folder}' reads {form.reads}; leave it out"
            )
        self._images = Images(self.embedder, form, settings, metrics) if isinstance(form, Preprocessing) else None

    def close(self) -> None:
        """End decoding; requests that wait for it are refused. Idempotent."""
        if self._images is not None:
            self._images.close()

    def mate_probability(self, score: float, gallery_size: int = 1) -> float | None:
        """That two samples with this score are of one identity; None where it was not calibrated.

        In a search, each of the subjects has an equal share of the prior.
        """
        calibration = self.embedder.manifest.calibration
        model = calibration.probability if calibration else None
        return model.probability(score, model.prior / max(1, gallery_size)) if model else None

    def crops(self, files: Mapping[str, Sequence[bytes]], *parts: str, which: Which = "only") -> list[Crop]:
        """See `Images.crops`; raises ApiError 415 where the model reads no images."""
        if self._images is None:
            reads = self.embedder.preprocessing.reads
            message = f"the model of this service reads {reads}, not images; send embeddings, as application/json"
            raise ApiError(415, "no_images", message, {"reads": reads})
        return self._images.crops(files, parts, which)

    def raw(self, document: bytes, model_id: str | None, part: str, most: int) -> Vectors:
        """Embeddings that a client sent as little-endian float32, one behind the other, checked as in `vectors`."""
        size = 4 * self.dimension
        if not document or len(document) % size:
            told = f"{len(document)} bytes were sent; embeddings of {self.dimension} float32 take {size} bytes each"
            raise invalid((part, told))
        return self.vectors(np.frombuffer(document, "<f4").reshape(-1, self.dimension), model_id, part, most)

    def vectors(
        self, embeddings: Vectors | Sequence[Sequence[float]], model_id: str | None, part: str, most: int | None = None
    ) -> Vectors:
        """Embeddings that a client sent, checked and brought to length 1 exactly. `most`: of them; None: as set."""
        if model_id is not None and model_id != self.model_id:
            message = (
                f"the embeddings are of model {model_id}, but this service runs model {self.model_id}, and "
                "vectors of two models cannot be compared; make them with POST /v1/embed of this service"
            )
            raise ApiError(409, "wrong_model", message, {"sent": model_id, "served": self.model_id})
        if len(embeddings) > (most := most or self._settings.max_images):
            raise invalid((part, f"{len(embeddings)} embeddings were sent; at most {most} fit one"))
        for length in map(len, embeddings):
            if length != self.dimension:
                message = f"an embedding in '{part}' has {length} numbers; model {self.model_id} has {self.dimension}"
                facts = {"part": part, "sent": length, "allowed": self.dimension}
                raise ApiError(422, "wrong_dimension", message, facts)
        x_BD = np.asarray(embeddings, np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            lengths_B = np.linalg.norm(x_BD, axis=1)
        if not (np.abs(lengths_B - 1) <= NORM_TOLERANCE).all():
            worst = float(lengths_B[np.abs(lengths_B - 1).argmax()])
            message = f"an embedding in '{part}' has length {worst:.4g}; it must be 1: divide it by its length"
            facts = {"part": part, "length": worst if np.isfinite(worst) else str(worst)}
            raise ApiError(422, "not_a_unit_vector", message, facts)
        unit_BD: Vectors = (x_BD / lengths_B[:, None]).astype(np.float32)
        return unit_BD


def mean(unit_BD: Vectors, part: str) -> Vectors:
    """The mean of unit vectors of one person, brought to length 1. Raises ApiError 422 where they cancel out."""
    if len(unit_BD) == 1:
        (only_D,) = unit_BD
        return np.asarray(only_D)
    mean_D = unit_BD.mean(axis=0, dtype=np.float64)
    length = float(np.linalg.norm(mean_D))
    if length < NORM_TOLERANCE:
        raise invalid((part, "they point in opposite directions and have no mean; send those of one person"))
    unit_D: Vectors = (mean_D / length).astype(np.float32)
    return unit_D
