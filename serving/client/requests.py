"""What a client sends, how it reads the answers, and when it asks again. Nothing here touches the network."""

import json
import random
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx
import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, ValidationError

from serving.wire import operations, schemas

Answer = TypeVar("Answer")
Model = TypeVar("Model", bound=BaseModel)
AGAIN = frozenset({429, 502, 503, 504})
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0
RAW = "application/octet-stream"
A_REQUEST = 1000  # items of a bulk enrolment that are sent together
A_BATCH = 256  # probes of a batch of identifications that are sent together
Metadata = Mapping[str, str | int | float | bool]
Item = tuple[str, ArrayLike] | tuple[str, ArrayLike, Metadata]  # subject, vectors, perhaps metadata of the subject


class ServiceError(Exception):
    """The service refused.

    Attributes:
        status: of HTTP.
        code: for programs, such as `no_subject`; "" where what answered was not the service.
        details: facts.
        request_id: under which the service's log knows the request.
    """

    def __init__(self, status: int, code: str, message: str, details: dict[str, Any], request_id: str) -> None:
        super().__init__(message)
        self.status, self.code, self.details, self.request_id = status, code, details, request_id


@dataclass(frozen=True)
class Call(Generic[Answer]):
    """A request, and how its answer is read."""

    parse: Callable[[bytes], Answer]
    method: str
    path: str
    parts: dict[str, Any] = field(default_factory=dict)  # of httpx's request

    def read(self, response: httpx.Response) -> Answer:
        """Raises ServiceError for a refusal."""
        if response.is_success:
            return self.parse(response.content)
        try:
            found = schemas.ErrorAnswer.model_validate_json(response.content)
        except ValidationError:
            told = f"{self.method} {self.path} was answered {response.status_code}, not by the service"
            raise ServiceError(response.status_code, "", told, {}, "") from None
        error = found.error
        raise ServiceError(response.status_code, error.code, error.message, error.details, found.request_id)


class Tries:
    """How often a request is sent."""

    def __init__(self, retries: int) -> None:
        self._left, self._longest_s = retries, FIRST_PAUSE_S

    def pause_s(self, response: httpx.Response | None) -> float | None:
        """Seconds until the next try, after this answer or none; None: there is none."""
        if self._left == 0 or (response is not None and response.status_code not in AGAIN):
            return None
        self._left -= 1
        longest, self._longest_s = self._longest_s, min(LONGEST_PAUSE_S, 2 * self._longest_s)
        asked = response.headers.get("retry-after", "") if response is not None else ""
        return float(asked) if asked.isdigit() else random.uniform(0, longest)


