"""The Embedder, sample to unit vector: a folder with an ONNX file and a manifest, run by ONNX Runtime without torch.

Axes: B samples, C channels, H and W pixels, D dimensions of the embedding.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator

from trainer.atomic import Kind, fresh_folder
from trainer.data.arrays import Form, Pixels
from trainer.detection.quality import Bounds
from trainer.errors import UserError
from trainer.evaluation import normalise
from trainer.evaluation.normalise import Normaliser
from trainer.evaluation.report import Calibration
from trainer.onnx import RUNTIME_ERRORS, VERSION, Session, first_line, open_session
from trainer.storage import Folder, written_here
from trainer.strict import Strict
from trainer.views import Join, Views, joined, seen

MODEL_FILE = "model.onnx"
MANIFEST_FILE = "manifest.json"
MOST_COHORT_BYTES = 1 << 26
OUTPUT, NORMS = "embeddings", "norms"
EMBEDDER = Kind("an embedder", MODEL_FILE)
NORM_TOLERANCE = 1e-3  # of a unit vector; float32 and bfloat16 exports stay within it
_OPPOSED = 1e-3  # length of a sum of unit vectors below which it is rounding


class Normalisation(Strict):
    """How scores are normalised: see `evaluation/normalise.py`."""

    kind: normalise.Kind
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="of the cohort's file, float32 [K, D]")

    @property
    def file(self) -> str:
        """Another cohort has another name, so that a manifest always finds its own."""
        return f"cohort-{self.sha256[:16]}.npy"


class EmbedderManifest(Strict):
    """`manifest.json` of an Embedder. `model_id` is the digest of the ONNX bytes, the preprocessing and the views."""

    format: Literal[1] = 1
    model_id: str
    dimension: int = Field(ge=2)
    preprocessing: Form = Field(description="what it takes: images in this form, or vectors or spectrograms")
    views: Views = Field((), description="what an embedding is made of; none: of the sample itself")
    join: Join = Field("mean", description="of the views' unit vectors: normalised, or one behind the other / sqrt(k)")
    calibration: Calibration | None = None
    normalisation: Normalisation | None = None
    norms: str | None = Field(
        None, description="the loss by which the length of a vector, before it is 1, tells an image's quality"
    )
    quality: Bounds = Field(Bounds(), description="what `--min-quality manifest` asks of an image")
    provenance: dict[str, str] = Field(default_factory=dict, description="config digest, step, MLflow run, versions")

    @property
    def parts(self) -> int:
        """Vectors of the model that an embedding holds."""
        return joined(self.views, self.join)

    @model_validator(mode="after")
    def _can_be_viewed(self) -> "EmbedderManifest":
        if self.views and self.preprocessing.reads.startswith("vectors"):
            raise ValueError(f"views are of images and spectrograms, and the model reads {self.preprocessing.reads}")
        return self


def model_id(onnx: bytes, preprocessing: Form, views: tuple[str, ...] = (), join: Join = "mean") -> str:
    """First 32 hexadecimal digits of SHA-256 over preprocessing and views (canonical JSON), a zero byte, the ONNX file.

    The views count only where there are some, and how they are joined only where it is not as a mean: without, the
    digest is that of the preprocessing alone.
    """
    told = preprocessing.model_dump() | ({"views": views} if views else {})
    told |= {"join": join} if views and join != "mean" else {}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode() + b"\0" + onnx).hexdigest()[:32]


def input_of(form: Form) -> str:
    """The name of the model's input in the ONNX file."""
    return "images" if form.reads == "images" else "samples"


def write_cohort(folder: Path | str, normaliser: Normaliser) -> Normalisation:
    """Write the cohort's file, and give what the manifest says of it. The manifest is to be written after it."""
    stream = io.BytesIO()
    np.save(stream, normaliser.cohort_KD, allow_pickle=False)
    told = Normalisation(kind=normaliser.kind, sha256=hashlib.sha256(stream.getvalue()).hexdigest())
    Folder.at(folder).write(told.file, [stream.getvalue()])
    return told


