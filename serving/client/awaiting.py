"""The client that is awaited: `blocking.Client` in every method, and the same words."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from itertools import islice
from types import TracebackType

import httpx
from numpy.typing import ArrayLike

from serving import schemas
from serving.client.requests import A_REQUEST, Answer, Call, Requests, Tries, settings


class AsyncClient:
    """`Client`, to be awaited. One event loop at a time."""

    def __init__(self, url: str, key: str | None = None, *, timeout_s: float = 30, retries: int = 5) -> None:
        """
        Args:
            key: of the API.
            retries: further tries of a request.
        """
        self._http, self._retries = httpx.AsyncClient(**settings(url, key, timeout_s)), retries

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def enrol(
        self,
        subject_id: str,
        *,
        images: Sequence[bytes] = (),
        embeddings: ArrayLike | None = None,
        key: str | None = None,
    ) -> schemas.EnrolAnswer:
        """Add samples to a subject, new or known: image files, or unit vectors [B, D]."""
        return await self._do(Requests.enrol(subject_id, images, embeddings, key))

    async def enrol_many(
        self, items: Iterable[tuple[str, ArrayLike]], progress: Callable[[int], object] = lambda done: None
    ) -> AsyncIterator[schemas.BulkResult]:
        """Add samples to many subjects, (subject_id, unit vectors [B, D] or [D]) each; what became of each vector.

        Args:
            progress: told how many items are done, after every request.
        """
        done, waiting = 0, iter(items)
        while batch := list(islice(waiting, A_REQUEST)):
            for result in (await self._do(Requests.enrol_many(batch, None))).results:
                yield result
            progress(done := done + len(batch))

    async def delete(self, subject_id: str, *, key: str | None = None) -> None:
        """Erase a subject."""
        await self._do(Requests.delete(subject_id, key))

    async def identify(
        self,
        *,
        image: bytes | None = None,
        embedding: ArrayLike | None = None,
        top_k: int = 5,
        below_threshold: bool = False,
    ) -> schemas.IdentifyAnswer:
        """Who is this, or is it nobody we know?"""
        return await self._do(Requests.identify(image, embedding, top_k, below_threshold))

    async def verify(self, probe: bytes | ArrayLike, reference: bytes | ArrayLike | str) -> schemas.VerifyAnswer:
        """Are these the same? Two images, two embeddings, or one of them and the id of a subject."""
        return await self._do(Requests.verify(probe, reference))

    async def embed(self, images: Sequence[bytes]) -> schemas.EmbedAnswer:
        """Unit vectors of images."""
        return await self._do(Requests.embed(images))

    async def subjects(self, page: int = 1000) -> AsyncIterator[schemas.SubjectAnswer]:
        """The enrolled subjects, in order of enrolment."""
        cursor: str | None = None
        while True:
            answer = await self._do(Requests.subjects(cursor, page))
            for subject in answer.subjects:
                yield subject
            if (cursor := answer.next_cursor) is None:
                return

    async def ready(self) -> schemas.ReadyAnswer:
        """Whether the service can answer."""
        return await self._do(Requests.ready())

    async def _do(self, call: Call[Answer]) -> Answer:
        tries = Tries(self._retries)
        while True:
            response, failure = None, None
            try:
                response = await self._http.request(call.method, call.path, **call.parts)
            except httpx.TransportError as error:
                failure = error
            if (pause := tries.pause_s(response)) is not None:
                await asyncio.sleep(pause)
            elif response is not None:
                return call.read(response)
            elif failure is not None:
                raise failure
