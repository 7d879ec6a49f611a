"""What a store takes, gives and refuses."""

from dataclasses import dataclass


class StoreError(Exception):
    """The disk or the database failed. Nothing that was acknowledged is lost; what was asked is not acknowledged."""


class KeyReused(ValueError):
    """An idempotency key came again with another request."""


class SubjectUnknown(LookupError):
    """No subject of that id is enrolled."""


class SubjectFull(ValueError):
    """The subject would hold more samples than allowed."""


@dataclass(frozen=True)
class IdempotencyKey:
    """A client's key for one change, and the digest of the request that it stands for."""

    key: str
    request: bytes


@dataclass(frozen=True)
class Enrolment:
    """What an enrolment did. `gallery_size` counts subjects, right after it; `replayed`: it was done before."""

    subject_id: str
    sample_ids: tuple[str, ...]
    subject_created: bool
    subject_samples: int
    gallery_size: int
    replayed: bool = False


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
