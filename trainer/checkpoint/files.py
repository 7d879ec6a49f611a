"""What a checkpoint consists of: safetensors files of bounded size, and `checkpoint.json`, which names them.

    step-00001000/checkpoint.json                        step, config; size, SHA-256 and place of each file
                  backbone-part-0000-TOKEN.safetensors   weights, moments and buffers, in their order
                  arcface-rows-A-B-TOKEN.safetensors     class centres and moments of the classes A to B - 1

`checkpoint.json` is written last, and replaced in one go: a folder without it is not a checkpoint, whenever the writers
died. TOKEN is another one in each attempt to write, so that no attempt touches the files of another, not even a process
that was thought dead.

Tensors are named by what they are, never by who wrote them: any number of ranks reads what any other number wrote. A
file has at most `PART` bytes (but for a tensor or a class that has more), so that a rank reads and checks little beyond
its own rows. 10M classes of 512 fp32 numbers with their momentum are 41 GB, 610 files: at 64 ranks each reads its own
0.64 GB, and at most 0.13 GB more of two files that it shares with its neighbours, whatever number of ranks wrote them.
With one file and one digest for each rank that wrote, 64 ranks that go on from what one wrote would read 41 GB each.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from trainer.distributed import RowRange
from trainer.errors import UserError
from trainer.storage import Folder
from trainer.strict import Strict

MANIFEST = "checkpoint.json"
PART = 64 * 2**20  # bytes
Name = Annotated[str, Field(pattern=r"^[\w.-]*$")]  # leads to no other folder
_ROWS_FILE = re.compile(r"(.+)-rows-(\d{10})-(\d{10})\.safetensors")
_PART_FILE = re.compile(r"(.+)-part-\d{4}\.safetensors")


class Damaged(UserError):
    """A checkpoint is not as it was written; the one before it may be."""


class FileEntry(Strict):
    """One file of a checkpoint; it lies under its own name where `path` is empty."""

    bytes: int
    sha256: str
    path: Name = ""


class CheckpointManifest(Strict):
    """`checkpoint.json`: where the run stood, and what belongs to the checkpoint."""

    format: Literal[1, 2, 3] = 3
    step: int
    world_size: int
    classes: int
    class_digest: str
    data_digest: str | None = None  # format 1 has none
    config: dict[str, Any]
    files: dict[Name, FileEntry]
    untold: list[dict[str, Any]] = Field(
        default_factory=list,
        description="numbers that the launching process may not have noted yet",
    )

    def missing(self) -> str:
        """What of the rows of the classes is not there; "" where all are."""
        found: dict[str, list[RowRange]] = {}
        for name in sorted(self.files):
            if match := _ROWS_FILE.fullmatch(name):
                found.setdefault(match[1], []).append(RowRange(int(match[2]), int(match[3])))
        for loss, ranges in found.items():
            stop = 0
            for rows in [*ranges, RowRange(self.classes, self.classes)]:
                if rows.start != stop:
                    return f"the rows of the classes {stop} to {rows.start - 1} of {loss}"
                stop = rows.stop
        return ""


def rows_file(name: str, rows: RowRange) -> str:
    """A file named by the classes whose rows it holds."""
    return f"{name}-rows-{rows.start:010d}-{rows.stop:010d}.safetensors"


def in_rows(
    name: str, rows: RowRange, state: Mapping[str, Tensor], of_rows: Callable[[str], bool]
) -> dict[str, dict[str, Tensor]]:
    """A rank's rows as files of bounded size: views of its tensors.

    Args:
        name: of the loss.
        rows: the classes of the rank.
        state: the tensors of `of_rows` have equally many rows for each class, the others lie in every file.
    """
    size = sum(tensor.nbytes for key, tensor in state.items() if of_rows(key))
    count = min(max(1, math.ceil(size / PART)), len(rows))
    files = {}
    for part in (RowRange.of(len(rows), number, count) for number in range(count)):
        own = RowRange(rows.start + part.start, rows.start + part.stop)
        files[rows_file(name, own)] = {
            key: _cut(tensor, rows, own) if of_rows(key) else tensor for key, tensor in state.items()
        }
    return files


def in_parts(name: str, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[int, str, str, Tensor]]:
    """What has no rows, as files of bounded size, on every rank the same: number of the file, its name, key, tensor."""
    part = size = 0
    for key, tensor in tensors:
        if size and size + tensor.nbytes > PART:
            part, size = part + 1, 0
        size += tensor.nbytes
        yield part, f"{name}-part-{part:04d}.safetensors", key, tensor


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, its files not yet read."""

    folder: Folder
    manifest: CheckpointManifest

    @property
    def step(self) -> int:
        """Steps done when it was written; the run goes on with this step."""
        return self.manifest.step

    def read(self, name: str) -> dict[str, Tensor]:
        """The tensors of one file, after checking its digest.

        Raises:
            Damaged: the file is missing or not as it was written.
        """
        entry = self.manifest.files.get(name)
        if entry is None:
            raise Damaged(f"the checkpoint '{self.folder}' has no '{name}', only {sorted(self.manifest.files)}")
        path = entry.path or name
        try:
            data = self.folder.read(path)
        except OSError as error:
            raise Damaged(f"'{self.folder}/{path}' cannot be read: {error.strerror}") from error
        if (found := hashlib.sha256(data).hexdigest()) != entry.sha256:
            raise Damaged(f"'{self.folder}/{path}' is damaged: SHA-256 {found}, written as {entry.sha256}")
        try:
            return dict(load(data))
        except SafetensorError as error:  # written so
            raise Damaged(f"'{self.folder}/{path}' holds no tensors ({error})") from error

    def parts(self, name: str) -> dict[str, Tensor]:
        """The tensors that were written in parts, or, in earlier formats, as one file."""
        names = [one for one in self.manifest.files if (match := _PART_FILE.fullmatch(one)) and match[1] == name]
        state: dict[str, Tensor] = {}
        for one in sorted(names) or [f"{name}.safetensors"]:
            state |= self.read(one)
        return state

    def rows(self, name: str, rows: RowRange, of_rows: Callable[[str], bool]) -> dict[str, Tensor]:
        """The tensors of a loss for these classes, whoever wrote them; only files with one of them are read.

        Args:
            of_rows: as for `in_rows`.

        Raises:
            Damaged: a file is missing or not as it was written.
        """
        state: dict[str, Tensor] = {}
        for file in self.manifest.files:
            match = _ROWS_FILE.fullmatch(file)
            if match is None or match[1] != name:
                continue
            there = RowRange(int(match[2]), int(match[3]))
            both = RowRange(max(there.start, rows.start), min(there.stop, rows.stop))
            if both.start >= both.stop:
                continue
            for key, tensor in self.read(file).items():
                if not of_rows(key):
                    state[key] = tensor
                    continue
                if key not in state:
                    per_class = tensor.shape[0] // len(there)
                    state[key] = tensor.new_empty(len(rows) * per_class, *tensor.shape[1:])
                _cut(state[key], rows, both).copy_(_cut(tensor, there, both))
        if not state:
            raise Damaged(f"the checkpoint '{self.folder}' has no rows of {name}, only {sorted(self.manifest.files)}")
        return state


