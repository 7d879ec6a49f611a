"""The routes of subjects and their samples: enrolment, lists, erasure."""

from typing import Annotated

from fastapi import Query, Request, Response

from serving import enrolling, openapi, schemas
from serving.api.requests import Key, Routes, SubjectPath, body_of, change, collection_of, compute
from serving.bodies import read_bulk

SAMPLES = "/subjects/{subject_id}/samples"
# What answers PUT points to its successor in the way of RFC 9745; the date is that of the release that began it.
SUPERSEDED = {"deprecation": "@1795651200", "link": '<{path}>; rel="successor-version"; method="POST"'}
subjects = Routes("gallery")


@subjects.post(SAMPLES, status_code=201, openapi_extra=openapi.ENROL.openapi())
async def enrol(request: Request, response: Response, subject_id: SubjectPath, key: Key = None) -> schemas.EnrolAnswer:
    """Add samples to a subject, new or known. Once answered, they are on disk and the next search finds them."""
    collection, request_id = collection_of(request), request.state.request_id
    sent = await body_of(request, openapi.ENROL, collection)
    return await change(request, response, lambda: enrolling.enrol(collection, subject_id, sent, key, request_id))


@subjects.post("/samples", openapi_extra=openapi.BULK)
async def enrol_many(request: Request, response: Response, key: Key = None) -> schemas.BulkAnswer:
    """Add samples to many subjects, all that can be in one change. An item that is refused leaves the others alone."""
    collection, request_id = collection_of(request), request.state.request_id
    sent = await read_bulk(request)
    return await change(request, response, lambda: enrolling.enrol_many(collection, sent, key, request_id))


@subjects.put(SAMPLES, status_code=201, openapi_extra=openapi.ENROL.openapi(), deprecated=True)
async def enrol_by_put(
    request: Request, response: Response, subject_id: SubjectPath, key: Key = None
) -> schemas.EnrolAnswer:
    """The same as POST, which replaces it: PUT must not append. Goes with the next release."""
    path = request.url.path.encode("ascii", "ignore").decode()
    response.headers.update({name: value.format(path=path) for name, value in SUPERSEDED.items()})
    return await enrol(request, response, subject_id, key)


@subjects.delete("/subjects/{subject_id}", status_code=204)
async def delete(request: Request, response: Response, subject_id: SubjectPath, key: Key = None) -> None:
    """Erase a subject and all its samples. Once answered, they are off the disk and no search finds them."""
    collection = collection_of(request)
    await change(request, response, lambda: (None, enrolling.delete(collection, subject_id, key)))


@subjects.get("/subjects", name="subjects")
async def list_(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=1000, description="subjects a page")] = 100,
    cursor: Annotated[str | None, Query(max_length=64, description="next_cursor of the page before")] = None,
) -> schemas.SubjectsAnswer:
    """The enrolled subjects, in order of enrolment, in pages."""
    collection, request_id = collection_of(request), request.state.request_id
    return await compute(request, lambda: enrolling.subjects(collection, cursor, limit, request_id))
