"""The service's JSON: what requests carry. Unknown keys are errors, and faults do not repeat the values."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import from_json

from serving.access.scopes import COLLECTION
from serving.wire.parsing import PATTERN

SubjectId = Annotated[
    str,
    Field(
        description="1 to 128 characters, without slashes, control characters, or space at the ends; of spellings that "
        "look the same only the NFKC form is enrolled",
        json_schema_extra={"pattern": PATTERN},
    ),
]
Embedding = Annotated[
    list[Annotated[float, Field(allow_inf_nan=False)]],
    Field(
        min_length=1,
        max_length=8192,
        fail_fast=True,  # an object for every fault of a long list would take more memory than the list
        description="unit vector of the model's dimension, as POST /v1/embed gives",
    ),
]
Embeddings = Annotated[list[Embedding], Field(min_length=1, max_length=1000, fail_fast=True)]
Quality = Annotated[float, Field(allow_inf_nan=False, strict=True)] | None
MAX_BULK = 10_000  # embeddings of one bulk enrolment
TopK = Annotated[int, Field(ge=1, le=100, description="subjects to return")]


def _parsed(where: object) -> object:
    """A filter that came as text."""
    if not isinstance(where, str):
        return where
    try:
        return from_json(where)
    except ValueError as error:
        raise ValueError(f"this is not JSON ({error})") from error


Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], str | int | Annotated[float, Field(allow_inf_nan=False)] | bool],
    Field(max_length=32, description="a flat JSON object: texts, numbers, true or false; at most 4096 bytes"),
]
Filter = Annotated[
    Metadata,
    BeforeValidator(_parsed),
    Field(
        min_length=1,
        max_length=8,
        description="only subjects whose metadata has all of this; in a form or a query, as JSON",
    ),
]


class Request(BaseModel):
    """What has to do with vectors."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    model_id: str | None = Field(
        None, max_length=64, description="the model that made the embeddings; checked against the service's if given"
    )


class VerifyRequest(Request):
    """Two embeddings, or one and an enrolled subject."""

    probe: Embedding
    reference: Embedding | None = None
    subject_id: SubjectId | None = None

    @model_validator(mode="after")
    def _one_reference(self) -> "VerifyRequest":
        if (self.reference is None) == (self.subject_id is None):
            raise ValueError("give either reference or subject_id")
        return self


class Options(BaseModel):
    """How to search."""

    top_k: TopK = 5
    below_threshold: bool = Field(
        False, description="return candidates below the threshold too, where the service allows it"
    )
    where: Filter | None = None
    fpir: float | None = Field(
        None,
        gt=0,
        le=0.2,
        description="share of searches for strangers that may return a match, instead of the calibrated one; refused "
        "where the calibration does not know its threshold",
    )


class FormOptions(Options, Request):
    """The same as texts: fields of a form, or the query of a body of bytes."""

    face: Literal["all", "only", "largest"] | None = None


class Sampled(BaseModel):
    """Somebody unknown: one embedding, or several, whose mean, brought to length 1, is searched for."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    embedding: Embedding | None = None
    embeddings: Embeddings | None = None

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if (self.embedding is None) == (self.embeddings is None):
            raise ValueError("give either embedding or embeddings")
        return self

    @property
    def rows(self) -> list[list[float]]:
        return [self.embedding] if self.embedding is not None else self.embeddings or []


class IdentifyRequest(Sampled, Options, Request):
    """Who is this?"""


class IdentifyManyRequest(Options, Request):
    """Who are these?"""

    probes: list[Sampled] = Field(min_length=1, max_length=1000)


class Enrolled(Request):
    """Embeddings of one subject, and what is known besides."""

    embeddings: Embeddings
    metadata: Metadata | None = Field(None, description="the subject's, in place of what it has")
    qualities: list[Quality] = Field([], max_length=1000, description="of each embedding; any number")
    sample_metadata: list[Metadata] = Field([], max_length=1000, description="of each embedding")


class EnrolRequest(Enrolled):
    """Embeddings of one subject."""


class EnrolFields(Request):
    """What comes with images in a form, or in the query with embeddings as bytes."""

    face: Literal["only", "largest"] = "only"

    metadata: Annotated[Metadata | None, BeforeValidator(_parsed)] = Field(
        None, description="of the subject, in place of what it has; as JSON"
    )


class SubjectPatch(BaseModel):
    """A merge patch (RFC 7396) of a subject."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    metadata: dict[
        Annotated[str, Field(max_length=64)], str | int | Annotated[float, Field(allow_inf_nan=False)] | bool | None
    ] = Field(max_length=64, description="what is null goes, and what is not named stays")


class MergeRequest(BaseModel):
    """The subject that is merged into the one of the path."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    subject_id: SubjectId


class Where(BaseModel):
    """A filter alone."""

    where: Filter


class BulkItem(Enrolled):
    """One line of a bulk enrolment: embeddings of one subject."""

    subject_id: SubjectId


class BulkHeader(Request):
    """The first line of a bulk enrolment whose embeddings follow as bytes."""

    subject_ids: list[SubjectId] = Field(min_length=1, max_length=MAX_BULK, description="of each embedding, in order")
    metadata: list[Metadata | None] = Field([], max_length=MAX_BULK, description="of the subject of each embedding")
    qualities: list[Quality] = Field([], max_length=MAX_BULK, description="of each embedding")
    sample_metadata: list[Metadata] = Field([], max_length=MAX_BULK, description="of each embedding")


class CollectionRequest(BaseModel):
    """A collection to begin."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    name: str = Field(max_length=100, json_schema_extra={"pattern": f"^{COLLECTION}$"})
    model_id: str | None = Field(None, max_length=64, description="one of the loaded models; null: the first")


class DuplicatesRequest(BaseModel):
    """A search for subjects who look like one another."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    threshold: float | None = Field(
        None,
        ge=-1,
        le=1,
        strict=True,
        description="of the score of a pair; null: that of an identification in this gallery",
    )
    limit: int = Field(1000, ge=1, le=10_000, strict=True, description="pairs, those with the highest scores")