def read_cohort(folder: Path | str, manifest: EmbedderManifest) -> Normaliser | None:
    """The normaliser that the manifest names; None where scores are cosines.

    Raises:
        UserError: its cohort is missing, was changed, or is none of this model.
    """
    if (told := manifest.normalisation) is None:
        return None
    place, again = Folder.at(folder), "; calibrate the embedder again"
    path = place / told.file
    if not 0 < place.sizes().get(told.file, 0) <= MOST_COHORT_BYTES:
        raise UserError(f"'{path}' is missing or too large: scores cannot be normalised{again}")
    content = place.read(told.file)
    if hashlib.sha256(content).hexdigest() != told.sha256:
        raise UserError(f"'{path}' is not the cohort that the manifest names: it was changed{again}")
    try:
        cohort_KD = np.load(io.BytesIO(content), allow_pickle=False)
    except ValueError as error:
        raise UserError(f"'{path}' is no array of numbers: {first_line(error)}{again}") from error
    if cohort_KD.ndim != 2 or cohort_KD.shape[1] != manifest.dimension:
        raise UserError(f"'{path}' has shape {cohort_KD.shape}, and the model {manifest.dimension} dimensions{again}")
    return Normaliser(told.kind, np.asarray(cohort_KD, np.float32))


def write_manifest(folder: Path | str, manifest: EmbedderManifest) -> None:
    """Write `manifest.json` whole or not at all."""
    Folder.at(folder).write(MANIFEST_FILE, manifest.model_dump_json(indent=2) + "\n")


def _read(folder: Folder) -> tuple[EmbedderManifest, bytes]:
    """The manifest and the ONNX file, which must have the digest that it names."""
    try:
        manifest = EmbedderManifest.model_validate_json(folder.read(MANIFEST_FILE))
        onnx = folder.read(MODEL_FILE)
    except FileNotFoundError as error:
        raise UserError(
            f"'{folder}' is not an embedder: '{error.filename}' is missing; "
            f"an embedder folder holds {MODEL_FILE} and {MANIFEST_FILE}; make one with 'hypersphere export'"
        ) from error
    except ValidationError as error:
        fault = error.errors()[0]
        what = f"{fault['msg']} at '{'.'.join(map(str, fault['loc']))}'"
        raise _spoilt(folder / MANIFEST_FILE, f"is not an embedder's manifest: {what}") from error
    if (found := model_id(onnx, manifest.preprocessing, manifest.views, manifest.join)) != manifest.model_id:
        what = f"has digest {found}, but its manifest names {manifest.model_id}: the file was changed after export"
        raise _spoilt(folder / MODEL_FILE, what)
    return manifest, onnx


def _spoilt(path: Folder, what: str) -> UserError:
    return UserError(f"'{path}' {what}; export the embedder again")


def check_free(out: Folder, overwrite: bool) -> None:
    """As `fresh_folder` does it on a disk, of an address.

    Raises:
        UserError: something else is there, or an Embedder that is not to be replaced.
    """
    names = {} if isinstance(out.address, Path) else out.sizes()
    if names and MODEL_FILE not in names:
        raise UserError(f"'{out}' holds other files and is not an embedder; choose a new address with --out")
    if names and not overwrite:
        raise UserError(f"'{out}' is an embedder already; choose another --out, or replace it with --overwrite")


