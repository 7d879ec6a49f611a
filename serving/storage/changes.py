"""What is said of a gallery's subjects, and of a change to them: what there is, what was done, or why not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Metadata = Mapping[str, str | int | float | bool]  # see `serving.storage.metadata`


class StoreError(Exception):
    """The disk or the database failed. Nothing that was acknowledged is lost; what was asked is not acknowledged."""


class KeyReused(ValueError):
    """An idempotency key came again with another request."""


class SubjectUnknown(LookupError):
    """No subject of that id is enrolled."""


class SampleUnknown(LookupError):
    """The subject has no sample of that id."""


class LastSample(ValueError):
    """The subject would be left without a sample."""


ANOTHERS = -1  # a revision that no subject is at: the caller read it from another store


class RevisionConflict(ValueError):
    """The subject was changed since the caller read it. `revision`: at which it is."""

    def __init__(self, subject_id: str, revision: int, expected: int) -> None:
        sent = "one of another collection" if expected == ANOTHERS else expected
        super().__init__(
            f"subject '{subject_id}' is at revision {revision}, not {sent}: it was changed meanwhile; read it "
            "again, and send the change with its new revision"
        )
        self.revision = revision


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


@dataclass(frozen=True)
class Attached:
    """What is enrolled along with vectors. Each sequence has one entry a vector, or none at all.

    Attributes:
        metadata: the subject's, in place of what it has; None: leave that alone.
        qualities: of the samples, any finite number or None; what they mean is the caller's.
        samples: the samples' own metadata.
        images: what the vectors were made of, as it was sent.
    """

    metadata: Metadata | None = None
    qualities: Sequence[float | None] = ()
    samples: Sequence[Metadata] = ()
    images: Sequence[bytes | None] = ()


@dataclass(frozen=True)
class Enrolment:
    """What an enrolment did. `gallery_size` counts subjects, right after it; `replayed`: it was done before.

    `revision`: of the gallery, and so of the subject, right after it. `number`: the subject's, see `SubjectRow`.
    """

    subject_id: str
    sample_ids: list[str]
    subject_created: bool
    subject_samples: int
    gallery_size: int
    replayed: bool = False
    revision: int = 0
    number: int = 0


@dataclass(frozen=True)
class BulkEnrolment:
    """What the enrolment of many did, item by item. The items' own `gallery_size` is not counted."""

    results: tuple[Enrolment | SubjectFull, ...]
    gallery_size: int
    replayed: bool = False
    revision: int = 0

    def to_remember(self) -> dict[str, Any]:
        """Without the subjects' names."""
        items = [
            one.numbers if isinstance(one, SubjectFull) else (one.sample_ids, one.subject_created, one.subject_samples)
            for one in self.results
        ]
        return {"items": items, "gallery_size": self.gallery_size, "revision": self.revision}

    @classmethod
    def remembered(cls, found: dict[str, Any], subject_ids: Sequence[str]) -> "BulkEnrolment":
        results, size, revision = list[Enrolment | SubjectFull](), found["gallery_size"], found.get("revision", 0)
        for subject_id, (first, second, third) in zip(subject_ids, found["items"], strict=True):
            if isinstance(first, int):
                results.append(SubjectFull(subject_id, first, second, third))
            else:
                results.append(Enrolment(subject_id, first, second, third, size, True, revision))
        return cls(tuple(results), size, True, revision)


@dataclass(frozen=True)
class Deletion:
    """What a deletion did."""

    subject_id: str
    samples: int
    replayed: bool = False


@dataclass(frozen=True)
class Update:
    """What a change of a subject did, or of one of its samples: how many it has then, and at which revision it is."""

    subject_id: str
    samples: int
    revision: int
    replayed: bool = False


@dataclass(frozen=True)
class SubjectRow:
    """A line of the list of subjects.

    Attributes:
        position: the subject's number. Orders the list, and is where the next page starts after. Never given twice.
        samples: how many.
        revision: of the gallery, at the subject's last change.
    """

    position: int
    subject_id: str
    samples: int
    created: str
    updated: str
    revision: int
    metadata: Metadata


@dataclass(frozen=True)
class SampleRow:
    """What is known of a sample but its vector. `image`: whether its image was kept."""

    sample_id: str
    created: str
    quality: float | None
    metadata: Metadata
    image: bool


@dataclass(frozen=True)
class Changed:
    """A subject that was changed, or erased: then its name is None."""

    number: int
    subject_id: str | None


@dataclass(frozen=True)
class State:
    """How much a gallery holds, and the number of changes it has been through."""

    subjects: int
    samples: int
    revision: int
