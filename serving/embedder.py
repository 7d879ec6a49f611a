"""Runs an Embedder: images to unit vectors with ONNX Runtime, without torch.

Axes: B images, C channels, H and W pixels, D dimensions of the embedding.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import (
    EPFail,
    Fail,
    InvalidArgument,
    InvalidGraph,
    InvalidProtobuf,
    NoModel,
    NotImplemented,  # ONNX Runtime's own: an operator that it does not have
    RuntimeException,
)

from trainer.artifact import MODEL_FILE, EmbedderManifest, Preprocessing, read_manifest
from trainer.data.image import load_image
from trainer.errors import UserError

INPUT, OUTPUT = "images", "embeddings"
NORM_TOLERANCE = 1e-3  # of a unit vector; float32 and bfloat16 exports stay within it

# ONNX Runtime's exceptions have no common base but Exception.
RUNTIME_ERRORS = (
    EPFail,
    Fail,
    InvalidArgument,
    InvalidGraph,
    InvalidProtobuf,
    NoModel,
    NotImplemented,
    RuntimeException,
)


class Embedder:
    """An opened Embedder folder. `embed` may be called from several threads at once."""

    def __init__(self, session: onnxruntime.InferenceSession, manifest: EmbedderManifest, batch_size: int) -> None:
        self._session = session
        self._batch_size = batch_size
        self.manifest = manifest

    @classmethod
    def open(cls, folder: Path, threads: int = 1, batch_size: int = 64) -> "Embedder":
        """Open an Embedder folder, check the digest, and try the model on two images.

        Args:
            folder: holds `model.onnx` and `manifest.json`.
            threads: CPU threads of one call of the model.
            batch_size: images in one call of the model; bounds the memory.

        Raises:
            UserError: not an Embedder, changed after export, or a model that does not turn images into unit vectors.
        """
        manifest = read_manifest(folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors; they come as exceptions too
        # From bytes, not from the path: a graph that points to weights in other files, which the digest does not
        # cover, then does not load.
        onnx = (folder / MODEL_FILE).read_bytes()
        try:
            session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        except RUNTIME_ERRORS as error:
            raise UserError(
                f"'{folder / MODEL_FILE}' is not a model that ONNX Runtime {onnxruntime.__version__} can run: "
                f"{_first_line(error)}; export the embedder again"
            ) from error
        embedder = cls(session, manifest, batch_size)
        embedder._check(folder / MODEL_FILE)
        return embedder

    @property
    def model_id(self) -> str:
        return self.manifest.model_id

    @property
    def dimension(self) -> int:
        return self.manifest.dimension

    @property
    def preprocessing(self) -> Preprocessing:
        return self.manifest.preprocessing

    def embed(self, images_BCHW: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Unit vectors [B, D] of uint8 pixels [B, C, H, W], in batches of at most `batch_size`.

        Raises:
            UserError: the pixels do not have the model's shape or type, or an image has no direction (the model gave
                it a vector that is not of length 1).
        """
        form = self.preprocessing
        wanted = (form.channels, form.height, form.width)
        if images_BCHW.ndim != 4 or images_BCHW.shape[1:] != wanted or images_BCHW.dtype != np.uint8:
            raise UserError(
                f"images of shape {images_BCHW.shape} and type {images_BCHW.dtype} cannot be embedded: the model takes "
                f"uint8 [B, {', '.join(map(str, wanted))}]; load them with the embedder's preprocessing"
            )
        if not len(images_BCHW):
            return np.empty((0, self.dimension), np.float32)
        starts = range(0, len(images_BCHW), self._batch_size)
        x_BD = np.concatenate([self._run(images_BCHW[start : start + self._batch_size]) for start in starts])
        norms_B = np.linalg.norm(x_BD, axis=1)
        wrong_B = ~(np.abs(norms_B - 1) <= NORM_TOLERANCE)  # written so that NaN is wrong
        if wrong_B.any():
            first = int(np.flatnonzero(wrong_B)[0])
            raise UserError(
                f"the model gave image {first} a vector of length {norms_B[first]:.4g} instead of 1; "
                "the image has nothing to go by (one flat colour?): take another one"
            )
        return x_BD

    def embed_files(self, sources: Sequence[bytes | Path]) -> NDArray[np.float32]:
        """Unit vectors [B, D] of image files or their bytes, loaded with the Embedder's preprocessing.

        Only `batch_size` images are held as pixels at a time.

        Raises:
            UserError: a file is not an image that can be read (see `trainer.data.image.load_image`), or as `embed`.
        """
        parts = [np.empty((0, self.dimension), np.float32)]
        for start in range(0, len(sources), self._batch_size):
            batch = sources[start : start + self._batch_size]
            parts.append(self.embed(np.stack([load_image(source, self.preprocessing) for source in batch])))
        return np.concatenate(parts)

    def _run(self, images_BCHW: NDArray[np.uint8]) -> NDArray[np.float32]:
        (x_BD,) = self._session.run([OUTPUT], {INPUT: np.ascontiguousarray(images_BCHW)})
        return np.asarray(x_BD, np.float32)

    def _check(self, path: Path) -> None:
        """The model's signature, and one run of two images; a fault here is an export that went wrong."""
        inputs = [(item.name, item.type) for item in self._session.get_inputs()]
        outputs = [(item.name, item.type) for item in self._session.get_outputs()]
        if inputs != [(INPUT, "tensor(uint8)")] or (OUTPUT, "tensor(float)") not in outputs:
            raise UserError(
                f"'{path}' takes {inputs} and gives {outputs}; an embedder takes uint8 '{INPUT}' and gives float32 "
                f"'{OUTPUT}'; export the embedder again"
            )
        form = self.preprocessing
        shape = (2, form.channels, form.height, form.width)
        images_BCHW = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        try:
            x_BD = self._run(images_BCHW)
        except RUNTIME_ERRORS as error:
            raise UserError(
                f"'{path}' does not run on images of shape {shape}, as its manifest says it should: "
                f"{_first_line(error)}; export the embedder again"
            ) from error
        if x_BD.shape != (2, self.dimension):
            raise UserError(
                f"'{path}' gives {x_BD.shape} for two images, but its manifest names dimension {self.dimension}; "
                "export the embedder again"
            )
        length = float(np.linalg.norm(x_BD, axis=1)[0])
        if not abs(length - 1) <= NORM_TOLERANCE:
            raise UserError(
                f"'{path}' gives vectors of length {length:.4g}; an embedder normalises them to 1 inside the model; "
                "export the embedder again"
            )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]
