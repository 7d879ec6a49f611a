"""The client that is awaited: `blocking.Client` in every method, and the same words."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from itertools import islice
from types import TracebackType
from typing import Any

import httpx
from numpy.typing import ArrayLike

from serving.client import requests
from serving.client.requests import A_BATCH, A_REQUEST, Answer, Call, Item, Metadata, Requests, Tries, options, settings
from serving.wire import operations, schemas

POLL_S = 0.2


class AsyncClient:
    """`Client`, to be awaited. One event loop at a time."""

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        collection: str | None = None,
        timeout_s: float = 30,
        retries: int = 5,
    ) -> None:
        """
        Args:
            key: of the API.
            collection: None: `default`.
            retries: further tries of a request.
        """
        self._http, self._retries = httpx.AsyncClient(**settings(url, key, timeout_s)), retries
        self._requests = Requests(collection)

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
        metadata: Metadata | None = None,
        qualities: Sequence[float | None] = (),
        sample_metadata: Sequence[Metadata] = (),
        key: str | None = None,
    ) -> schemas.EnrolAnswer:
        """Add samples to a subject, new or known: image files, or unit vectors [B, D].

        Args:
            metadata: of the subject, in place of what it has.
            qualities, sample_metadata: of each embedding.
        """
        more = metadata, qualities, sample_metadata
        return await self._do(self._requests.enrol(subject_id, images, embeddings, *more, key))

    async def enrol_many(
        self,
        items: Iterable[Item],
        progress: Callable[[int], object] = lambda done: None,
    ) -> AsyncIterator[schemas.BulkResult]:
        """Add samples to many subjects, (subject_id, unit vectors [B, D] or [D], perhaps metadata of the subject) each;
        what became of each vector.

        Args:
            progress: told how many items are done, after every request.
        """
        done, waiting = 0, iter(items)
        while batch := list(islice(waiting, A_REQUEST)):
            for result in (await self._do(self._requests.enrol_many(batch, None))).results:
                yield result
            progress(done := done + len(batch))

    async def subject(self, subject_id: str) -> schemas.SubjectDetail:
        """A subject and what is known of its samples."""
        return await self._do(self._requests.subject(subject_id))

    async def subjects(self, where: Metadata | None = None, page: int = 1000) -> AsyncIterator[schemas.SubjectAnswer]:
        """The enrolled subjects, in order of enrolment; with `where`, those whose metadata has all of it."""
        cursor: str | None = None
        while True:
            answer = await self._do(self._requests.subjects(cursor, page, where))
            for subject in answer.subjects:
                yield subject
            if (cursor := answer.next_cursor) is None:
                return

    async def update(
        self, subject_id: str, metadata: Mapping[str, Any], *, revision: int | None = None, key: str | None = None
    ) -> schemas.ChangeAnswer:
        """Change a subject's metadata: what is None goes, and what is not named stays."""
        return await self._do(self._requests.update(subject_id, metadata, revision, key))

    async def merge(
        self, into: str, other: str, *, revision: int | None = None, key: str | None = None
    ) -> schemas.ChangeAnswer:
        """Make all samples of `other` those of `into`; `other` is erased."""
        return await self._do(self._requests.merge(into, other, revision, key))

    async def delete(self, subject_id: str, *, revision: int | None = None, key: str | None = None) -> None:
        """Erase a subject."""
        await self._do(self._requests.delete(subject_id, revision, key))

    async def sample(self, subject_id: str, sample_id: str, *, embedding: bool = False) -> schemas.SampleDetail:
        """What is known of a sample; with `embedding`, its vector too."""
        return await self._do(self._requests.sample(subject_id, sample_id, embedding))

    async def image(self, subject_id: str, sample_id: str) -> bytes:
        """The image that a sample was made of, where the service keeps images."""
        return await self._do(self._requests.image(subject_id, sample_id))

    async def delete_sample(
        self, subject_id: str, sample_id: str, *, revision: int | None = None, key: str | None = None
    ) -> None:
        """Erase one sample of a subject that has others."""
        await self._do(self._requests.delete_sample(subject_id, sample_id, revision, key))

    async def identify(
        self,
        *,
        image: bytes | None = None,
        images: Sequence[bytes] = (),
        embedding: ArrayLike | None = None,
        top_k: int = 5,
        below_threshold: bool = False,
        fpir: float | None = None,
        where: Metadata | None = None,
    ) -> schemas.IdentifyAnswer:
        """Who is this, or is it nobody we know?

        Args:
            images, embedding: several of one person ([B, D]) are searched for by their mean.
            fpir: the share of strangers that may match, instead of the calibrated one.
            where: only subjects whose metadata has all of this.
        """
        every = [image, *images] if image is not None else images
        how = options(top_k, below_threshold, fpir, where)
        return await self._do(self._requests.identify(every, embedding, how))

    async def identify_many(
        self,
        *,
        images: Sequence[bytes] = (),
        embeddings: ArrayLike | None = None,
        top_k: int = 5,
        below_threshold: bool = False,
        fpir: float | None = None,
        where: Metadata | None = None,
    ) -> list[schemas.Identified]:
        """`identify` for each image, as many as the service takes in one request, or each of any number of vectors."""
        how = options(top_k, below_threshold, fpir, where)
        return [
            found
            for some_images, some_rows in requests.batches(images, embeddings, A_BATCH)
            for found in (await self._do(self._requests.identify_many(some_images, some_rows, how))).results
        ]

    async def verify(self, probe: bytes | ArrayLike, reference: bytes | ArrayLike | str) -> schemas.VerifyAnswer:
        """Are these the same? Two images, two embeddings, or one of them and the id of a subject."""
        return await self._do(self._requests.verify(probe, reference))

    async def embed(self, images: Sequence[bytes]) -> schemas.EmbedAnswer:
        """Unit vectors of images."""
        return await self._do(self._requests.embed(images))

    async def duplicates(
        self,
        threshold: float | None = None,
        limit: int = 1000,
        progress: Callable[[int, int], object] = lambda done, total: None,
    ) -> operations.JobAnswer:
        """Subjects who look like one another; waits for the end of the job.

        Args:
            threshold: of the score of a pair; None: that of an identification.
            progress: told (samples done, samples in all); where it raises, the job is cancelled.
        """
        job = await self._do(self._requests.duplicates(threshold, limit, None))
        try:
            while job.state in ("waiting", "running"):
                progress(job.done, job.total)
                await asyncio.sleep(POLL_S)
                job = await self.job(job.job_id)
            progress(job.done, job.total)
        except BaseException:
            await self.cancel_job(job.job_id)
            raise
        return job

    async def job(self, job_id: str) -> operations.JobAnswer:
        """How far a job is, and what it has found so far."""
        return await self._do(requests.job(job_id))

    async def cancel_job(self, job_id: str) -> None:
        """End a job."""
        await self._do(requests.cancel_job(job_id))

    async def collections(self) -> list[operations.CollectionFacts]:
        """The collections of the service, by name."""
        return (await self._do(requests.collections())).collections

    async def create_collection(
        self, name: str, model_id: str | None = None, *, key: str | None = None
    ) -> operations.CollectionAnswer:
        """Begin an empty collection, of one of the service's models."""
        return await self._do(requests.create_collection(name, model_id, key))

    async def drop_collection(self, name: str, *, key: str | None = None) -> None:
        """Remove a collection and all that is enrolled in it."""
        await self._do(requests.drop_collection(name, key))

    async def ready(self) -> operations.ReadyAnswer:
        """Whether the service can answer."""
        return await self._do(requests.ready())

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