class Requests:
    """What is sent, for both clients, of which each speaks about one collection."""

    def __init__(self, collection: str | None) -> None:
        """None: that of the paths that name none, `default`."""
        self._base = "/v1" if collection is None else f"/v1/collections/{quote(collection, safe='')}"

    def enrol(
        self,
        subject_id: str,
        images: Sequence[bytes],
        embeddings: ArrayLike | None,
        metadata: Metadata | None,
        qualities: Sequence[float | None],
        sample_metadata: Sequence[Metadata],
        key: str | None,
    ) -> Call[schemas.EnrolAnswer]:
        parts = _body("images", images, embeddings, "embeddings") | _once(key)
        if "json" in parts:
            more = {"metadata": metadata, "qualities": list(qualities), "sample_metadata": list(sample_metadata)}
            parts["json"] |= {name: value for name, value in more.items() if value}
        elif metadata is not None:
            parts["data"] = {"metadata": json.dumps(metadata)}
        return self._call(schemas.EnrolAnswer, "POST", f"{_subject(subject_id)}/samples", parts)

    def enrol_many(self, items: Sequence[Item], key: str | None) -> Call[schemas.BulkAnswer]:
        rows = [np.atleast_2d(np.asarray(item[1])) for item in items]
        many = [(item, len(some)) for item, some in zip(items, rows, strict=True)]
        head: dict[str, Any] = {"subject_ids": [item[0] for item, count in many for _ in range(count)]}
        if any(len(item) == 3 for item in items):
            head["metadata"] = [item[2] if len(item) == 3 else None for item, count in many for _ in range(count)]
        content = json.dumps(head).encode() + b"\n" + _floats(np.concatenate(rows))
        return self._call(schemas.BulkAnswer, "POST", "/samples", {"content": content} | _once(key, RAW))

    def subjects(self, cursor: str | None, limit: int, where: Metadata | None) -> Call[schemas.SubjectsAnswer]:
        query = {"limit": str(limit)} | ({"cursor": cursor} if cursor else {})
        if where is not None:
            query["where"] = json.dumps(where)
        return self._call(schemas.SubjectsAnswer, "GET", "/subjects", {"params": query})

    def subject(self, subject_id: str) -> Call[schemas.SubjectDetail]:
        return self._call(schemas.SubjectDetail, "GET", _subject(subject_id))

    def update(
        self, subject_id: str, metadata: Mapping[str, Any], revision: int | None, key: str | None
    ) -> Call[schemas.ChangeAnswer]:
        parts = {"json": {"metadata": dict(metadata)}} | _once(key, revision=revision)
        return self._call(schemas.ChangeAnswer, "PATCH", _subject(subject_id), parts)

    def merge(self, into: str, other: str, revision: int | None, key: str | None) -> Call[schemas.ChangeAnswer]:
        parts = {"json": {"subject_id": other}} | _once(key, revision=revision)
        return self._call(schemas.ChangeAnswer, "POST", f"{_subject(into)}/merge", parts)

    def delete(self, subject_id: str, revision: int | None, key: str | None) -> Call[None]:
        return Call(_nothing, "DELETE", self._base + _subject(subject_id), _once(key, revision=revision))

    def sample(self, subject_id: str, sample_id: str, embedding: bool) -> Call[schemas.SampleDetail]:
        query = {"embedding": "true"} if embedding else {}
        return self._call(schemas.SampleDetail, "GET", _sample(subject_id, sample_id), {"params": query})

    def image(self, subject_id: str, sample_id: str) -> Call[bytes]:
        return Call(bytes, "GET", f"{self._base}{_sample(subject_id, sample_id)}/image")

    def delete_sample(self, subject_id: str, sample_id: str, revision: int | None, key: str | None) -> Call[None]:
        return Call(_nothing, "DELETE", self._base + _sample(subject_id, sample_id), _once(key, revision=revision))

    def identify(
        self,
        images: Sequence[bytes],
        embeddings: ArrayLike | None,
        options: Mapping[str, object],
    ) -> Call[schemas.IdentifyAnswer]:
        return self._call(schemas.IdentifyAnswer, "POST", "/identify", _probes("image", images, embeddings, options))

    def identify_many(
        self,
        images: Sequence[bytes],
        embeddings: ArrayLike | None,
        options: Mapping[str, object],
    ) -> Call[schemas.IdentifyManyAnswer]:
        parts = _probes("images", images, embeddings, options)
        return self._call(schemas.IdentifyManyAnswer, "POST", "/identify/batch", parts)

    def verify(self, probe: bytes | ArrayLike, reference: bytes | ArrayLike | str) -> Call[schemas.VerifyAnswer]:
        subject: dict[str, Any] = {"subject_id": reference} if isinstance(reference, str) else {}
        if isinstance(probe, bytes):
            files = [_file("probe", probe)] + ([_file("reference", reference)] if isinstance(reference, bytes) else [])
            return self._call(schemas.VerifyAnswer, "POST", "/verify", {"files": files, "data": subject})
        body: dict[str, Any] = {"probe": _row(probe)} | (subject or {"reference": _row(reference)})
        return self._call(schemas.VerifyAnswer, "POST", "/verify", {"json": body})

    def embed(self, images: Sequence[bytes]) -> Call[schemas.EmbedAnswer]:
        return self._call(schemas.EmbedAnswer, "POST", "/embed", _body("images", images, None, ""))

    def duplicates(self, threshold: float | None, limit: int, key: str | None) -> Call[operations.JobAnswer]:
        parts = {"json": {"threshold": threshold, "limit": limit}} | _once(key)
        return self._call(operations.JobAnswer, "POST", "/duplicates", parts)

    def _call(self, answer: type[Model], method: str, path: str, parts: dict[str, Any] | None = None) -> Call[Model]:
        return Call(answer.model_validate_json, method, self._base + path, parts or {})


