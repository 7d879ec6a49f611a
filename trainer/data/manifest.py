"""`manifest.json` of a data set: what its shards hold, so that nobody has to open them to know. Runs without torch.

A small file: the names and counts of the classes, and where each sample lies, are in tables and indexes beside it
(`trainer.data.tables`, `trainer.data.index`), in the manifest's own folder even where a shard lies elsewhere.
"""

import json
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, PrivateAttr, ValidationError, field_validator, model_validator
from pydantic_core import from_json

from trainer.atomic import write_file
from trainer.data.arrays import content_of_shape, described
from trainer.data.format1 import upgrade
from trainer.data.split import Split, SplitEntry
from trainer.data.store import CacheConfig, DataStore, open_store
from trainer.data.tables import Classes, plain_name
from trainer.errors import UserError
from trainer.strict import Strict

MANIFEST_FILE = "manifest.json"
_MAX_NAME = 64  # letters of a split's
_MAX_BYTES = 2**29  # of the file; one of format 1, with the names of 10M classes in it, has about half of that


class BadSample(Strict):
    """An image that was left out at import."""

    name: str
    reason: str


class Manifest(Strict):
    """A data set: a folder of shards, their indexes and tables, and this file. The splits' identities are disjoint."""

    format: Literal[2] = 2
    kind: str = Field(description="the importer: omniglot, folder, glyphs")
    image_mode: Literal["L", "RGB"] | None = None
    content: Literal["image", "vector", "spectrogram"] = "image"
    shape: list[PositiveInt] = Field(default_factory=list, description="of a vector or spectrogram")
    splits: dict[str, SplitEntry] = Field(min_length=1)
    bad: list[BadSample] = Field(default_factory=list, description="left out as unreadable")
    provenance: dict[str, str] = Field(default_factory=dict, description="source, seed, what was held out")
    _store: DataStore | None = PrivateAttr(None)
    _classes: dict[str, Classes] = PrivateAttr(default_factory=dict)  # of format 1

    @model_validator(mode="after")
    def _content(self) -> "Manifest":
        if (self.content == "image") != (self.image_mode is not None):
            raise ValueError(f"image_mode is {self.image_mode or 'null'}, but content is {self.content}")
        image = self.content == "image"
        if self.shape if image else content_of_shape(tuple(self.shape)) != self.content:
            raise ValueError(f"shape is {self.shape}, but content is {self.content}")
        return self

    @field_validator("splits")
    @classmethod
    def _names(cls, splits: dict[str, SplitEntry]) -> dict[str, SplitEntry]:
        for name in splits:
            if len(plain_name(name)) > _MAX_NAME:  # files are called by it
                raise ValueError(f"the name '{name[:_MAX_NAME]}...' is longer than {_MAX_NAME} letters")
        return splits

    @property
    def holds(self) -> str:
        """What its samples are, in words; what the `Form` that fits says it reads."""
        return described(self.content, self.shape)

    def __eq__(self, other: object) -> bool:
        """Whether they say the same, wherever they were read."""
        return isinstance(other, Manifest) and self.model_dump() == other.model_dump()

    @classmethod
    def read(cls, address: str | Path, cache: CacheConfig | None = None) -> "Manifest":
        """Read and check the manifest of the data set at an address: a folder, or what fsspec reads, in the cache.

        Raises:
            UserError: there is no finished data set, it cannot be fetched, or the file is malformed.
        """
        store = open_store(address, cache)
        where = f"{store.address}/{MANIFEST_FILE}"
        try:
            content = store.read_bytes(MANIFEST_FILE, _MAX_BYTES)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(
                f"'{store.address}' is not a data set: '{where}' is missing; make one with 'hypersphere data import'"
            ) from error
        except OSError as error:
            raise UserError(f"cannot read '{where}': {error.strerror}; make it readable") from error
        try:
            tree = from_json(content)
        except ValueError as error:
            raise UserError(f"'{where}' is not a data set's manifest: {error}; import the data again") from error
        return cls._of(tree, store, where)

    @classmethod
    def _of(cls, tree: object, store: DataStore, where: str) -> "Manifest":
        found = tree.get("format") if isinstance(tree, dict) else None
        if found not in (1, 2):
            raise UserError(
                f"'{where}' is not a data set's manifest of a known format: its format is {found!r}, and 1 and 2 are "
                "read; import the data again, or use the version that wrote it"
            )
        try:
            fields, classes = upgrade(tree) if found == 1 else (tree, {})
            manifest = cls.model_validate(fields)
        except ValidationError as error:
            fault = error.errors()[0]
            place = ".".join(map(str, fault["loc"])) or "the top"
            raise UserError(
                f"'{where}' is not a data set's manifest: {fault['msg']} at {place}; import the data again"
            ) from error
        manifest._store, manifest._classes = store, classes
        return manifest

    def write(self, folder: Path) -> None:
        """Write `<folder>/manifest.json` whole or not at all; the same manifest gives the same bytes."""
        text = json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False)
        write_file(folder / MANIFEST_FILE, text + "\n")

    def split(self, name: str) -> Split:
        """One split by name, of a manifest that was read.

        Raises:
            UserError: the data set has no such split.
        """
        if name not in self.splits:
            raise UserError(
                f"the data set has no split '{name}'; it has {', '.join(sorted(self.splits))}: "
                "name one of them, or import again with identities held out"
            )
        if self._store is None:
            raise ValueError("this manifest was not read from anywhere, so that its tables cannot be opened")
        return Split(name, self.splits[name], self._store, self._classes.get(name), self.holds)
