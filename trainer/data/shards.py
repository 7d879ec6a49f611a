"""Writes the shards of a split: WebDataset tars that are byte-identical for the same samples."""

import hashlib
import json
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from webdataset import TarWriter

from trainer.data.manifest import ShardEntry

# Enough for reading in long runs (120 MB of 112 x 112 faces as JPEG), few enough to deal shards out evenly.
SAMPLES_PER_SHARD = 10_000
MAX_SHARD_BYTES = 2**30


class SplitWriter:
    """Writes `<split>-000000.tar`, `<split>-000001.tar`, ... into a folder.

    A sample is three files: `<key>.cls` (the label, decimal), `<key>.json` (name of its source and its identity) and
    `<key>.png` or `<key>.jpg`. The key is the sample's number in the split. Times, owners and modes are fixed, members
    are in order of their names, and JSON is canonical: the same samples give the same bytes.
    """

    def __init__(self, folder: Path, split: str, samples_per_shard: int = SAMPLES_PER_SHARD) -> None:
        self._folder = folder
        self._split = split
        self._samples_per_shard = samples_per_shard
        self._shard: _Shard | None = None
        self._samples = 0
        self.entries: list[ShardEntry] = []

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()

    def write(self, image: bytes, suffix: str, label: int, identity: str, name: str) -> None:
        """Append one sample; `suffix` is "png" or "jpg" and says what `image` holds."""
        shard = self._shard
        if shard is not None and (shard.samples >= self._samples_per_shard or shard.file.bytes >= MAX_SHARD_BYTES):
            self._finish()
            shard = None
        if shard is None:
            shard = self._shard = _Shard(self._folder / f"{self._split}-{len(self.entries):06d}.tar")
        description = json.dumps({"identity": identity, "name": name}, sort_keys=True, separators=(",", ":"))
        key = f"{self._samples:09d}"
        shard.write({"__key__": key, "cls": str(label).encode(), "json": description.encode(), suffix: image})
        self._samples += 1

    def _finish(self) -> None:
        if self._shard is not None:
            self.entries.append(self._shard.close())
            self._shard = None


class _DigestingFile:
    """A file that counts and digests what is written to it."""

    def __init__(self, path: Path) -> None:
        self.bytes = 0
        self.digest = hashlib.sha256()
        self._file: BinaryIO = path.open("wb")

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.bytes += len(data)
        return self._file.write(data)

    def close(self) -> None:
        self._file.close()


class _Shard:
    """One tar on its way to the disk."""

    def __init__(self, path: Path) -> None:
        self.samples = 0
        self.file = _DigestingFile(path)
        self._name = path.name
        # `encoder=False`: we hand over bytes, and no encoder (one of them pickles) may touch them.
        self._tar = TarWriter(self.file, user="", group="", mode=0o644, mtime=0, encoder=False)

    def write(self, sample: dict[str, str | bytes]) -> None:
        self._tar.write(sample)
        self.samples += 1

    def close(self) -> ShardEntry:
        self._tar.close()
        self.file.close()
        digest = self.file.digest.hexdigest()
        return ShardEntry(name=self._name, samples=self.samples, bytes=self.file.bytes, sha256=digest)