def ready() -> Call[operations.ReadyAnswer]:
    return Call(operations.ReadyAnswer.model_validate_json, "GET", "/readyz")


def collections() -> Call[operations.CollectionsAnswer]:
    return Call(operations.CollectionsAnswer.model_validate_json, "GET", "/v1/collections")


def create_collection(name: str, model_id: str | None, key: str | None) -> Call[operations.CollectionAnswer]:
    parts = {"json": {"name": name, "model_id": model_id}} | _once(key)
    return Call(operations.CollectionAnswer.model_validate_json, "POST", "/v1/collections", parts)


def drop_collection(name: str, key: str | None) -> Call[None]:
    return Call(_nothing, "DELETE", f"/v1/collections/{quote(name, safe='')}", _once(key))


def job(job_id: str) -> Call[operations.JobAnswer]:
    return Call(operations.JobAnswer.model_validate_json, "GET", f"/v1/jobs/{quote(job_id, safe='')}")


def cancel_job(job_id: str) -> Call[None]:
    return Call(_nothing, "DELETE", f"/v1/jobs/{quote(job_id, safe='')}")


def options(top_k: int, below_threshold: bool, fpir: float | None, where: Metadata | None) -> dict[str, object]:
    """How to search, without what is not said."""
    told: dict[str, object] = {"top_k": top_k, "below_threshold": below_threshold, "fpir": fpir, "where": where}
    return {name: value for name, value in told.items() if value is not None}


def batches(
    images: Sequence[bytes], embeddings: ArrayLike | None, size: int
) -> Iterator[tuple[Sequence[bytes], ArrayLike | None]]:
    """Images as they are; vectors [N, D] in pieces."""
    if embeddings is None:
        yield images, None
        return
    rows_ND = np.atleast_2d(np.asarray(embeddings))
    for start in range(0, len(rows_ND), size):
        yield images, rows_ND[start : start + size]


def _nothing(content: bytes) -> None:
    """An answer without a body."""


def _subject(subject_id: str) -> str:
    return f"/subjects/{quote(subject_id, safe='')}"


def _sample(subject_id: str, sample_id: str) -> str:
    return f"{_subject(subject_id)}/samples/{quote(sample_id, safe='')}"


def _probes(
    part: str, images: Sequence[bytes], embeddings: ArrayLike | None, options: Mapping[str, object]
) -> dict[str, Any]:
    if bool(images) == (embeddings is not None):
        raise ValueError("give either images or embeddings")
    texts = {name: json.dumps(value) for name, value in options.items()}
    if embeddings is None:
        return {"files": [_file(part, image) for image in images], "data": texts}
    content = _floats(np.atleast_2d(np.asarray(embeddings)))
    return {"content": content} | {"params": texts, "headers": {"content-type": RAW}}


def _body(part: str, images: Sequence[bytes], embeddings: ArrayLike | None, name: str) -> dict[str, Any]:
    if bool(images) == (embeddings is not None):
        raise ValueError("give either images or embeddings")
    if embeddings is None:
        return {"files": [_file(part, image) for image in images]}
    return {"json": {name: np.atleast_2d(np.asarray(embeddings, np.float64)).tolist()}}


def _file(part: str, image: bytes | Any) -> tuple[str, tuple[str, bytes]]:
    return part, ("image", image)


def _row(embedding: Any) -> list[float]:
    row: list[float] = np.asarray(embedding, np.float64).tolist()
    return row


def _floats(rows: Any) -> bytes:
    content: bytes = rows.astype("<f4").tobytes()
    return content


def _once(key: str | None, kind: str | None = None, revision: int | None = None) -> dict[str, Any]:
    """The headers of a change: its key, the content type where httpx does not know it, and what it rests on."""
    headers = {"idempotency-key": key or uuid.uuid4().hex}
    headers |= {"content-type": kind} if kind else {}
    return {"headers": headers | ({"if-match": f'"{revision}"'} if revision is not None else {})}


def settings(url: str, key: str | None, timeout_s: float) -> dict[str, Any]:
    return {"base_url": url, "timeout": timeout_s, "headers": {"authorization": f"Bearer {key}"} if key else {}}
