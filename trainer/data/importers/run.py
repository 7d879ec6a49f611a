"""Import: from a Source of any kind to a finished data set, WebDataset tars and their manifest."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import BytesIO
from itertools import chain
from pathlib import Path

import numpy as np
import PIL
from webdataset import TarWriter

from trainer.atomic import Kind, fresh_folder
from trainer.data.image import decode
from trainer.data.importers import Sample, Source, open_folder
from trainer.data.importers.glyphs import open_glyphs
from trainer.data.importers.omniglot import open_omniglot
from trainer.data.index import make_index, write_index
from trainer.data.manifest import MANIFEST_FILE, BadSample, Manifest
from trainer.data.reader import Progress, ahead
from trainer.data.split import ShardEntry, index_shard, write_split
from trainer.errors import UserError

# Enough for reading in long runs (120 MB of 112 x 112 faces as JPEG), few enough to deal shards out evenly.
SAMPLES_PER_SHARD = 10_000
MAX_SHARD_BYTES = 2**30
_KEPT = {"PNG": "png", "JPEG": "jpg"}  # formats whose bytes go into the shard as they are
_SHUFFLE = 0x5A0F
_ANY_LABEL = 2**32
_THREADS = min(4, os.cpu_count() or 1)
_DATA_SET = Kind("a data set", MANIFEST_FILE)


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """How to import; see `hypersphere data import --help`."""

    holdout_alphabets: int | None = None
    holdout_share: float = 0.1
    max_bad: float = 0.01
    min_samples: int = 1
    seed: int = 0
    samples_per_shard: int = SAMPLES_PER_SHARD
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name, value, allowed, valid in (
            ("--max-bad", self.max_bad, "a share from 0 to 1", 0 <= self.max_bad <= 1),
            ("--holdout-share", self.holdout_share, "a share from 0 to 1", 0 <= self.holdout_share <= 1),
            ("--min-samples", self.min_samples, "1 or more", self.min_samples >= 1),
            ("--seed", self.seed, "0 or more", self.seed >= 0),
            ("--samples-per-shard", self.samples_per_shard, "1 or more", self.samples_per_shard >= 1),
        ):
            if not valid:
                raise UserError(f"{name} {value} is not allowed; give {allowed}")


def run_import(
    kind: str, source: Path | None, out: Path, options: ImportOptions | None = None, progress: Progress | None = None
) -> Manifest:
    """Import a data set into the new folder `out`: shards and `manifest.json`, whole or not at all.

    The same input, options and image library give byte-identical shards. Train samples lie in an order shuffled by
    the seed, so that a shard is a mixture of identities. Unreadable images are left out and named in the manifest.

    Args:
        kind: omniglot, folder or glyphs.
        source: what to read; None where the kind needs none (glyphs) or knows where to find it (omniglot).
        progress: called with a stage ("download", "import"), what is done and what there is to do.

    Raises:
        UserError: the source cannot be used, too many images are unreadable, fewer than two identities are left, or
            `out` exists.
    """
    options = options or ImportOptions()
    with fresh_folder(out, _DATA_SET, options.overwrite) as folder, _open(kind, source, options, progress) as opened:
        manifest = _Import(opened, folder, options, progress).run(kind)
        manifest.write(folder)
    return Manifest.read(out)


def _open(
    kind: str, source: Path | None, options: ImportOptions, progress: Progress | None
) -> AbstractContextManager[Source]:
    match kind:
        case "omniglot":
            return open_omniglot(source, options.holdout_alphabets, options.seed, progress)
        case "folder":
            return open_folder(source, options.holdout_share, options.seed)
        case "glyphs":
            return open_glyphs(options.holdout_share, options.seed)
    raise UserError(f"--kind {kind} is not known; allowed: omniglot, folder, glyphs")


class _Import:
    """One import. Memory: the list of samples (about 200 bytes each) and the few images in flight."""

    def __init__(self, source: Source, folder: Path, options: ImportOptions, progress: Progress | None) -> None:
        self._source = source
        self._folder = folder
        self._options = options
        self._progress = progress
        self._bad: dict[int, str] = {}
        # of the present pass over the samples
        self._counts = Counter(sample.identity for sample in source.samples)
        self._done = self._duplicates = 0
        self._grey = True

    def run(self, kind: str) -> Manifest:
        """Write the splits; again, without them, if identities turn out to have too few readable images."""
        left_out: set[str] = set()
        while True:
            left_out |= {name for name, count in self._counts.items() if count < self._options.min_samples}
            kept = sorted(self._counts.keys() - left_out)
            classes = self._split_classes(kept)
            self._counts = Counter(dict.fromkeys(kept, 0))
            self._done, self._duplicates, self._grey = len(self._bad), 0, True
            splits = {name: self._write_split(name, chosen) for name, chosen in classes.items() if chosen}
            if min(self._counts.values()) >= self._options.min_samples:
                return self._manifest(kind, splits, len(left_out))
            for path in self._folder.iterdir():
                path.unlink()

    def _split_classes(self, kept: list[str]) -> dict[str, list[str]]:
        classes = {
            "train": [name for name in kept if name not in self._source.held_out],
            "val": [name for name in kept if name in self._source.held_out],
        }
        for split, chosen in classes.items():
            if len(chosen) == 1 or not kept:
                found = f"{len(chosen)} in the {split} split" if kept else "none at all"
                raise UserError(
                    f"the import needs at least 2 identities with {self._options.min_samples} or more readable images "
                    f"in every split and found {found}; give more identities, or hold out a different number"
                )
        return classes

    def _write_split(self, split: str, classes: list[str]) -> tuple[list[str], list[ShardEntry]]:
        labels = {name: label for label, name in enumerate(classes)}
        rows = [i for i, sample in enumerate(self._source.samples) if sample.identity in labels]
        if split == "train":
            order = np.random.default_rng([self._options.seed, _SHUFFLE]).permutation(len(rows))
            rows = [rows[i] for i in order]
        samples = self._stored(rows, labels)
        return classes, write_shards(self._folder, split, samples, self._options.samples_per_shard)

    def _stored(self, rows: list[int], labels: dict[str, int]) -> Iterator[tuple[bytes, str, int, Sample]]:
        """What `write_shards` takes of the readable images, without duplicates; counts what it finds."""
        seen: set[tuple[int, bytes]] = set()
        for row, (data, suffix, grey) in self._read_all(rows):
            sample = self._source.samples[row]
            label = labels[sample.identity]
            if self._source.drop_duplicates:
                digest = (label, hashlib.sha256(data).digest())
                if digest in seen:
                    self._duplicates += 1
                    continue
                seen.add(digest)
            self._counts[sample.identity] += 1
            self._grey &= grey
            yield data, suffix, label, sample

    def _read_all(self, rows: list[int]) -> Iterator[tuple[int, tuple[bytes, str, bool]]]:
        """The readable images of the rows, in order; the others go to the list of bad ones."""
        total = len(self._source.samples)
        rows = [row for row in rows if row not in self._bad]
        # Decoding frees the interpreter's lock, so that threads help.
        found = ahead(self._check, rows, threads=_THREADS, most=8 * _THREADS)
        for row, checked in zip(rows, found, strict=True):
            if isinstance(checked, str):
                self._note_bad(row, checked)
            else:
                yield row, checked
            self._done += 1
            if self._progress is not None and (self._done % 64 == 0 or self._done == total):
                self._progress("import", self._done, total)

    def _check(self, row: int) -> tuple[bytes, str, bool] | str:
        """Decode one image wholly: the bytes to store, their suffix, is it grey; or why it cannot be used."""
        try:
            data = self._source.read(row)
            decoded = decode(data, self._source.samples[row].name)
        except UserError as error:
            return str(error)
        grey = decoded.image.mode == "L"
        if decoded.plain and decoded.format in _KEPT:
            return data, _KEPT[decoded.format], grey
        buffer = BytesIO()
        decoded.image.save(buffer, format="PNG")
        return buffer.getvalue(), "png", grey

    def _note_bad(self, row: int, reason: str) -> None:
        self._bad[row] = reason
        total = len(self._source.samples)
        if len(self._bad) > self._options.max_bad * total:
            first = "; ".join(list(self._bad.values())[:3])
            raise UserError(
                f"{len(self._bad)} or more of {total} images cannot be read, over the --max-bad "
                f"{self._options.max_bad:g} that is allowed ({first}); mend or remove them, or raise --max-bad"
            )

    def _manifest(self, kind: str, splits: dict[str, tuple[list[str], list[ShardEntry]]], left_out: int) -> Manifest:
        counts = {name: [self._counts[identity] for identity in classes] for name, (classes, _) in splits.items()}
        return Manifest(
            kind=kind,
            image_mode="L" if self._grey else "RGB",
            splits={
                name: write_split(self._folder, name, classes, np.array(counts[name], np.int64), shards)
                for name, (classes, shards) in splits.items()
            },
            bad=[BadSample(name=self._source.samples[row].name, reason=self._bad[row]) for row in sorted(self._bad)],
            provenance={
                **self._source.provenance,
                "seed": str(self._options.seed),
                "pillow": PIL.__version__,
                "duplicates_left_out": str(self._duplicates),
                "identities_left_out": f"{left_out} with fewer than {self._options.min_samples} readable images",
            },
        )


def write_shards(
    folder: Path,
    split: str,
    samples: Iterable[tuple[bytes, str, int, Sample]],
    samples_per_shard: int = SAMPLES_PER_SHARD,
) -> list[ShardEntry]:
    """Write `<split>-000000.tar`, `<split>-000001.tar`, ... into a folder, each with a sample or more and its index.

    A sample is three files: `<key>.cls` (the label, decimal), `<key>.json` (name of its source and its identity) and
    `<key>.png` or `<key>.jpg`. The key is the sample's number in the split. Times, owners and modes are fixed, members
    are in order of their names, and JSON is canonical: the same samples give the same bytes.

    Args:
        samples: file of the image, its suffix ("png" or "jpg"), label, source.
    """
    entries: list[ShardEntry] = []
    numbered = enumerate(samples)
    for first in numbered:
        path = folder / f"{split}-{len(entries):06d}.tar"
        # `encoder=False`: we hand over bytes, and no encoder (one of them pickles) may touch them.
        with path.open("wb") as file, TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as tar:
            for written, (number, (image, suffix, label, sample)) in enumerate(chain([first], numbered), 1):
                description = {"identity": sample.identity, "name": sample.name}
                text = json.dumps(description, sort_keys=True, separators=(",", ":"))
                tar.write({"__key__": f"{number:09d}", "cls": b"%d" % label, "json": text.encode(), suffix: image})
                if written == samples_per_shard or file.tell() >= MAX_SHARD_BYTES:
                    break
        with path.open("rb") as shard:
            digest = hashlib.file_digest(shard, "sha256").hexdigest()
        entry = ShardEntry(name=path.name, samples=written, bytes=path.stat().st_size, sha256=digest)
        records = index_shard(path, entry, _ANY_LABEL).records
        index = make_index(records, sum(done.samples for done in entries), entry.bytes)
        entries.append(entry.model_copy(update={"index_sha256": write_index(folder / entry.index_file, index)}))
    return entries
