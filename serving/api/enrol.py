"""The routes of enrolment: of one subject, and of many."""

from fastapi import Request, Response

from serving.access.scopes import needs
from serving.answering import enrolling
from serving.api.bodies import read_bulk
from serving.api.requests import (
    IfMatch,
    Key,
    Routes,
    SubjectPath,
    body_of,
    change,
    collection_of,
    expected,
    tagged,
)
from serving.errors import invalid
from serving.wire import openapi, schemas

SAMPLES = "/subjects/{subject_id}/samples"
# What answers PUT points to its successor in the way of RFC 9745; the date is that of the release that began it.
SUPERSEDED = {"deprecation": "@1795651200", "link": '<{path}>; rel="successor-version"; method="POST"'}
enrolment = Routes("gallery")


@enrolment.post(SAMPLES, status_code=201, openapi_extra=openapi.ENROL.openapi())
@needs("enrol")
async def enrol(
    request: Request, response: Response, subject_id: SubjectPath, key: Key = None, if_match: IfMatch = None
) -> schemas.EnrolAnswer:
    """Add samples to a subject, new or known. Once answered, they are on disk and the next search finds them."""
    collection, request_id = collection_of(request), request.state.request_id
    revision = expected(collection, if_match)
    sent = await body_of(request, openapi.ENROL, collection)
    answer = await change(
        request, response, lambda: enrolling.enrol(collection, subject_id, sent, key, request_id, revision)
    )
    return tagged(collection, response, answer)


@enrolment.post("/samples", openapi_extra=openapi.BULK)
@needs("enrol")
async def enrol_many(request: Request, response: Response, key: Key = None) -> schemas.BulkAnswer:
    """Add samples to many subjects, all that can be in one change. An item that is refused leaves the others alone."""
    if "if-match" in request.headers:
        raise invalid(("If-Match", "an enrolment of many subjects has no ETag to match; leave the header out"))
    collection, request_id = collection_of(request), request.state.request_id
    sent = await read_bulk(request)
    answer = await change(request, response, lambda: enrolling.enrol_many(collection, sent, key, request_id))
    request.state.subjects = [result.subject_id for result in answer.results if result.status == "enrolled"]
    return answer


@enrolment.put(SAMPLES, status_code=201, openapi_extra=openapi.ENROL.openapi(), deprecated=True)
@needs("enrol")
async def enrol_by_put(
    request: Request, response: Response, subject_id: SubjectPath, key: Key = None, if_match: IfMatch = None
) -> schemas.EnrolAnswer:
    """The same as POST, which replaces it: PUT must not append. Goes with the next release."""
    path = request.url.path.encode("ascii", "ignore").decode()
    response.headers.update({name: value.format(path=path) for name, value in SUPERSEDED.items()})
    return await enrol(request, response, subject_id, key, if_match)
