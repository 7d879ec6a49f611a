"""The client that waits."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from types import TracebackType

import httpx
from numpy.typing import ArrayLike

from serving import schemas
from serving.client.requests import A_REQUEST, Answer, Call, Requests, Tries, settings


class Client:
    """The service at an address. Methods may be called from several threads; each answer is one of `schemas`.

    All raise ServiceError where the service refuses, and httpx.TransportError where it does not answer.
    """

    def __init__(self, url: str, key: str | None = None, *, timeout_s: float = 30, retries: int = 5) -> None:
        """
        Args:
            key: of the API.
            retries: further tries of a request.
        """
        self._http, self._retries = httpx.Client(**settings(url, key, timeout_s)), retries

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def enrol(
        self,
        subject_id: str,
        *,
        images: Sequence[bytes] = (),
        embeddings: ArrayLike | None = None,
        key: str | None = None,
    ) -> schemas.EnrolAnswer:
        """Add samples to a subject, new or known: image files, or unit vectors [B, D]."""
        return self._do(Requests.enrol(subject_id, images, embeddings, key))

    def enrol_many(
        self, items: Iterable[tuple[str, ArrayLike]], progress: Callable[[int], object] = lambda done: None
    ) -> Iterator[schemas.BulkResult]:
        """Add samples to many subjects, (subject_id, unit vectors [B, D] or [D]) each; what became of each vector.

        Args:
            progress: told how many items are done, after every request.
        """
        done, waiting = 0, iter(items)
        while batch := list(islice(waiting, A_REQUEST)):
            yield from self._do(Requests.enrol_many(batch, None)).results
            progress(done := done + len(batch))

    def delete(self, subject_id: str, *, key: str | None = None) -> None:
        """Erase a subject."""
        self._do(Requests.delete(subject_id, key))

    def identify(
        self,
        *,
        image: bytes | None = None,
        embedding: ArrayLike | None = None,
        top_k: int = 5,
        below_threshold: bool = False,
    ) -> schemas.IdentifyAnswer:
        """Who is this, or is it nobody we know?"""
        return self._do(Requests.identify(image, embedding, top_k, below_threshold))

    def verify(self, probe: bytes | ArrayLike, reference: bytes | ArrayLike | str) -> schemas.VerifyAnswer:
        """Are these the same? Two images, two embeddings, or one of them and the id of a subject."""
        return self._do(Requests.verify(probe, reference))

    def embed(self, images: Sequence[bytes]) -> schemas.EmbedAnswer:
        """Unit vectors of images."""
        return self._do(Requests.embed(images))

    def subjects(self, page: int = 1000) -> Iterator[schemas.SubjectAnswer]:
        """The enrolled subjects, in order of enrolment."""
        cursor: str | None = None
        while True:
            answer = self._do(Requests.subjects(cursor, page))
            yield from answer.subjects
            if (cursor := answer.next_cursor) is None:
                return

    def ready(self) -> schemas.ReadyAnswer:
        """Whether the service can answer."""
        return self._do(Requests.ready())

    def _do(self, call: Call[Answer]) -> Answer:
        tries = Tries(self._retries)
        while True:
            response, failure = None, None
            try:
                response = self._http.request(call.method, call.path, **call.parts)
            except httpx.TransportError as error:
                failure = error
            if (pause := tries.pause_s(response)) is not None:
                time.sleep(pause)
            elif response is not None:
                return call.read(response)
            elif failure is not None:
                raise failure