def write_with_views(
    source: Path | str, out: Path | str, views: Sequence[str], overwrite: bool, join: Join = "mean"
) -> EmbedderManifest:
    """Another Embedder of the same model, of other views; without thresholds: those were of others.

    Raises:
        UserError: `source` is no Embedder, what it reads has no such views, or `out` exists.
    """
    place, target = Folder.at(source), Folder.at(out)
    manifest, onnx = _read(place)
    told = manifest.model_dump(exclude={"calibration", "normalisation"})
    told |= {"views": views, "join": join, "model_id": model_id(onnx, manifest.preprocessing, tuple(views), join)}
    told["dimension"] = manifest.dimension // manifest.parts * joined(views, join)
    try:
        made = EmbedderManifest.model_validate(told)
    except ValidationError as error:
        raise UserError(f"--views: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error
    check_free(target, overwrite)
    with written_here(target, MANIFEST_FILE) as here, fresh_folder(here, EMBEDDER, overwrite) as folder:
        for name in place.sizes():
            if name.endswith(".safetensors"):  # the weights, for a later training
                (folder / name).write_bytes(place.read(name))
        (folder / MODEL_FILE).write_bytes(onnx)
        write_manifest(folder, made)
    return made


class Embedder:
    """An opened Embedder folder. `embed` may be called from several threads at once."""

    def __init__(self, session: Session, manifest: EmbedderManifest, batch_size: int) -> None:
        self._session, self._batch_size = session, batch_size
        self.manifest, self.model_id, self.preprocessing = manifest, manifest.model_id, manifest.preprocessing

    @classmethod
    def open(cls, folder: Path | str, threads: int = 1, batch_size: int = 64) -> "Embedder":
        """Open an Embedder folder, check the digest, and try the model on two samples.

        Args:
            folder: a folder, or its address; holds `model.onnx` and `manifest.json`.
            threads: CPU threads of one call of the model.
            batch_size: samples in one call of the model; bounds the memory.

        Raises:
            UserError: not an Embedder, changed after export, or a model that does not turn samples into unit vectors.
        """
        place = Folder.at(folder)
        manifest, onnx = _read(place)
        try:
            session = open_session(onnx, threads)
        except RUNTIME_ERRORS as error:
            what = f"is not a model that ONNX Runtime {VERSION} can run: {first_line(error)}"
            raise _spoilt(place / MODEL_FILE, what) from error
        embedder = cls(session, manifest, batch_size)
        embedder._check(place / MODEL_FILE)
        return embedder

    def embed(self, images_BCHW: Pixels) -> NDArray[np.float32]:
        """Unit vectors [B, D] of uint8 pixels [B, C, H, W], in batches of at most `batch_size`.

        What is no image is float32, a vector [dimension, 1, 1], a spectrogram [1, frequency, time]: see `ArrayForm`.

        Raises:
            UserError: the samples do not have the model's shape or type, or one has no direction (the model gave it a
                vector that is not of length 1).
        """
        return self.embed_measured(images_BCHW)[0]

    def embed_measured(self, images_BCHW: Pixels) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """As `embed`, and the length [B] of each vector before it was brought to 1; None where it tells nothing."""
        form = self.preprocessing
        if images_BCHW.shape[1:] != form.shape_CHW or images_BCHW.dtype != form.dtype:
            raise UserError(
                f"samples of shape {images_BCHW.shape} and type {images_BCHW.dtype} cannot be embedded: the model takes"
                f" {form.dtype} [B, {', '.join(map(str, form.shape_CHW))}]; load them with the embedder's preprocessing"
            )
        if not len(images_BCHW):
            return np.empty((0, self.manifest.dimension), np.float32), None
        starts = range(0, len(images_BCHW), self._batch_size)
        parts = [self._joined(images_BCHW[start : start + self._batch_size], start) for start in starts]
        x_BD, *lengths = (np.concatenate(part) for part in zip(*parts, strict=True))
        return x_BD, lengths[0] if lengths else None

    def _joined(self, images_BCHW: Pixels, start: int) -> list[NDArray[np.float32]]:
        """Of one batch, which begins with sample `start`: unit vectors made of those of the views, and the mean lengths
        before where the manifest says that they tell something."""
        seen_VBD, lengths_VB = [], []
        for view in self.manifest.views or ("same",):
            view_BD, *lengths = self._run(seen(images_BCHW, view))
            norms_B = np.linalg.norm(view_BD, axis=1)
            wrong_B = ~(np.abs(norms_B - 1) <= NORM_TOLERANCE)  # written so that NaN is wrong
            if wrong_B.any():
                first = int(np.flatnonzero(wrong_B)[0])
                raise UserError(
                    f"the model gave sample {start + first} a vector of length {norms_B[first]:.4g} instead of 1; "
                    "it has nothing to go by (one flat colour?): take another one"
                )
            seen_VBD.append(view_BD)
            lengths_VB += lengths
        told = [np.asarray(np.mean(lengths_VB, axis=0), np.float32)] if lengths_VB else []
        return [self._one(seen_VBD, start), *told]

    def _one(self, seen_VBD: list[NDArray[np.float32]], start: int) -> NDArray[np.float32]:
        """One unit vector of those of the views, as the manifest joins them."""
        if len(seen_VBD) == 1:
            return seen_VBD[0]
        if self.manifest.parts > 1:
            return np.concatenate(seen_VBD, axis=1) / np.float32(np.sqrt(len(seen_VBD)))
        x_BD = np.sum(seen_VBD, axis=0)
        lengths_B1 = np.linalg.norm(x_BD, axis=1, keepdims=True)
        if (opposed_B := lengths_B1[:, 0] < _OPPOSED).any():
            first = start + int(np.flatnonzero(opposed_B)[0])
            raise UserError(f"the views of sample {first} have opposite vectors and no mean; take another sample")
        return np.asarray(x_BD / lengths_B1, np.float32)

    def _run(self, images_BCHW: Pixels) -> list[NDArray[np.float32]]:
        """Vectors, and their lengths before where the manifest says that they tell something."""
        names = [OUTPUT] if self.manifest.norms is None else [OUTPUT, NORMS]
        outputs = self._session.run(names, {input_of(self.preprocessing): np.ascontiguousarray(images_BCHW)})
        return [np.asarray(output, np.float32) for output in outputs]

    def _check(self, path: Folder) -> None:
        """The model's signature, and one run of two samples; a fault here is an export that went wrong."""
        inputs = [(item.name, item.type) for item in self._session.get_inputs()]
        outputs = [(item.name, item.type) for item in self._session.get_outputs()]
        form, dimension = self.preprocessing, self.manifest.dimension
        kind = "tensor(uint8)" if form.dtype == np.uint8 else "tensor(float)"
        needed = [OUTPUT] if self.manifest.norms is None else [OUTPUT, NORMS]
        if inputs != [(input_of(form), kind)] or any((name, "tensor(float)") not in outputs for name in needed):
            gives = "' and '".join(needed)
            wanted = f"an embedder of {form.reads} takes {form.dtype} '{input_of(form)}' and gives float32 '{gives}'"
            raise _spoilt(path, f"takes {inputs} and gives {outputs}; {wanted}")
        shape = (2, *form.shape_CHW)
        images_BCHW: Pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8).astype(form.dtype)
        try:
            x_BD, *lengths = self._run(images_BCHW)
        except RUNTIME_ERRORS as error:
            what = f"does not run on samples of shape {shape}, as its manifest says it should: {first_line(error)}"
            raise _spoilt(path, what) from error
        if x_BD.ndim != 2 or (len(x_BD), x_BD.shape[1] * self.manifest.parts) != (2, dimension):
            raise _spoilt(path, f"gives {x_BD.shape} for two samples, but its manifest names dimension {dimension}")
        if any(found.shape != (2,) for found in lengths):
            raise _spoilt(path, f"gives lengths of shape {lengths[0].shape} for two samples")
        length = float(np.linalg.norm(x_BD[0]))
        if not abs(length - 1) <= NORM_TOLERANCE:
            what = f"gives vectors of length {length:.4g}; an embedder normalises them to 1 inside the model"
            raise _spoilt(path, what)
