"""From a Checkpoint to an Embedder: a folder with `model.onnx`, `manifest.json` and the backbone's weights.

Axes: B samples, C channels, H and W pixels, D dimensions of the embedding.
"""

import contextlib
import copy
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from onnx import ModelProto
from safetensors.torch import save_file
from torch import nn

from trainer.atomic import fresh_folder
from trainer.backbones import build
from trainer.checkpoint import Checkpoint
from trainer.config import Config, from_tree
from trainer.data.arrays import Form
from trainer.data.manifest import Manifest
from trainer.data.remote import shown
from trainer.data.stream import Stream, preprocessing
from trainer.embedder import (
    EMBEDDER,
    MANIFEST_FILE,
    MODEL_FILE,
    NORMS,
    OUTPUT,
    EmbedderManifest,
    check_free,
    input_of,
    model_id,
    write_manifest,
)
from trainer.errors import UserError
from trainer.objective import embedder_of
from trainer.onnx import open_session
from trainer.run import RunNote
from trainer.storage import Folder, written_here
from trainer.tracking import Tracker
from trainer.views import Join, joined
from trainer.weights import DIGEST, WEIGHTS_FILE, Which, find

_COMPARED = 16  # samples
TOLERANCE = 1e-4  # of a component of a unit vector, ONNX Runtime against torch
LARGEST = 2_000_000_000  # bytes; protobuf ends at 2 GiB


class UnitVectors(nn.Module):
    """uint8 images_BCHW to unit vectors float32 [B, D]: F.normalize(backbone(images / 127.5 - 1)).

    Of float32 samples, which are no images, F.normalize(backbone(samples)). With `norms` also |backbone(...)|, [B].
    """

    def __init__(self, backbone: nn.Module, norms: bool = False) -> None:
        super().__init__()
        self.backbone, self.norms = backbone, norms

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scaled = images if images.is_floating_point() else images.float() / 127.5 - 1.0
        x_BD = self.backbone(scaled)
        unit_BD = F.normalize(x_BD, dim=1)
        return (unit_BD, torch.linalg.vector_norm(x_BD, dim=1)) if self.norms else (unit_BD,)


def export_run(
    run: Path | str,
    out: Path | str,
    *,
    data: Path | str | None,
    overwrite: bool,
    register: bool,
    on_trouble: Callable[[str], None],
    which: Which = "trained",
    views: tuple[str, ...] = (),
    join: Join = "mean",
) -> EmbedderManifest:
    """Export the newest checkpoint of a run, compare it with torch on the set's samples, and register it in MLflow.

    Args:
        run: the run's folder, or that of one checkpoint; or its address.
        out: a folder or an address.
        data: a data set to take the samples from; None: the one that the run was trained on.
        which: the weights as they were trained, or their moving average.
        views, join: what an embedding is made of (see `views.py`).
        on_trouble: called with one sentence when MLflow cannot be used, and for a damaged checkpoint that is passed
            over.

    Raises:
        UserError: no checkpoint, a data set of other samples than the run's, or as `export`.
    """
    place = Folder.at(run)
    stored = find(place, on_trouble)
    if stored is None:
        raise UserError(f"'{place}' holds no checkpoint; give the run.out of a training run, or train one first")
    found, weights = stored.checkpoint, stored.weights(which)
    config = from_tree(found.manifest.config)
    path = data or config.data.path
    manifest = Manifest.read(path, config.data.remote_cache)
    form = preprocessing(manifest, config.data)
    backbone = build(config.backbone, *form.shape_CHW)
    _load(backbone, weights, f"the model in '{found.folder}' does not read the {manifest.holds} at '{shown(path)}'")
    note = RunNote.read(config.run.out)
    provenance = _provenance(found, manifest.kind, note, which)
    model = embedder_of(config, found, backbone)
    check_free(place := Folder.at(out), overwrite)
    # Behind a learned projection the length is another.
    norms = config.loss.name if config.loss.norm_tells and model is backbone else None
    with written_here(place, MANIFEST_FILE) as here:
        told: dict[str, Any] = {"overwrite": overwrite, "norms": norms, "views": views, "join": join}
        written = export(model, form, here, _samples(manifest, config), provenance, weights=weights, **told)
        if register and note.mlflow_run_id:
            with contextlib.closing(Tracker(config.tracking, on_trouble, note.mlflow_run_id)) as tracker:
                tracker.register(here, written.model_id)
    return written


def _load(backbone: nn.Module, weights: dict[str, torch.Tensor], otherwise: str) -> None:
    try:
        backbone.load_state_dict(weights)
    except RuntimeError as error:  # with a list of all shapes
        raise UserError(f"{otherwise}; give a data set like the one that it was trained on") from error


def _provenance(found: Checkpoint, data: str, note: RunNote, which: Which) -> dict[str, str]:
    return {
        "checkpoint_step": str(found.step),
        "class_digest": found.manifest.class_digest,
        "classes": str(found.manifest.classes),
        "mlflow_run_id": note.mlflow_run_id,
        "tracking_uri": "" if "@" in note.tracking_uri else note.tracking_uri,  # it may hold a password
        "data": data,
        "weights": which,
    }


def _samples(manifest: Manifest, config: Config) -> torch.Tensor:
    """Real samples for the comparison, of the validation split where there is one."""
    split = config.data.val_split if config.data.val_split in manifest.splits else config.data.train_split
    settings = config.data.model_copy(update={"batch_size": _COMPARED, "cache": "none"})
    return Stream(manifest, split, settings, shuffle=False).batch(0, 0).images_BCHW


