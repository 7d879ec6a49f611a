"""What an Embedder carries beside its ONNX file: the manifest that export writes and calibrate completes.

An Embedder is a folder with `model.onnx` (uint8 pixels [B, channels, height, width] to unit vectors [B, dimension])
and `manifest.json`. This file runs without torch, so that the service can read both.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.errors import UserError

MODEL_FILE = "model.onnx"
MANIFEST_FILE = "manifest.json"


class Preprocessing(BaseModel):
    """How an image becomes the pixels that the model reads. Scaling of the values happens inside the model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["L", "RGB"] = "RGB"
    height: int = Field(112, ge=8, le=1024)
    width: int = Field(112, ge=8, le=1024)

    @property
    def channels(self) -> int:
        return 1 if self.mode == "L" else 3


class Threshold(BaseModel):
    """A similarity at or above which two vectors, or a probe and a candidate, are called the same identity.

    `target` names the error rate it was calibrated for: FMR (one comparison) or FPIR (one search of a gallery of
    `gallery_size` subjects). `low` and `high` bound the error rate actually reached, at `confidence`, bootstrapped
    over subjects.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float = Field(ge=-1.0, le=1.0001)
    target: Literal["FMR", "FPIR"]
    rate: float = Field(gt=0, lt=1)
    gallery_size: int = Field(1, ge=1)
    low: float = Field(ge=0, le=1)
    high: float = Field(ge=0, le=1)
    confidence: float = Field(0.95, gt=0, lt=1)
    probes: int = Field(ge=1, description="non-mated probes it was measured on")
    subjects: int = Field(ge=1, description="subjects those probes belong to")
    model_id: str
    source: str = Field(description="where it came from, in words: the data set and split, and the method")


class Calibration(BaseModel):
    """Thresholds by use: `verify` for 1:1, `identify` for 1:N."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    verify: Threshold
    identify: Threshold


class EmbedderManifest(BaseModel):
    """`manifest.json` of an Embedder. `model_id` is the digest of the ONNX bytes and the preprocessing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    model_id: str
    dimension: int = Field(ge=2)
    preprocessing: Preprocessing
    calibration: Calibration | None = None
    provenance: dict[str, str] = Field(default_factory=dict, description="config digest, step, MLflow run, versions")


def model_id(onnx: bytes, preprocessing: Preprocessing) -> str:
    """First 32 hexadecimal digits of SHA-256 over the preprocessing (canonical JSON), a zero byte and the ONNX file."""
    canonical = json.dumps(preprocessing.model_dump(), sort_keys=True).encode()
    return hashlib.sha256(canonical + b"\0" + onnx).hexdigest()[:32]


def write_manifest(folder: Path, manifest: EmbedderManifest) -> None:
    """Write `manifest.json` whole or not at all (temporary file, fsync, rename)."""
    temporary = folder / (MANIFEST_FILE + ".partial")
    with temporary.open("w") as file:
        file.write(manifest.model_dump_json(indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(folder / MANIFEST_FILE)


def read_manifest(folder: Path, verify_digest: bool = True) -> EmbedderManifest:
    """Read and check an Embedder's manifest; the ONNX file must have the digest that it names.

    Raises:
        UserError: a file is missing, malformed, or not the one that was exported.
    """
    try:
        manifest = EmbedderManifest.model_validate_json((folder / MANIFEST_FILE).read_bytes())
        onnx = (folder / MODEL_FILE).read_bytes() if verify_digest else b""
    except FileNotFoundError as error:
        raise UserError(
            f"'{folder}' is not an embedder: '{error.filename}' is missing; "
            f"an embedder folder holds {MODEL_FILE} and {MANIFEST_FILE}; make one with 'hypersphere export'"
        ) from error
    except ValidationError as error:
        raise UserError(
            f"'{folder / MANIFEST_FILE}' is not an embedder's manifest: {error.errors()[0]['msg']} "
            f"at '{'.'.join(map(str, error.errors()[0]['loc']))}'; export the embedder again"
        ) from error
    if verify_digest and (found := model_id(onnx, manifest.preprocessing)) != manifest.model_id:
        raise UserError(
            f"'{folder / MODEL_FILE}' has digest {found}, but its manifest names {manifest.model_id}: "
            "the file was changed after export; export the embedder again"
        )
    return manifest
