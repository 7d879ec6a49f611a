"""The service's JSON: all answers."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from serving.images.looking import ImageAnswer

# Shown on the documentation page.
_MODEL: dict[str, JsonValue] = {
    "collection": "default",
    "model_id": "803e48540b005d3ce4213a2d2cecdf57",
    "request_id": "0f1e2d3c4b5a",
}
_SAMPLE = "9e910adc-e37c-47c4-94fe-b0e8e129a5fc"
VERIFIED: dict[str, JsonValue] = _MODEL | {
    "score": 0.71,
    "decision": "match",
    "threshold": 0.43,
    "threshold_source": "calibrated for FMR 0.001: held-out identities of faces",
    "fmr_target": 0.001,
    "fmr_interval": [0.0006, 0.0014],
    "mate_probability": 0.98,
    "subject_id": "alice",
    "sample_id": _SAMPLE,
}
IDENTIFIED: dict[str, JsonValue] = _MODEL | {
    "candidates": [{"subject_id": "alice", "score": 0.71, "sample_id": _SAMPLE, "mate_probability": 0.97}],
    "decision": "match",
    "threshold": 0.52,
    "threshold_source": "calibrated for FPIR 0.01: held-out identities of faces; by its curve for FPIR 0.01 at 1200 "
    "enrolled",
    "fpir_target": 0.01,
    "fpir_interval": [0.007, 0.013],
    "fpir_expected": 0.01,
    "gallery_size": 1200,
    "calibrated_gallery_size": 1200,
    "extrapolated": False,
    "probe_samples": 1,
}


class Answer(BaseModel):
    """What every answer carries."""

    collection: str
    model_id: str = Field(description="digest of the model that made the vectors")
    request_id: str


class VerifyAnswer(Answer):
    """Whether two samples are of the same identity, and why."""

    model_config = ConfigDict(json_schema_extra={"examples": [VERIFIED]})

    score: float = Field(description="cosine similarity, or normalised score, -1 to 1")
    decision: Literal["match", "no_match"] = Field(description="match: score >= threshold")
    threshold: float
    threshold_source: str
    fmr_target: float | None = Field(description="false match rate that the threshold was calibrated for")
    fmr_interval: tuple[float, float] | None = Field(description="bounds of the rate that the calibration reached")
    mate_probability: float | None = Field(
        None, description="that both are of one identity, at the prior that the embedder was calibrated with"
    )
    subject_id: str | None = Field(None, description="the enrolled subject that was compared")
    sample_id: str | None = Field(None, description="the subject's sample that scored best")
    images: list[ImageAnswer] = []


class CandidateAnswer(BaseModel):
    """A subject, by its best sample, or by the template that was made of all of them."""

    subject_id: str
    score: float
    sample_id: str | None = Field(None, description="the sample that scored best; null where a template was searched")
    mate_probability: float | None = Field(
        None,
        description="that this is the probe's identity, by its score alone: the calibration's prior is taken for the "
        "chance that the probe is enrolled, and shared out evenly among the gallery_size subjects",
    )


class Identified(BaseModel):
    """The nearest subjects, whether the first of them is the one, and what that rests on."""

    candidates: list[CandidateAnswer] = Field(
        description="best first; those below the threshold only where asked for and allowed"
    )
    decision: Literal["match", "unknown"] = Field(description="match: the first candidate's score >= threshold")
    threshold: float
    threshold_source: str
    extrapolated: bool = Field(
        description="the threshold rests on the model of the scores' tail alone: fewer than one false positive is "
        "expected among the samples that it was calibrated with"
    )
    fpir_target: float | None = Field(
        description="share of searches by strangers that return a match, for which the threshold is made"
    )
    fpir_interval: tuple[float, float] | None = Field(description="bounds of the rate that the calibration reached")
    fpir_expected: float | None = Field(
        description="fpir_target carried over to this gallery_size as 1 - (1 - FPIR)^(N / N0): an upper bound in a "
        "gallery larger than the calibrated one, a lower bound in a smaller one"
    )
    gallery_size: int = Field(description="enrolled subjects that were searched")
    calibrated_gallery_size: int | None = Field(description="gallery size that the threshold was calibrated for")
    probe_samples: int = Field(
        description="images or embeddings of the probe; of several, their mean, brought to length 1, was searched for"
    )
    images: list[ImageAnswer] = []


class FaceAnswer(BaseModel):
    """One of the faces of a photograph, and who it is by the same threshold."""

    face: ImageAnswer
    candidates: list[CandidateAnswer]
    decision: Literal["match", "unknown"] | None = Field(description="null: its quality is too low to be searched for")


class IdentifyAnswer(Answer, Identified):
    """Who it is, or that it is nobody we know."""

    model_config = ConfigDict(json_schema_extra={"examples": [IDENTIFIED]})

    faces: list[FaceAnswer] = Field(
        [],
        description="of a photograph, the largest first; the rest of the answer is of the first that was searched for",
    )


class IdentifyManyAnswer(Answer):
    """An answer for each probe, in the order they were sent."""

    results: list[Identified]


class SampleAnswer(BaseModel):
    """A stored sample."""

    sample_id: str


class SampleFacts(BaseModel):
    """What is known of a sample."""

    sample_id: str
    created: str = Field(description="UTC, ISO 8601")
    quality: float | None
    metadata: dict[str, str | int | float | bool]
    image: bool = Field(description="the image that it was made of was kept")


class SampleDetail(Answer, SampleFacts):
    """A sample."""

    subject_id: str
    embedding: list[float] | None = Field(description="where it was asked for")


class ChangeAnswer(Answer):
    """A subject after a change of it, or of one of its samples."""

    subject_id: str
    subject_samples: int = Field(description="samples of the subject now")
    revision: int = Field(description="of the subject; the end of its ETag")


class EnrolAnswer(Answer):
    """The samples that were added; they are on disk and found by the next search."""

    subject_id: str
    samples: list[SampleAnswer] = Field(description="those added now, in the order they were sent")
    subject_created: bool = Field(description="the subject was new")
    subject_samples: int = Field(description="samples of the subject now")
    gallery_size: int = Field(description="enrolled subjects now")
    revision: int = Field(description="of the subject; the end of its ETag")
    images: list[ImageAnswer] = []


class ErrorBody(BaseModel):
    """A refusal."""

    code: str = Field(description="for programs", examples=["wrong_model"])
    message: str = Field(description="for people: what was wrong, what is allowed, what to do")
    details: dict[str, object]


class BulkResult(BaseModel):
    """What became of one item of a bulk enrolment."""

    subject_id: str
    status: Literal["enrolled", "refused"]
    samples: list[SampleAnswer] = Field([], description="those added now, in the order they were sent")
    subject_created: bool = False
    error: ErrorBody | None = None


class BulkAnswer(Answer):
    """What became of the items, in the order they were sent. What is enrolled is on disk, all of it in one change."""

    results: list[BulkResult]
    enrolled: int = Field(description="items that were enrolled")
    refused: int
    gallery_size: int = Field(description="enrolled subjects now")


class SubjectFacts(BaseModel):
    """What is known of a subject beside its samples."""

    subject_id: str
    created: str = Field(description="UTC, ISO 8601")
    updated: str = Field(description="UTC, ISO 8601")
    revision: int = Field(description="of the gallery, at the subject's last change; the end of its ETag")
    metadata: dict[str, str | int | float | bool]


class SubjectAnswer(SubjectFacts):
    """An enrolled subject."""

    samples: int


class SubjectDetail(Answer, SubjectFacts):
    """A subject with its samples."""

    samples: list[SampleFacts]


class SubjectsAnswer(Answer):
    """A page of subjects, in order of enrolment."""

    subjects: list[SubjectAnswer]
    next_cursor: str | None = Field(description="send it as cursor for the next page; null: this is the last")
    gallery_size: int


class EmbedAnswer(Answer):
    """Unit vectors of the images, in the order they were sent."""

    embeddings: list[list[float]]
    dimension: int
    images: list[ImageAnswer] = Field(description="where each embedding is from")


class ErrorAnswer(BaseModel):
    """The shape of every error."""

    error: ErrorBody
    request_id: str


class AuditLine(BaseModel):
    """What one request did, and the hash that chains it to the line before."""

    n: int = Field(description="number of the line, counted from the beginning of the log")
    at: str = Field(description="UTC, ISO 8601")
    key: str = Field(description="id of the key; 'operator', 'anonymous', or 'service' for the service itself")
    do: str = Field(description="method and route")
    collection: str
    subjects: list[str] = Field(description="pseudonyms; `hypersphere audit find` knows whose")
    status: int = Field(description="of the answer")
    request: str
    prev: str = Field(description="SHA-256 of the line before")


class AuditAnswer(BaseModel):
    """A page of the audit log, the oldest line first."""

    lines: list[AuditLine]
    next_cursor: str = Field(description="send it as cursor for what comes after; there may be nothing yet")
    request_id: str
