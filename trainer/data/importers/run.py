"""Import: from a Source of any kind to a finished data set."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL

from trainer.atomic import Kind, fresh_folder
from trainer.data.image import decode
from trainer.data.importers import Source
from trainer.data.importers.folder import open_folder
from trainer.data.importers.glyphs import open_glyphs
from trainer.data.importers.omniglot import open_omniglot
from trainer.data.index import Progress
from trainer.data.manifest import MANIFEST_FILE, BadSample, Manifest, ShardEntry, Split
from trainer.data.reader import ahead
from trainer.data.shards import SAMPLES_PER_SHARD, SplitWriter
from trainer.errors import UserError

KINDS = ("omniglot", "folder", "glyphs")
_KEPT = {"PNG": "png", "JPEG": "jpg"}  # formats whose bytes go into the shard as they are
_SHUFFLE = 0x5A0F
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
        manifest = _Import(opened, folder, options, progress).run()
        manifest.write(folder)
    return manifest


def _open(
    kind: str, source: Path | None, options: ImportOptions, progress: Progress | None
) -> AbstractContextManager[Source]:
    if kind == "omniglot":
        return open_omniglot(source, options.holdout_alphabets, options.seed, progress)
    if kind == "folder":
        return open_folder(source, options.holdout_share, options.seed)
    if kind == "glyphs":
        return open_glyphs(options.holdout_share, options.seed)
    raise UserError(f"--kind {kind} is not known; allowed: {', '.join(KINDS)}")


@dataclass(frozen=True, slots=True)
class _Checked:
    """A file that was read whole, in the form in which it is stored."""

    data: bytes
    suffix: str
    grey: bool


@dataclass(slots=True)
class _Tally:
    """What one pass over the samples found."""

    counts: Counter[str] = field(default_factory=Counter)
    grey: bool = True
    duplicates: int = 0


class _Import:
    """One import. Memory: the list of samples (about 200 bytes each) and the few images in flight."""

    def __init__(self, source: Source, folder: Path, options: ImportOptions, progress: Progress | None) -> None:
        self._source = source
        self._folder = folder
        self._options = options
        self._progress = progress
        self._bad: dict[int, str] = {}
        self._done = 0  # samples of this pass that were read, for the progress

    def run(self) -> Manifest:
        """Write the splits; again, without them, if identities turn out to have too few readable images."""
        counts = Counter(sample.identity for sample in self._source.samples)
        left_out: set[str] = set()
        while True:
            left_out |= {name for name, count in counts.items() if count < self._options.min_samples}
            kept = sorted(counts.keys() - left_out)
            classes = self._split_classes(kept)
            self._done = len(self._bad)
            tally = _Tally(Counter(dict.fromkeys(kept, 0)))
            shards = {name: self._write_split(name, chosen, tally) for name, chosen in classes.items() if chosen}
            counts = tally.counts
            if min(counts.values()) >= self._options.min_samples:
                splits = {name: _split(classes[name], counts, entries) for name, entries in shards.items()}
                return self._manifest(splits, tally, len(left_out))
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

    def _write_split(self, split: str, classes: list[str], tally: _Tally) -> list[ShardEntry]:
        labels = {name: label for label, name in enumerate(classes)}
        rows = [i for i, sample in enumerate(self._source.samples) if sample.identity in labels]
        if split == "train":
            order = np.random.default_rng([self._options.seed, _SHUFFLE]).permutation(len(rows))
            rows = [rows[i] for i in order]
        seen: set[tuple[int, bytes]] = set()
        with SplitWriter(self._folder, split, self._options.samples_per_shard) as writer:
            for row, checked in self._read_all(rows):
                sample = self._source.samples[row]
                label = labels[sample.identity]
                if self._source.drop_duplicates:
                    digest = (label, hashlib.sha256(checked.data).digest())
                    if digest in seen:
                        tally.duplicates += 1
                        continue
                    seen.add(digest)
                writer.write(checked.data, checked.suffix, label, sample.identity, sample.name)
                tally.counts[sample.identity] += 1
                tally.grey &= checked.grey
        return writer.entries

    def _read_all(self, rows: list[int]) -> Iterator[tuple[int, _Checked]]:
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

    def _check(self, row: int) -> _Checked | str:
        """Decode one image wholly; an image that cannot be used comes back as the reason."""
        sample = self._source.samples[row]
        try:
            data = self._source.read(row)
            decoded = decode(data, sample.name)
        except UserError as error:
            return str(error)
        grey = decoded.image.mode == "L"
        if decoded.plain and decoded.format in _KEPT:
            return _Checked(data, _KEPT[decoded.format], grey)
        buffer = BytesIO()
        decoded.image.save(buffer, format="PNG")
        return _Checked(buffer.getvalue(), "png", grey)

    def _note_bad(self, row: int, reason: str) -> None:
        self._bad[row] = reason
        total = len(self._source.samples)
        if len(self._bad) > self._options.max_bad * total:
            first = "; ".join(list(self._bad.values())[:3])
            raise UserError(
                f"{len(self._bad)} or more of {total} images cannot be read, over the --max-bad "
                f"{self._options.max_bad:g} that is allowed ({first}); mend or remove them, or raise --max-bad"
            )

    def _manifest(self, splits: dict[str, Split], tally: _Tally, left_out: int) -> Manifest:
        samples = self._source.samples
        provenance = {
            **self._source.provenance,
            "seed": str(self._options.seed),
            "pillow": PIL.__version__,
            "duplicates_left_out": str(tally.duplicates),
            "identities_left_out": f"{left_out} with fewer than {self._options.min_samples} readable images",
        }
        return Manifest(
            kind=self._source.kind,
            image_mode="L" if tally.grey else "RGB",
            splits=splits,
            bad=[BadSample(name=samples[row].name, reason=self._bad[row]) for row in sorted(self._bad)],
            provenance=provenance,
        )


def _split(classes: list[str], counts: Counter[str], shards: list[ShardEntry]) -> Split:
    class_counts = [counts[name] for name in classes]
    return Split(samples=sum(class_counts), classes=classes, class_counts=class_counts, shards=shards)
