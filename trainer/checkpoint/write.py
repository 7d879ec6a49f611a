"""Writing a checkpoint: each rank its files, then the first one what makes them a checkpoint."""

import hashlib
import json
import uuid
from collections.abc import Collection, Mapping
from contextlib import suppress

import torch
from torch import Tensor

from trainer.checkpoint.encode import pieces
from trainer.checkpoint.files import MANIFEST, CheckpointManifest, FileEntry
from trainer.checkpoint.keep import Shelf, place, prune, sweep
from trainer.checkpoint.together import on_all
from trainer.distributed import Group
from trainer.errors import Diverged, UserError
from trainer.locks import within
from trainer.storage import Folder

_PATIENCE_S = 10  # until a file that another machine wrote is seen here, too


def save(
    folder: Folder,
    manifest: CheckpointManifest,
    files: Mapping[str, Mapping[str, Tensor]],
    keep: int,
    group: Group,
    expected: Collection[str] = (),
) -> None:
    """Write a checkpoint; every rank calls it with the files that it holds (other names on each rank).

    Blocks until the checkpoint is whole and on the disk, then removes old ones (`keep.prune`). A collective: the ranks
    gather what each has written, since a listing of the folder may be late to show it.

    Args:
        folder: of the run's checkpoints, the same (shared) one on every rank.
        manifest: as rank 0 shall write it; its `files` are filled in here.
        files: name to tensors by name, contiguous and on the CPU.
        keep: how many of the newest stay.
        expected: files that must have been written, whoever writes them.

    Raises:
        Diverged: on every rank, where a tensor of one of them is not finite; nothing was written.
        UserError: on every rank, where one of them cannot write, or a rank's file is not there; nothing is left behind.
    """
    check_finite(manifest.step, files, group)
    inside, first = place(folder, manifest.step), group.rank == 0
    token = on_all(group, inside, lambda: _begin(folder, manifest.step) if first else "")[0]
    try:
        written = on_all(group, inside, lambda: _write(inside, files, token))
        entries = {name: FileEntry(**entry) for text in written for name, entry in json.loads(text).items()}
        whole = manifest.model_copy(update={"files": dict(sorted(entries.items()))})
        lost = sorted(set(expected) - set(entries))
        if missing := f"'{lost[0]}'" if lost else whole.missing():
            raise UserError(f"'{inside}' was not written: no worker wrote {missing}; start the run again with --resume")
        on_all(group, inside, lambda: _commit(inside, whole) if first else None)
    except UserError:  # on every rank, so that nobody is writing any more
        if first:
            with suppress(OSError, UserError):  # it is the first error that counts
                sweep(folder)
        raise
    on_all(group, inside, lambda: prune(folder, keep, manifest.step) if first else None)


def check_finite(step: int, files: Mapping[str, Mapping[str, Tensor]], group: Group) -> None:
    """A collective; each rank gives the tensors that it holds.

    Raises:
        Diverged: on every rank, where a tensor of one of them is not finite.
    """
    bad = (f"'{key}' of {name}" for name, tensors in files.items() for key in tensors if not _finite(tensors[key]))
    if found := [text for text in group.gather_text(next(bad, "")) if text]:
        raise Diverged(f"the run has diverged: {found[0]} is not finite after step {step}")


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())  # without a mask as large as the tensor


def _begin(folder: Folder, step: int) -> str:
    """Make room; the token of this attempt."""
    sweep(folder)
    if step in (shelf := Shelf.of(folder)).diverged:
        shelf.remove(step)
    return uuid.uuid4().hex[:8]


def _write(inside: Folder, files: Mapping[str, Mapping[str, Tensor]], token: str) -> str:
    """Write one rank's files; what the manifest will say of them, as JSON."""
    entries = {}
    for name, tensors in files.items():
        content, digest = pieces(tensors), hashlib.sha256()
        for piece in content:
            digest.update(piece)
        path = f"{name.removesuffix('.safetensors')}-{token}.safetensors"
        inside.write(path, content)
        entries[name] = {"bytes": sum(map(len, content)), "sha256": digest.hexdigest(), "path": path}
    return json.dumps(entries)


def _commit(inside: Folder, manifest: CheckpointManifest) -> None:
    """Write the manifest when every rank's files are seen here: a network file system may show them late."""
    wanted = {entry.path: entry.bytes for entry in manifest.files.values()}
    unseen = dict(wanted)

    def seen() -> bool:
        sizes = inside.sizes()
        for path in [path for path, size in unseen.items() if sizes.get(path) == size]:
            del unseen[path]
        return not unseen

    if not within(_PATIENCE_S, seen):
        raise UserError(
            f"'{inside}/{min(unseen)}', which a worker wrote, is not there for the first one; "
            "name a run.out that is one folder, shared by all of them"
        )
    inside.write(MANIFEST, json.dumps(manifest.model_dump(mode="json"), indent=1))
