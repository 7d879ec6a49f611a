"""Checkpoints: everything that a run needs to go on, whole or not at all, without a pickle.

A checkpoint is a folder `step-00001000/` with safetensors files and `checkpoint.json`, which names each file with its
size and SHA-256. The ranks write into `step-00001000.partial/` and tell each other what; when that is all there, rank 0
writes the manifest and renames the folder. A folder without a manifest is therefore not a checkpoint, whenever the
writers died.

Tensors are named by what they are, never by who wrote them: the backbone in full, the head by ranges of class rows.

A training that diverges shows it some steps after it went wrong. Until a run has gone `TRUSTED_AFTER` steps on from a
checkpoint, it is not trusted: the newest trusted one is kept whatever else is removed, and when a run diverges, the
later ones are renamed to `step-00001000.diverged/`, which no resume takes.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.atomic import publish, room_for, sync
from trainer.distributed import Group, RowRange
from trainer.errors import Diverged, UserError
from trainer.strict import Strict

CHECKPOINTS = "checkpoints"  # in a run's folder
MANIFEST = "checkpoint.json"
TRUSTED_AFTER = 100  # steps
TRUSTED = "trusted"  # an empty file in a trusted checkpoint: it stays so, also for a resumed run that diverges soon
_PARTIAL, _DIVERGED = ".partial", ".diverged"
_ROWS_FILE = re.compile(r"(.+)-rows-(\d{10})-(\d{10})\.safetensors")
_PATIENCE_S = 10  # until a file that another machine wrote is seen here, too


def rows_file(name: str, rows: RowRange) -> str:
    """A file named by the classes whose rows it holds, whoever wrote it."""
    return f"{name}-rows-{rows.start:010d}-{rows.stop:010d}.safetensors"


class FileEntry(Strict):
    """One file of a checkpoint."""

    bytes: int
    sha256: str


class CheckpointManifest(Strict):
    """`checkpoint.json`: where the run stood, and what belongs to the checkpoint."""

    format: Literal[1, 2] = 2
    step: int
    world_size: int
    classes: int
    class_digest: str
    data_digest: str | None = None  # format 1 has none
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

    Blocks until the checkpoint is whole on disk, then removes old ones: the newest `keep` stay, the newest trusted one,
    and the one that will be trusted next. A collective: the ranks gather what each has written.

    Args:
        parent: folder of the run's checkpoints, the same (shared) one on every rank.
        manifest: as rank 0 shall write it; its `files` are filled in here.
        files: name to tensors by name.

    Raises:
        Diverged: on every rank, where a tensor of one of them is not finite; nothing was written.
        UserError: on every rank, where one of them cannot write, or a rank's file is not there; nothing is left behind.
    """
    check_finite(manifest.step, files, group)
    final = parent / f"step-{manifest.step:08d}"
    partial = final.with_name(final.name + _PARTIAL)
    first = group.rank == 0
    try:
        _on_all(group, final, lambda: _make_room(parent, partial) if first else None)
        written = _on_all(group, final, lambda: _write(partial, files))
        whole = manifest.model_copy(update={"files": _merged(manifest, written, final)})
        _on_all(group, final, lambda: _finish(partial, final, whole) if first else None)
    except UserError:  # on every rank, so that nobody is writing any more
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    _on_all(group, final, lambda: _remove_old(parent, keep, manifest.step) if first else None)
    return final


def check_finite(step: int, files: Mapping[str, Mapping[str, Tensor]], group: Group) -> None:
    """A collective; each rank gives the tensors that it holds.

    Raises:
        Diverged: on every rank, where a tensor of one of them is not finite.
    """
    bad = (f"'{key}' of {name}" for name, tensors in files.items() for key in tensors if not _finite(tensors[key]))
    if found := [text for text in group.gather_text(next(bad, "")) if text]:
        raise Diverged(f"the run has diverged: {found[0]} is not finite after step {step}")


def latest(parent: Path) -> Checkpoint | None:
    """The newest whole checkpoint under `parent`; None where there is none.

    Raises:
        UserError: its manifest is damaged, or a file is missing or has another size.
    """
    folders = _whole(parent)
    return open_checkpoint(folders[-1]) if folders else None


