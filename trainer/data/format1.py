"""Manifests of format 1, which carry the classes' names and counts themselves. Runs without torch."""

from typing import Any, Literal

from pydantic import Field, model_validator

from trainer.data.split import ShardEntry
from trainer.data.tables import Classes
from trainer.strict import Strict


class Split1(Strict):
    """A split of format 1: `classes[label]` is the identity's name, `class_counts[label]` its number of samples."""

    samples: int = Field(ge=1)
    classes: list[str] = Field(min_length=2)
    class_counts: list[int]
    shards: list[ShardEntry] = Field(min_length=1)

    @model_validator(mode="after")
    def _sums(self) -> "Split1":
        if len(self.class_counts) != len(self.classes):
            raise ValueError(f"{len(self.classes)} classes, but {len(self.class_counts)} class_counts")
        if min(self.class_counts) < 1:
            raise ValueError(f"class '{self.classes[self.class_counts.index(min(self.class_counts))]}' has no sample")
        if sum(self.class_counts) != self.samples:
            raise ValueError(f"the class_counts sum to {sum(self.class_counts)}, but samples is {self.samples}")
        return self


class Manifest1(Strict):
    """A manifest of format 1."""

    format: Literal[1]
    kind: str
    image_mode: Literal["L", "RGB"]
    splits: dict[str, Split1] = Field(min_length=1)
    bad: list[Any] = Field(default_factory=list)
    provenance: dict[str, str] = Field(default_factory=dict)


def upgrade(tree: Any) -> tuple[dict[str, Any], dict[str, Classes]]:
    """What a manifest of format 1 says, as one of format 2 would; and the classes of each split.

    Raises:
        pydantic.ValidationError: it is malformed.
    """
    old = Manifest1.model_validate(tree)
    splits = {
        name: {"samples": split.samples, "identities": len(split.classes), "shards": split.shards}
        for name, split in old.splits.items()
    }
    classes = {name: Classes.of(split.classes, split.class_counts) for name, split in old.splits.items()}
    return {**old.model_dump(include={"kind", "image_mode", "bad", "provenance"}), "splits": splits}, classes
