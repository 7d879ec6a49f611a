"""The service's JSON: what is told of collections, jobs, and the service itself."""

from typing import Literal

from pydantic import BaseModel, Field


class CollectionFacts(BaseModel):
    """A collection: a gallery of its own, pinned to a model."""

    name: str
    model_id: str
    dimension: int
    state: Literal["loading", "ready", "rebuilding", "failed"]
    subjects: int
    samples: int
    revision: int = Field(description="changes that it has been through")


class CollectionAnswer(CollectionFacts):
    """A collection."""

    request_id: str


class CollectionsAnswer(BaseModel):
    """The collections, by name."""

    collections: list[CollectionFacts]
    request_id: str


class DuplicateAnswer(BaseModel):
    """Two subjects, and the best score of a sample of the one and a sample of the other."""

    subject_ids: tuple[str, str]
    score: float


class JobFacts(BaseModel):
    """A job, and how far it is."""

    job_id: str
    collection: str
    state: Literal["waiting", "running", "done", "failed", "cancelled"]
    done: int = Field(description="samples that have been searched for")
    total: int
    threshold: float
    created: str = Field(description="UTC, ISO 8601")
    error: str | None = Field(description="why it failed")


class JobAnswer(JobFacts):
    """A job with what it has found so far."""

    pairs: list[DuplicateAnswer] = Field(description="highest score first")
    truncated: bool = Field(description="there are more pairs than were asked for")
    request_id: str


class JobsAnswer(BaseModel):
    """Jobs in the order in which they were asked for."""

    jobs: list[JobFacts]
    request_id: str


class ReadyAnswer(BaseModel):
    """The service can answer. What it holds is told to those who have the key."""

    status: Literal["ready"] = "ready"
    gallery_size: int | None = None
    samples: int | None = None
    revision: int | None = Field(None, description="changes that the gallery has been through")
    model_id: str | None = None
    collections: int | None = Field(None, description="the other numbers are of the collection `default`")
    faults: dict[str, str] | None = Field(None, description="collections that have failed and take no change, and why")
    request_id: str


class HealthAnswer(BaseModel):
    """The process is alive."""

    status: Literal["alive"] = "alive"