def agreed(parent: Path, group: Group) -> Checkpoint | None:
    """The newest whole checkpoint, the same on every rank; None where no rank sees one. A collective.

    Raises:
        UserError: on every rank, where one of them cannot open it or sees another one of this name.
    """
    folders = _whole(parent)
    name = max(group.gather_text(folders[-1].name if folders else ""))
    if not name:
        return None
    folder = parent / name
    digests = _on_all(group, folder, lambda: _sha256(open_checkpoint(folder).folder / MANIFEST))
    if len(set(digests)) > 1:
        raise UserError(
            f"the {group.size} workers see different checkpoints in '{folder}'; "
            "name a run.out that is one folder, shared by all of them"
        )
    return open_checkpoint(folder)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read and check a checkpoint's manifest, which files it has, and their sizes.

    Raises:
        UserError: it is not a whole checkpoint.
    """
    try:
        manifest = CheckpointManifest.model_validate_json((folder / MANIFEST).read_bytes())
    except OSError as error:
        raise UserError(f"'{folder}' is not a checkpoint: cannot read {MANIFEST} ({error.strerror})") from error
    except ValidationError as error:
        raise UserError(f"'{folder / MANIFEST}' is damaged ({error.errors()[0]['msg']}); {_remedy(folder)}") from error
    if missing := _missing(manifest, list(manifest.files)):
        raise UserError(f"'{folder}' lacks {missing}; {_remedy(folder)}")
    for name, entry in manifest.files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry.bytes:
            raise UserError(f"'{path}' has {size} bytes, written with {entry.bytes}; {_remedy(folder)}")
    return Checkpoint(folder, manifest)


def set_aside(parent: Path, step: int, group: Group) -> int:
    """Put away the checkpoints that are not trusted, for a run that diverged at `step`; the step from which a resume
    will go on. A collective."""
    if group.rank == 0:
        for folder in sorted(set(_whole(parent)) - set(_trusted(parent, step))):
            aside = folder.with_name(folder.name + _DIVERGED)
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
    group.barrier()
    return max(map(_step, _whole(parent)), default=0)


def _remedy(folder: Path) -> str:
    return f"remove '{folder}' to go on from the checkpoint before it"


def _whole(parent: Path) -> list[Path]:
    return sorted(path.parent for path in parent.glob(f"step-*/{MANIFEST}") if not path.parent.suffix)


def _step(folder: Path) -> int:
    return int(folder.stem.removeprefix("step-"))


def _on_all(group: Group, folder: Path, work: Callable[[], str | None]) -> list[str]:
    """What `work` returns on each rank. Where it fails on one of them, all raise that error, so that none waits."""
    try:
        with room_for(folder):
            answer = {"done": work() or ""}
    except UserError as error:
        answer = {"failed": str(error)}
    except OSError as error:
        answer = {"failed": f"'{error.filename or folder}' cannot be used: {error.strerror}; mend that, and --resume"}
    answers = [json.loads(text) for text in group.gather_text(json.dumps(answer))]
    for rank, one in enumerate(answers):
        if "failed" in one:
            raise UserError(one["failed"] + (f" (worker {rank})" if group.size > 1 else ""))
    return [one["done"] for one in answers]


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())  # without a mask as large as the tensor


def _make_room(parent: Path, partial: Path) -> None:
    for left in parent.glob(f"step-*{_PARTIAL}"):  # by a run that was killed
        shutil.rmtree(left)
    partial.mkdir(parents=True)


def _write(partial: Path, files: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Write one rank's files; what the manifest will say of them, as JSON."""
    entries = {}
    for name, tensors in files.items():
        path = partial / name
        try:
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path)
        except SafetensorError as error:  # the system's error is in its text alone
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        sync(path)
        entries[name] = FileEntry(bytes=path.stat().st_size, sha256=_sha256(path)).model_dump()
    return json.dumps(entries)


def _merged(manifest: CheckpointManifest, written: list[str], final: Path) -> dict[str, FileEntry]:
    """All ranks' entries; a UserError, the same on every rank, where files of the expected rows are not among them."""
    entries = {name: FileEntry(**entry) for text in written for name, entry in json.loads(text).items()}
    if missing := _missing(manifest, list(entries)):
        raise UserError(f"'{final}' was not written: no worker wrote {missing}; start the run again with --resume")
    return dict(sorted(entries.items()))


def _missing(manifest: CheckpointManifest, names: list[str]) -> str:
    """The first file of class rows that is expected and not there; "" where all are."""
    size = manifest.world_size
    for loss in sorted({match[1] for name in names if (match := _ROWS_FILE.fullmatch(name))}):
        for rank in range(size):
            expected = rows_file(loss, RowRange.of(manifest.classes, rank, size))
            if expected not in names:
                return f"'{expected}'"
    return ""


def _finish(partial: Path, final: Path, manifest: CheckpointManifest) -> None:
    for name, entry in manifest.files.items():
        _wait_for(partial / name, entry.bytes)
    (partial / MANIFEST).write_text(json.dumps(manifest.model_dump(mode="json"), indent=1))
    publish(partial, final)  # there may be one of this step already, after a resume from an older one


def _wait_for(path: Path, size: int) -> None:
    """Return when another machine's file is seen here: a network file system may show it late."""
    until = time.monotonic() + _PATIENCE_S
    while not path.is_file() or path.stat().st_size != size:
        if time.monotonic() > until:
            raise UserError(
                f"'{path}', which a worker wrote, is not there for the first one; "
                "name a run.out that is one folder, shared by all of them"
            )
        time.sleep(0.1)


def _trusted(parent: Path, step: int) -> list[Path]:
    """Mark and return the checkpoints from which a run went on long enough, of one that is at `step`."""
    folders = _whole(parent)
    for folder in folders:
        if _step(folder) <= step - TRUSTED_AFTER:
            (folder / TRUSTED).touch()
    return [folder for folder in folders if (folder / TRUSTED).exists()]


def _remove_old(parent: Path, keep: int, step: int) -> None:
    folders, trusted = _whole(parent), _trusted(parent, step)
    after = [folder for folder in folders if folder not in trusted]
    for folder in set(folders) - set(folders[-keep:]) - set(trusted[-1:]) - set(after[:1]):
        shutil.rmtree(folder)
    for aside in parent.glob(f"step-*{_DIVERGED}"):
        if trusted and _step(aside) <= _step(trusted[-1]):  # the run is past the place where it went wrong
            shutil.rmtree(aside)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
