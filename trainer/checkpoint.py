"""Checkpoints: everything that a run needs to go on, whole or not at all, without a pickle.

A checkpoint is a folder `step-00001000/` with safetensors files and `checkpoint.json`, which names each file with its
size and SHA-256. The ranks write into `step-00001000.partial/`; when all have, rank 0 writes the manifest and renames
the folder. A folder without a manifest is therefore not a checkpoint, whenever the writers died.

Tensors are named by what they are, never by who wrote them: the backbone in full, the head by ranges of class rows.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.atomic import publish, sync
from trainer.distributed import Group
from trainer.errors import UserError
from trainer.strict import Strict

CHECKPOINTS = "checkpoints"  # in a run's folder
MANIFEST = "checkpoint.json"
_PARTIAL, _ENTRY = ".partial", ".entry"


class FileEntry(Strict):
    """One file of a checkpoint."""

    bytes: int
    sha256: str


class CheckpointManifest(Strict):
    """`checkpoint.json`: where the run stood, and what belongs to the checkpoint."""

    format: Literal[1] = 1
    step: int
    world_size: int
    classes: int
    class_digest: str
    config: dict[str, Any]
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk, its files not yet read."""

    folder: Path
    manifest: CheckpointManifest

    @property
    def step(self) -> int:
        """Steps done when it was written; the run goes on with this step."""
        return self.manifest.step

    def read(self, name: str) -> dict[str, Tensor]:
        """The tensors of one file, after checking its digest.

        Raises:
            UserError: the file is missing or damaged.
        """
        entry = self.manifest.files.get(name)
        path = self.folder / name
        if entry is None:
            raise UserError(f"the checkpoint '{self.folder}' has no '{name}', only {sorted(self.manifest.files)}")
        try:
            if (found := _sha256(path)) != entry.sha256:
                what = f"'{path}' is damaged: SHA-256 {found}, written as {entry.sha256}"
                raise UserError(f"{what}; {_remedy(self.folder)}")
            return dict(load_file(path))
        except (OSError, SafetensorError) as error:
            raise UserError(f"'{path}' cannot be read ({error}); {_remedy(self.folder)}") from error


def save(
    parent: Path, manifest: CheckpointManifest, files: Mapping[str, Mapping[str, Tensor]], keep: int, group: Group
) -> Path:
    """Write a checkpoint; every rank calls it with the files that it holds (other names on each rank).

    Blocks until the checkpoint is whole on disk, then removes all but the newest `keep`. A collective: three barriers.

    Args:
        parent: folder of the run's checkpoints, the same (shared) one on every rank.
        manifest: as rank 0 shall write it; its `files` are filled in here.
        files: name to tensors by name.
    """
    final = parent / f"step-{manifest.step:08d}"
    partial = final.with_name(final.name + _PARTIAL)
    if group.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    group.barrier()
    for name, tensors in files.items():
        path = partial / name
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path)
        sync(path)
        entry = FileEntry(bytes=path.stat().st_size, sha256=_sha256(path))
        path.with_name(path.name + _ENTRY).write_text(entry.model_dump_json())
    group.barrier()
    if group.rank == 0:
        _finish(partial, final, manifest)
        for old in _whole(parent)[:-keep]:
            shutil.rmtree(old)
    group.barrier()
    return final


def latest(parent: Path) -> Checkpoint | None:
    """The newest whole checkpoint under `parent`; None where there is none.

    Raises:
        UserError: its manifest is damaged, or a file is missing or has another size.
    """
    folders = _whole(parent)
    return open_checkpoint(folders[-1]) if folders else None


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read and check a checkpoint's manifest and the sizes of its files.

    Raises:
        UserError: it is not a whole checkpoint.
    """
    try:
        manifest = CheckpointManifest.model_validate_json((folder / MANIFEST).read_bytes())
    except OSError as error:
        raise UserError(f"'{folder}' is not a checkpoint: cannot read {MANIFEST} ({error.strerror})") from error
    except ValidationError as error:
        raise UserError(f"'{folder / MANIFEST}' is damaged ({error.errors()[0]['msg']}); {_remedy(folder)}") from error
    for name, entry in manifest.files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry.bytes:
            raise UserError(f"'{path}' has {size} bytes, written with {entry.bytes}; {_remedy(folder)}")
    return Checkpoint(folder, manifest)


def _remedy(folder: Path) -> str:
    return f"remove '{folder}' to go on from the checkpoint before it"


def _whole(parent: Path) -> list[Path]:
    return sorted(path.parent for path in parent.glob(f"step-*/{MANIFEST}") if not path.parent.name.endswith(_PARTIAL))


def _finish(partial: Path, final: Path, manifest: CheckpointManifest) -> None:
    entries = {}
    for path in sorted(partial.glob("*" + _ENTRY)):
        entries[path.stem] = FileEntry.model_validate_json(path.read_text())
        path.unlink()
    whole = manifest.model_copy(update={"files": entries}).model_dump(mode="json")
    (partial / MANIFEST).write_text(json.dumps(whole, indent=1))
    publish(partial, final)  # there may be one of this step already, after a resume from an older one


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
