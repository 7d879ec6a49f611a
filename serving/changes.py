"""What is said of a change to a gallery, by its store and by everyone above: what was done, or why not."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class StoreError(Exception):
    """The disk or the database failed. Nothing that was acknowledged is lost; what was asked is not acknowledged."""


class KeyReused(ValueError):
    """An idempotency key came again with another request."""


class SubjectUnknown(LookupError):
    """No subject of that id is enrolled."""


class SubjectFull(ValueError):
    """The subject holds `held` samples, and `more` would be more than the `most` allowed."""

    def __init__(self, subject_id: str, held: int, more: int, most: int) -> None:
        super().__init__(
            f"subject '{subject_id}' holds {held} samples and {more} more were sent; "
            f"at most {most} are allowed: send fewer, or delete the subject first"
        )
        self.numbers = held, more, most


@dataclass(frozen=True)
class IdempotencyKey:
    """A client's key for one change, and the digest of the request that it stands for."""

    key: str
    request: bytes


class Piece(NamedTuple):
    """Samples: of each its subject's name, its UUID's 16 bytes, its vector, and its subject's number."""

    subject_ids: list[str]
    sample_ids: list[bytes]
    vectors_BD: NDArray[np.float32]
    numbers_B: NDArray[np.int64]


@dataclass(frozen=True)
class Enrolment:
    """What an enrolment did. `gallery_size` counts subjects, right after it; `replayed`: it was done before, and the
    subject's `number` is not known."""

    subject_id: str
    sample_ids: list[str]
    subject_created: bool
    subject_samples: int
    gallery_size: int
    replayed: bool = False
    number: int = 0


@dataclass(frozen=True)
class BulkEnrolment:
    """What the enrolment of many did, item by item. The items' own `gallery_size` is not counted."""

    results: tuple[Enrolment | SubjectFull, ...]
    gallery_size: int
    replayed: bool = False

    def to_remember(self) -> dict[str, Any]:
        """Without the subjects' names."""
        items = [
            one.numbers if isinstance(one, SubjectFull) else (one.sample_ids, one.subject_created, one.subject_samples)
            for one in self.results
        ]
        return {"items": items, "gallery_size": self.gallery_size}

    @classmethod
    def remembered(cls, found: dict[str, Any], subject_ids: Sequence[str]) -> "BulkEnrolment":
        results, size = list[Enrolment | SubjectFull](), found["gallery_size"]
        for subject_id, (first, second, third) in zip(subject_ids, found["items"], strict=True):
            if isinstance(first, int):
                results.append(SubjectFull(subject_id, first, second, third))
            else:
                results.append(Enrolment(subject_id, first, second, third, size))
        return cls(tuple(results), size, True)


@dataclass(frozen=True)
class Deletion:
    """What a deletion did."""

    subject_id: str
    samples: int
    replayed: bool = False


@dataclass(frozen=True)
class SubjectRow:
    """A line of the list of subjects. `position` orders the list and is where the next page starts after."""

    position: int
    subject_id: str
    samples: int
    created: str


@dataclass(frozen=True)
class State:
    """How much a gallery holds, and the number of changes it has been through."""

    subjects: int
    samples: int
    revision: int
