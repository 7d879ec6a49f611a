"""What a client sends, how it reads the answers, and when it asks again. Nothing here touches the network."""

import json
import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx
import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, ValidationError

from serving import schemas

Answer = TypeVar("Answer")
Model = TypeVar("Model", bound=BaseModel)
AGAIN = frozenset({429, 502, 503, 504})
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0
A_REQUEST = 1000  # items of a bulk enrolment that are sent together


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
    """What is sent, for both clients."""

    @staticmethod
    def enrol(
        subject_id: str, images: Sequence[bytes], embeddings: ArrayLike | None, key: str | None
    ) -> Call[schemas.EnrolAnswer]:
        path = f"/v1/subjects/{quote(subject_id, safe='')}/samples"
        return _call(
            schemas.EnrolAnswer,
            "POST",
            path,
            _body("images", images, embeddings, "embeddings") | _once(key),
        )

    @staticmethod
    def enrol_many(items: Sequence[tuple[str, ArrayLike]], key: str | None) -> Call[schemas.BulkAnswer]:
        names = [name for name, rows in items for _ in np.atleast_2d(np.asarray(rows))]
        rows = [np.atleast_2d(np.asarray(rows)) for _, rows in items]
        content = json.dumps({"subject_ids": names}).encode() + b"\n" + np.concatenate(rows).astype("<f4").tobytes()
        parts: dict[str, Any] = _once(key)
        parts["headers"] |= {"content-type": "application/octet-stream"}
        return _call(schemas.BulkAnswer, "POST", "/v1/samples", {"content": content} | parts)

    @staticmethod
    def delete(subject_id: str, key: str | None) -> Call[None]:
        return Call(lambda _: None, "DELETE", f"/v1/subjects/{quote(subject_id, safe='')}", _once(key))

    @staticmethod
    def identify(
        image: bytes | None, embedding: ArrayLike | None, top_k: int, below_threshold: bool
    ) -> Call[schemas.IdentifyAnswer]:
        parts = _body("image", [] if image is None else [image], embedding, "embedding")
        fields = {"top_k": top_k, "below_threshold": below_threshold}
        if "json" in parts:
            parts["json"] |= fields
        else:
            parts["data"] = {name: json.dumps(value) for name, value in fields.items()}
        return _call(schemas.IdentifyAnswer, "POST", "/v1/identify", parts)

    @staticmethod
    def verify(probe: bytes | ArrayLike, reference: bytes | ArrayLike | str) -> Call[schemas.VerifyAnswer]:
        subject: dict[str, Any] = {"subject_id": reference} if isinstance(reference, str) else {}
        if isinstance(probe, bytes):
            files = [_file("probe", probe)] + ([_file("reference", reference)] if isinstance(reference, bytes) else [])
            return _call(schemas.VerifyAnswer, "POST", "/v1/verify", {"files": files, "data": subject})
        body: dict[str, Any] = {"probe": _row(probe)} | (subject or {"reference": _row(reference)})
        return _call(schemas.VerifyAnswer, "POST", "/v1/verify", {"json": body})

    @staticmethod
    def embed(images: Sequence[bytes]) -> Call[schemas.EmbedAnswer]:
        return _call(schemas.EmbedAnswer, "POST", "/v1/embed", _body("images", images, None, ""))

    @staticmethod
    def subjects(cursor: str | None, limit: int) -> Call[schemas.SubjectsAnswer]:
        query = {"limit": str(limit)} | ({"cursor": cursor} if cursor else {})
        return _call(schemas.SubjectsAnswer, "GET", "/v1/subjects", {"params": query})

    @staticmethod
    def ready() -> Call[schemas.ReadyAnswer]:
        return _call(schemas.ReadyAnswer, "GET", "/readyz")


def _call(answer: type[Model], method: str, path: str, parts: dict[str, Any] | None = None) -> Call[Model]:
    return Call(answer.model_validate_json, method, path, parts or {})


def _body(part: str, images: Sequence[bytes], embeddings: ArrayLike | None, name: str) -> dict[str, Any]:
    if bool(images) == (embeddings is not None):
        raise ValueError("give either images or embeddings")
    if embeddings is None:
        return {"files": [_file(part, image) for image in images]}
    return {"json": {name: np.asarray(embeddings, np.float64).tolist()}}


def _file(part: str, image: bytes | Any) -> tuple[str, tuple[str, bytes]]:
    return part, ("image", image)


def _row(embedding: Any) -> list[float]:
    row: list[float] = np.asarray(embedding, np.float64).tolist()
    return row


def _once(key: str | None) -> dict[str, Any]:
    return {"headers": {"idempotency-key": key or uuid.uuid4().hex}}


def settings(url: str, key: str | None, timeout_s: float) -> dict[str, Any]:
    return {"base_url": url, "timeout": timeout_s, "headers": {"authorization": f"Bearer {key}"} if key else {}}
