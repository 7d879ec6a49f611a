"""`manifest.json` of a data set: what its shards hold, so that nobody has to open them to know. Runs without torch."""

import json
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from trainer.atomic import write_file
from trainer.errors import UserError
from trainer.strict import Strict

MANIFEST_FILE = "manifest.json"


class ShardEntry(Strict):
    """One tar file. `bytes` and `sha256` are of the whole file."""

    name: str
    samples: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @field_validator("name")
    @classmethod
    def _inside_the_folder(cls, value: str) -> str:
        if value != PurePosixPath(value).name or value in ("", ".", ".."):
            raise ValueError(f"shard name '{value}' must be a plain file name")
        return value


class Split(Strict):
    """Samples of one use. Labels count from 0 within the split: `classes[label]` is the identity's name."""

    samples: int = Field(ge=1)
    classes: list[str] = Field(min_length=2)
    class_counts: list[int] = Field(description="samples of each class")
    shards: list[ShardEntry] = Field(min_length=1)

    @model_validator(mode="after")
    def _sums(self) -> "Split":
        if len(self.class_counts) != len(self.classes):
            raise ValueError(f"{len(self.classes)} classes, but {len(self.class_counts)} class_counts")
        if min(self.class_counts) < 1:
            raise ValueError(f"class '{self.classes[self.class_counts.index(min(self.class_counts))]}' has no sample")
        totals = {"class_counts": sum(self.class_counts), "shards": sum(shard.samples for shard in self.shards)}
        for what, total in totals.items():
            if total != self.samples:
                raise ValueError(f"the {what} sum to {total}, but samples is {self.samples}")
        return self


class BadSample(Strict):
    """An image that was left out at import."""

    name: str
    reason: str


class Manifest(Strict):
    """A data set: a folder of shards and this file. The identities of two splits are disjoint."""

    format: Literal[1] = 1
    kind: str = Field(description="the importer: omniglot, folder, glyphs")
    image_mode: Literal["L", "RGB"]
    splits: dict[str, Split] = Field(min_length=1)
    bad: list[BadSample] = Field(default_factory=list, description="left out as unreadable")
    provenance: dict[str, str] = Field(default_factory=dict, description="source, seed, what was held out")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read and check `<folder>/manifest.json`.

        Raises:
            UserError: the folder is not a finished data set, or the file is malformed.
        """
        path = folder / MANIFEST_FILE
        try:
            return cls.model_validate_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(
                f"'{folder}' is not a data set: '{path}' is missing; make one with 'hypersphere data import'"
            ) from error
        except OSError as error:
            raise UserError(f"cannot read '{path}': {error.strerror}; make it readable") from error
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(map(str, fault["loc"])) or "the top"
            raise UserError(
                f"'{path}' is not a data set's manifest: {fault['msg']} at {where}; import the data again"
            ) from error

    def write(self, folder: Path) -> None:
        """Write `<folder>/manifest.json` whole or not at all; the same manifest gives the same bytes."""
        text = json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False)
        write_file(folder / MANIFEST_FILE, text + "\n")

    def split(self, name: str) -> Split:
        """One split by name.

        Raises:
            UserError: the data set has no such split.
        """
        if name not in self.splits:
            raise UserError(
                f"the data set has no split '{name}'; it has {', '.join(sorted(self.splits))}: "
                "name one of them, or import again with identities held out"
            )
        return self.splits[name]
