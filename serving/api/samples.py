"""The routes of single samples: get, image, erase."""

from typing import Annotated

from fastapi import Path, Query, Request, Response

from serving.access.scopes import needs
from serving.answering import subjects
from serving.api.requests import IfMatch, Key, Routes, SubjectPath, change, collection_of, compute, expected
from serving.wire import openapi, schemas
from serving.wire.parsing import RAW

SAMPLE = "/subjects/{subject_id}/samples/{sample_id}"
SamplePath = Annotated[str, Path(description="as enrolment answers it", max_length=64)]
samples = Routes("gallery")


@samples.get(SAMPLE, name="sample")
@needs("read")
async def get(
    request: Request,
    subject_id: SubjectPath,
    sample_id: SamplePath,
    embedding: Annotated[bool, Query(description="with its vector")] = False,
) -> schemas.SampleDetail:
    """What is known of a sample."""
    collection, request_id = collection_of(request), request.state.request_id
    return await compute(request, lambda: subjects.sample(collection, subject_id, sample_id, embedding, request_id))


@samples.get(f"{SAMPLE}/image", response_class=Response, responses=openapi.IMAGE)
@needs("read")
async def image(request: Request, subject_id: SubjectPath, sample_id: SamplePath) -> Response:
    """The image that a sample was made of, as it was sent, where the service keeps images."""
    collection = collection_of(request)
    found = await compute(request, lambda: subjects.image(collection, subject_id, sample_id))
    return Response(found, media_type=RAW)


@samples.delete(SAMPLE, status_code=204)
@needs("enrol")
async def delete_sample(
    request: Request,
    response: Response,
    subject_id: SubjectPath,
    sample_id: SamplePath,
    key: Key = None,
    if_match: IfMatch = None,
) -> None:
    """Erase one sample of a subject that has others. Once answered, it is off the disk and no search finds it."""
    collection = collection_of(request)
    revision = expected(collection, if_match)
    await change(request, response, lambda: subjects.delete_sample(collection, subject_id, sample_id, revision, key))
