"""An index in files beside its store, so that a start need not read all of the store.

    faces.sqlite-index/
        index.json      which store, model and revision; the blocks in order; a checksum
        HEX.block       vectors, subjects' numbers and samples' ids of so many rows; SHA-256 of each CHUNK of them

No names are in it. A block's file is written once, by the side of the searches, and takes part when `index.json`, which
appears whole or not at all, names it. What is erased is overwritten in every file, and flushed, before it is
acknowledged. The store is the truth: a snapshot that is damaged or does not belong is dropped.

Axes: N rows, E numbers of a vector.
"""

import hashlib
import json
import logging
import mmap
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from serving.search.blocks import GONE, Block, Find, Vectors, block_rows
from trainer.atomic import sync, write_file
from trainer.errors import UserError

FORMAT, INDEX = 1, "index.json"
CHUNK = 256  # rows, half a megabyte: what is hashed anew where one of them is erased
log = logging.getLogger("hypersphere.serving")
Mapped = tuple[Block, Vectors]


class Unusable(Exception):
    """A snapshot cannot be taken for the index of this store; the message says why."""


@dataclass(frozen=True)
class Source:
    """What an index was made of: the store, the model, and what was made of its vectors."""

    uid: str
    model_id: str
    width: int
    scores: str  # digest of the normaliser, or empty; and the template, where one vector a subject is held


def snapshot_path(store: Path) -> Path:
    return store.with_name(store.name + "-index")