def export(
    backbone: nn.Module,
    form: Form,
    out: Path,
    images_BCHW: torch.Tensor,
    provenance: dict[str, str],
    *,
    overwrite: bool = False,
    weights: Mapping[str, torch.Tensor] | None = None,
    norms: str | None = None,
    views: tuple[str, ...] = (),
    join: Join = "mean",
) -> EmbedderManifest:
    """Write the Embedder folder `out`, whole or not at all, after comparing ONNX Runtime with torch on real samples.

    The caller's backbone is not changed: a float32 copy in eval mode on the CPU is exported.

    Args:
        backbone: float images_BCHW in [-1, 1], or what stands in their place, to x_BD.
        form: how a sample becomes what the backbone was trained on.
        images_BCHW: real samples in that form, uint8 or (no images) float32; the outputs are compared on them.
        provenance: where the weights come from; kept in the manifest.
        overwrite: replace an Embedder that is already in `out`.
        weights: what `init.weights` of a later training reads; kept beside the ONNX file, which has them folded into
            each other, with their digest in the provenance.
        norms: the loss by which the length of the backbone's vectors tells an image's quality.
        views, join: of the manifest.

    Raises:
        UserError: `out` exists, the samples do not fit the form, or the backbone has no ONNX form.
        RuntimeError: ONNX Runtime and torch differ by more than 1e-4.
    """
    _check_samples(images_BCHW, form)
    with fresh_folder(out, EMBEDDER, overwrite) as folder:
        model = UnitVectors(copy.deepcopy(backbone), norms is not None).float().cpu().eval()
        onnx = _to_onnx(model, form)
        if weights is not None:
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS_FILE)
            provenance = provenance | {DIGEST: hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()}
        manifest = EmbedderManifest(
            model_id=model_id(onnx, form, views, join),
            dimension=_check(onnx, model, form, images_BCHW.cpu()) * joined(views, join),
            preprocessing=form,
            views=views,
            join=join,
            provenance=provenance,
            norms=norms,
        )
        (folder / MODEL_FILE).write_bytes(onnx)
        write_manifest(folder, manifest)
    return manifest


def _check_samples(images_BCHW: torch.Tensor, form: Form) -> None:
    shape, dtype = tuple(images_BCHW.shape), str(images_BCHW.dtype).removeprefix("torch.")
    if dtype != form.dtype.name or shape[1:] != form.shape_CHW or not shape[0]:
        raise UserError(
            f"export cannot compare the model with torch on samples of type {dtype} and shape {shape}; "
            f"give one real sample or more, {form.dtype} [B, {', '.join(map(str, form.shape_CHW))}]"
        )


def _to_onnx(model: UnitVectors, form: Form) -> bytes:
    """The ONNX file as bytes, with a free batch size; the same weights give the same bytes."""
    # Two samples, since torch.export takes a batch of one for a constant.
    example = torch.from_numpy(np.zeros((2, *form.shape_CHW), form.dtype))
    try:
        with torch.no_grad(), _exporter_without_its_own_noise():
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                verbose=False,
                input_names=[input_of(form)],
                output_names=[OUTPUT, NORMS] if model.norms else [OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
    except torch.onnx.OnnxExporterError as error:
        why = str(error).splitlines()[0]
        raise UserError(f"this backbone has no ONNX form: {why}; choose another backbone") from error
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    proto: ModelProto = program.model_proto
    if (size := proto.ByteSize()) > LARGEST:
        raise UserError(f"the model has {size} bytes, an embedder at most {LARGEST}; use a smaller backbone")
    _forget_the_source(proto)
    onnx: bytes = proto.SerializeToString(deterministic=True)
    return onnx


def _forget_the_source(proto: ModelProto) -> None:
    """Remove the exporter's notes (stack traces with paths of this machine): they would also change the digest."""
    graph, functions = proto.graph, proto.functions
    named = (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer)
    for part in (proto, graph, *functions, *named, *(node for function in functions for node in function.node)):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


def _check(onnx: bytes, model: UnitVectors, form: Form, images_BCHW: torch.Tensor) -> int:
    """Compare ONNX Runtime with torch, on all samples together and on the first alone; returns D."""
    session = open_session(onnx, torch.get_num_threads())
    for part_BCHW in (images_BCHW, images_BCHW[:1]):
        with torch.no_grad():
            wanted_BD, *lengths = (output.numpy() for output in model(part_BCHW))
        got_BD, *given = session.run(None, {input_of(form): part_BCHW.numpy()})
        if got_BD.shape != wanted_BD.shape or got_BD.dtype != np.float32:
            raise RuntimeError(f"the exported model gives {got_BD.dtype} {got_BD.shape}, torch {wanted_BD.shape}")
        difference = float(np.abs(got_BD - wanted_BD).max())
        for wanted_B, got_B in zip(lengths, given, strict=True):
            difference = max(difference, float((np.abs(got_B - wanted_B) / wanted_B).max()))
        if not difference <= TOLERANCE:  # also true of NaN
            raise RuntimeError(
                f"the exported model differs from torch by {difference:.2e} on {len(part_BCHW)} samples; "
                f"at most {TOLERANCE:.0e} is allowed, so nothing was written"
            )
    return int(wanted_BD.shape[1])


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
