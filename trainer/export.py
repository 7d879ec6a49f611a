"""From a trained backbone to an Embedder: a folder with `model.onnx` and `manifest.json`.

Axes: B images, C channels, H and W pixels, D dimensions of the embedding.
"""

import contextlib
import copy
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from onnx import ModelProto
from torch import nn

from trainer.artifact import MODEL_FILE, EmbedderManifest, Preprocessing, model_id, write_manifest
from trainer.errors import UserError

INPUT, OUTPUT = "images", "embeddings"
TOLERANCE = 1e-4  # of a component of a unit vector, ONNX Runtime against torch
LARGEST = 2_000_000_000  # bytes; protobuf ends at 2 GiB


class UnitVectors(nn.Module):
    """uint8 images_BCHW to unit vectors float32 [B, D]: F.normalize(backbone(images / 127.5 - 1))."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.backbone(images.float() / 127.5 - 1.0), dim=1)


def export(
    backbone: nn.Module,
    preprocessing: Preprocessing,
    out: Path,
    sample_images_BCHW: torch.Tensor,
    provenance: dict[str, str],
    overwrite: bool = False,
) -> EmbedderManifest:
    """Write the Embedder folder `out`, whole or not at all, after comparing ONNX Runtime with torch on real images.

    The caller's backbone is not changed: a float32 copy in eval mode on the CPU is exported.

    Args:
        backbone: float images_BCHW in [-1, 1] to x_BD.
        preprocessing: how an image becomes the pixels that the backbone was trained on.
        sample_images_BCHW: uint8, real images after that preprocessing; the outputs are compared on them.
        provenance: where the weights come from; kept in the manifest.
        overwrite: replace an Embedder that is already in `out`.

    Raises:
        UserError: `out` exists, the images do not fit the preprocessing, or the backbone has no ONNX form.
        RuntimeError: ONNX Runtime and torch differ by more than 1e-4.
    """
    if out.exists() and not overwrite:
        raise UserError(f"'{out}' exists already; choose another folder, or allow overwriting it")
    if overwrite and out.exists() and any(out.iterdir()) and not (out / MODEL_FILE).is_file():
        raise UserError(f"'{out}' is not an embedder, so it is not overwritten; choose another folder")
    expected = (preprocessing.channels, preprocessing.height, preprocessing.width)
    if sample_images_BCHW.dtype != torch.uint8 or tuple(sample_images_BCHW.shape[1:]) != expected:
        raise UserError(
            f"sample images of type {sample_images_BCHW.dtype} and shape {tuple(sample_images_BCHW.shape)} do not fit "
            f"the preprocessing; give uint8 [B, {', '.join(map(str, expected))}]"
        )
    if len(sample_images_BCHW) == 0:
        raise UserError("export compares the exported model with torch on real images, but got none; give at least one")
    model = UnitVectors(copy.deepcopy(backbone)).float().cpu().eval()
    onnx = _to_onnx(model, preprocessing)
    dimension = _check(onnx, model, sample_images_BCHW.cpu())
    manifest = EmbedderManifest(
        model_id=model_id(onnx, preprocessing),
        dimension=dimension,
        preprocessing=preprocessing,
        provenance=provenance,
    )
    _write(out, onnx, manifest)
    return manifest


def _to_onnx(model: UnitVectors, preprocessing: Preprocessing) -> bytes:
    """The ONNX file as bytes, with a free batch size; the same weights give the same bytes."""
    # Two images, since torch.export takes a batch of one for a constant.
    example = torch.zeros(2, preprocessing.channels, preprocessing.height, preprocessing.width, dtype=torch.uint8)
    try:
        with torch.no_grad(), _exporter_without_its_own_noise():
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                verbose=False,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
    except torch.onnx.OnnxExporterError as error:
        raise UserError(
            f"this backbone has no ONNX form: {str(error).splitlines()[0]}; choose another backbone"
        ) from error
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    proto: ModelProto = program.model_proto
    if proto.ByteSize() > LARGEST:
        raise UserError(
            f"the model has {proto.ByteSize()} bytes, an embedder at most {LARGEST}; use a smaller backbone"
        )
    _forget_the_source(proto)
    onnx: bytes = proto.SerializeToString(deterministic=True)
    return onnx


def _forget_the_source(proto: ModelProto) -> None:
    """Remove the exporter's notes (stack traces with paths of this machine): they would also change the digest."""
    graph = proto.graph
    functions = proto.functions
    for part in (
        *(proto, graph, *functions, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer),
        *(node for function in functions for node in function.node),
    ):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


def _check(onnx: bytes, model: UnitVectors, images_BCHW: torch.Tensor) -> int:
    """Compare ONNX Runtime with torch, on all images together and on the first alone; returns D."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    for part_BCHW in (images_BCHW, images_BCHW[:1]):
        with torch.no_grad():
            wanted_BD = model(part_BCHW).numpy()
        (got_BD,) = session.run([OUTPUT], {INPUT: part_BCHW.numpy()})
        if got_BD.shape != wanted_BD.shape or got_BD.dtype != np.float32:
            raise RuntimeError(f"the exported model gives {got_BD.dtype} {got_BD.shape}, torch {wanted_BD.shape}")
        difference = float(np.abs(got_BD - wanted_BD).max())
        if not difference <= TOLERANCE:  # also true of NaN
            raise RuntimeError(
                f"the exported model differs from torch by {difference:.2e} on {len(part_BCHW)} images; "
                f"at most {TOLERANCE:.0e} is allowed, so nothing was written"
            )
    return int(wanted_BD.shape[1])


def _write(out: Path, onnx: bytes, manifest: EmbedderManifest) -> None:
    """Build the folder beside `out` and rename it; a replaced Embedder is kept until the new one is in place."""
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    built, replaced = beside / "built", beside / "replaced"
    try:
        built.mkdir()
        (built / MODEL_FILE).write_bytes(onnx)
        write_manifest(built, manifest)
        if out.exists():
            out.rename(replaced)
        try:
            built.rename(out)
        except OSError:
            if replaced.exists():
                replaced.rename(out)
            raise
    finally:
        shutil.rmtree(beside)


@contextlib.contextmanager
def _exporter_without_its_own_noise() -> Iterator[None]:
    """Keep two remarks of torch's exporter about itself from the user, who can do nothing about them.

    torch 2.13 copies its own deprecated `LeafSpec`, and logs a warning for each torchvision operator if torchvision is
    not installed. Every other warning passes.
    """

    def not_about_torchvision(record: logging.LogRecord) -> bool:
        return "torchvision is not installed" not in record.getMessage()

    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    logger.addFilter(not_about_torchvision)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            yield
    finally:
        logger.removeFilter(not_about_torchvision)