class _File:
    """A block's file, mapped: what is written to `block` is in the file."""

    def __init__(self, path: Path, rows: int, source: Source) -> None:
        """Raises Unusable where it has not the size of so many rows, OSError where it cannot be opened."""
        self.path, self.rows, self._salt = path, rows, f"{source.uid}/{path.name}".encode()
        row, self._chunks = 4 * source.width + 8 + 16, -(-rows // CHUNK)
        with path.open("r+b") as file:
            if os.fstat(file.fileno()).st_size != rows * row + 32 * self._chunks:
                raise Unusable(f"'{path}' has not the size of {rows} rows")
            self._map = mmap.mmap(file.fileno(), 0)
        at = [0, 4 * source.width * rows, (4 * source.width + 8) * rows, row * rows]
        vectors_NE = np.frombuffer(self._map, "<f4", rows * source.width).reshape(rows, source.width)
        subject_N = np.frombuffer(self._map, "<i8", rows, at[1])
        sample_N = np.frombuffer(self._map, np.uint8, 16 * rows, at[2]).reshape(rows, 16)
        self.block = Block(vectors_NE, subject_N, sample_N, None)
        self.of = self.block  # the block of the index that it holds
        self._digests = np.frombuffer(self._map, np.uint8, 32 * self._chunks, at[3]).reshape(-1, 32)

    @classmethod
    def make(cls, path: Path, source: Source, block: Block, rows: int) -> "_File":
        """A file of the block's first rows, not flushed yet.

        Rows may be erased in the block meanwhile. Their numbers and ids are taken first: so either `erase` finds them
        in the file, or they were GONE before their vectors were read.
        """
        subject_N, sample_N = block.subject_N[:rows].copy(), block.sample_N[:rows].copy()
        with open(path, "xb", opener=partial(os.open, mode=0o600)) as file:
            for array in (block.vectors_NE[:rows], subject_N, sample_N):
                file.write(array.data)
            file.write(bytes(32 * -(-rows // CHUNK)))
        made = cls(path, rows, source)
        made.of = block
        made.block.erase(np.flatnonzero(subject_N == GONE))
        made.seal(range(made._chunks))
        return made

    def shared(self) -> Block:
        """The vectors of the file; the other columns, by which the file's own rows are found, are copies."""
        return Block(self.block.vectors_NE, self.block.subject_N.copy(), self.block.sample_N.copy(), None)

    def _digest(self, chunk: int) -> bytes:
        part, block = slice(chunk * CHUNK, min(self.rows, (chunk + 1) * CHUNK)), self.block
        digest = hashlib.sha256(b"%b/%d" % (self._salt, chunk))
        for array in (block.vectors_NE, block.subject_N, block.sample_N):
            digest.update(array[part].data)
        return digest.digest()

    def seal(self, chunks: Sequence[int]) -> None:
        for chunk in chunks:
            self._digests[chunk] = np.frombuffer(self._digest(chunk), np.uint8)

    def check(self) -> None:
        """Raises Unusable where its content is not what was written."""
        for chunk in range(self._chunks):
            if self._digests[chunk].tobytes() != self._digest(chunk):
                raise Unusable(f"'{self.path}' does not have its checksum")

    def erase(self, find: Find) -> bool:
        """Overwrite these rows; whether there were any."""
        gone = find(self.block, self.rows)
        if len(gone):
            self.block.erase(gone)
            self.seal(np.unique(gone // CHUNK).tolist())
        return bool(len(gone))

    def relabel(self, old: int, new: int) -> None:
        """Give the rows of one subject to another."""
        rows = np.flatnonzero(self.block.subject_N == old)
        self.block.subject_N[rows] = new
        self.seal(np.unique(rows // CHUNK).tolist())

    def rest(self) -> None:
        for advice in (mmap.MADV_DONTNEED, mmap.MADV_RANDOM):
            self._map.madvise(advice)

    def flush(self) -> None:
        with self.path.open("rb") as file:
            os.fdatasync(file.fileno())


class Snapshot:
    """The files of one store's index. Methods may be called from several threads; one at a time writes.

    Attributes:
        revision: of the store, from which on its changes have to be added; None where there is no snapshot.
    """

    def __init__(self, store: Path, source: Source) -> None:
        self.folder, self._source = snapshot_path(store), source
        self.revision: int | None = None
        self._lock = threading.Lock()  # held while a file is made, overwritten or removed
        self._files: list[_File] = []  # all that there are, also those that index.json does not name yet

    def open(self, threads: int) -> list[tuple[Block, int]]:
        """The blocks of the snapshot and their rows, mapped, every byte checked.

        Empty where there is none, or none that can be used: that one is dropped, and the log says why.

        Raises:
            UserError: nor can it be removed.
        """
        try:
            files, revision = self._read()
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(_File.check, files))
            for file in files:
                last = file is files[-1] and file.rows < block_rows(self._source.width)
                file.of = _with_room(file.block) if last else file.shared()
        except FileNotFoundError:
            self.drop("")
        except (OSError, Unusable, ValueError, KeyError, TypeError) as error:
            try:
                self.drop(f"{type(error).__name__}: {error}")
            except OSError as refusal:
                raise UserError(
                    f"the snapshot '{self.folder}' can neither be used ({error}) nor removed ({refusal}); remove it"
                ) from refusal
        else:
            self._files, self.revision = files, revision
            self._sweep()
        return [(file.of, file.rows) for file in self._files]

    def _read(self) -> tuple[list[_File], int]:
        found: dict[str, Any] = json.loads((self.folder / INDEX).read_bytes())
        if found.pop("checksum") != _checksum(found) or found["format"] != FORMAT:
            raise Unusable(f"'{self.folder / INDEX}' does not have its checksum, or is of another version")
        if found["source"] != asdict(self._source):
            raise Unusable(f"'{self.folder}' is of another store, model or cohort")
        files = [_File(self.folder / Path(name).name, rows, self._source) for name, rows in found["blocks"]]
        return files, int(found["revision"])

    def write(self, parts: Sequence[tuple[Block, int]], revision: int, stopping: Callable[[], bool]) -> list[Mapped]:
        """Write what an index held at a revision; the blocks that went into new files, and their vectors there.

        Blocks that are in a file already stay in it. Nothing is changed where `stopping` returns true.

        Raises:
            OSError: the disk refused; the snapshot before stays.
        """
        self.folder.mkdir(mode=0o700, exist_ok=True)
        before, chosen = list(self._files), list[_File]()
        try:
            for block, rows in parts:
                file = next((one for one in before if one.of is block and one.rows == rows), None)
                if file is None:
                    if stopping():
                        return []
                    path = self.folder / f"{os.urandom(8).hex()}.block"
                    with self._lock:  # what is erased meanwhile is overwritten in the file, too, as soon as it is there
                        file = _File.make(path, self._source, block, rows)
                        self._files.append(file)
                    file.flush()
                chosen.append(file)
            sync(self.folder)
            with self._lock:
                self._publish(chosen, revision)
                before, self.revision = chosen, revision
        finally:
            with self._lock:
                self._files = before
                self._sweep()
        return [(file.of, file.block.vectors_NE) for file in chosen if file.rows == len(file.of)]

    def _publish(self, files: Sequence[_File], revision: int) -> None:
        blocks = [(file.path.name, file.rows) for file in files]
        found = {"format": FORMAT, "source": asdict(self._source), "revision": revision, "blocks": blocks}
        write_file(self.folder / INDEX, json.dumps(found | {"checksum": _checksum(found)}))
        (self.folder / INDEX).chmod(0o600)

    def erase(self, find: Find) -> None:
        """Overwrite rows in every file. They are off the disk when this returns, or the snapshot is.

        Raises:
            OSError: neither can be done.
        """
        with self._lock:
            try:
                for file in self._files:
                    if file.erase(find):
                        file.flush()
                return
            except OSError as error:
                reason = str(error)
        self.drop(reason)

    def relabel(self, old: int, new: int) -> None:
        """Give the rows of one subject to another, so that they are found when that one is erased."""
        with self._lock:
            for file in self._files:
                file.relabel(old, new)

    def rest(self) -> None:
        """Give up the memory of the mapped pages, until they are read again, one by one."""
        with self._lock:
            for file in self._files:
                file.rest()

    def drop(self, reason: str) -> None:
        """Remove all files; the log tells the reason, if there is one. Raises OSError where the disk refuses."""
        with self._lock:
            self._files, self.revision = [], None
            if self.folder.is_dir():
                (self.folder / INDEX).unlink(missing_ok=True)
                shutil.rmtree(self.folder)
        if reason:
            log.warning("the snapshot of the index is not used, and removed: %s", reason)

    def _sweep(self) -> None:
        """Remove files that do not belong to the snapshot: a kill left them, or the next one replaced them."""
        kept = {file.path.name for file in self._files} | {INDEX}
        for path in self.folder.iterdir():
            if path.name not in kept:
                path.unlink()


def _with_room(block: Block) -> Block:
    """In memory, to be added to."""
    width, rows = block.vectors_NE.shape[1], len(block)
    copy = Block.empty(block_rows(width, rows), width, None)
    copy.put(0, block.subject_N, block.sample_N, block.vectors_NE)
    return copy


def _checksum(found: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