def open_checkpoint(folder: Folder) -> Checkpoint:
    """Read and check a checkpoint's manifest, which files it has, and their sizes.

    Raises:
        Damaged: it is not a whole checkpoint.
    """
    manifest = read_manifest(folder)
    if missing := manifest.missing():
        raise Damaged(f"'{folder}' lacks {missing}")
    sizes = folder.sizes()
    for name, entry in manifest.files.items():
        if (size := sizes.get(entry.path or name)) != entry.bytes:
            there = "is missing" if size is None else f"has {size} bytes"
            raise Damaged(f"'{folder}/{entry.path or name}' {there}, written with {entry.bytes}")
    return Checkpoint(folder, manifest)


def read_manifest(folder: Folder) -> CheckpointManifest:
    """What a checkpoint should consist of.

    Raises:
        Damaged: there is no manifest, or it is not as it was written.
    """
    try:
        return CheckpointManifest.model_validate_json(folder.read(MANIFEST))
    except OSError as error:
        raise Damaged(f"'{folder}' is not a checkpoint: cannot read {MANIFEST} ({error.strerror})") from error
    except ValidationError as error:
        raise Damaged(f"'{folder}/{MANIFEST}' is damaged ({error.errors()[0]['msg']})") from error


def _cut(tensor: Tensor, there: RowRange, part: RowRange) -> Tensor:
    """The rows of the classes `part` in a tensor of the classes `there`."""
    each = tensor.shape[0] // len(there)
    return tensor[(part.start - there.start) * each : (part.stop - there.start) * each]
