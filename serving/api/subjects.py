"""The routes of subjects: list, get, update, merge, erase."""

from typing import Annotated

from fastapi import Header, Query, Request, Response

from serving.access.scopes import needs
from serving.answering import subjects as people
from serving.api.bodies import read_document
from serving.api.requests import (
    IfMatch,
    Key,
    Routes,
    SubjectPath,
    change,
    collection_of,
    compute,
    expected,
    tagged,
)
from serving.wire import openapi, requests, schemas
from serving.wire.parsing import read_json

SUBJECT = "/subjects/{subject_id}"
WHERE = "only subjects whose metadata has all of this, a JSON object"
subjects = Routes("gallery")


@subjects.get("/subjects", name="subjects")
@needs("read")
async def list_(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=1000, description="subjects a page")] = 100,
    cursor: Annotated[str | None, Query(max_length=64, description="next_cursor of the page before")] = None,
    where: Annotated[str | None, Query(max_length=4096, description=WHERE, examples=['{"site": "north"}'])] = None,
) -> schemas.SubjectsAnswer:
    """The enrolled subjects, in order of enrolment, in pages."""
    collection, request_id = collection_of(request), request.state.request_id
    filter_ = people.read_where(where)
    answer = await compute(request, lambda: people.page(collection, cursor, limit, filter_, request_id))
    request.state.subjects = [subject.subject_id for subject in answer.subjects]
    return answer


@subjects.get(SUBJECT, name="subject", responses={304: {"description": "It is as If-None-Match says"}})
@needs("read")
async def get(
    request: Request,
    response: Response,
    subject_id: SubjectPath,
    known: Annotated[str | None, Header(alias="If-None-Match", description="the ETag that the client has")] = None,
) -> schemas.SubjectDetail:
    """A subject: its metadata, its revision as ETag, and what is known of its samples."""
    collection, request_id = collection_of(request), request.state.request_id
    detail = await compute(request, lambda: people.describe(collection, subject_id, request_id))
    found = tagged(collection, response, detail)
    if known is not None and response.headers["etag"] in known:
        return Response(status_code=304, headers=dict(response.headers))  # type: ignore[return-value]
    return found


@subjects.patch(SUBJECT, openapi_extra=openapi.PATCH)
@needs("enrol")
async def update(
    request: Request, response: Response, subject_id: SubjectPath, key: Key = None, if_match: IfMatch = None
) -> schemas.ChangeAnswer:
    """Change a subject's metadata by a merge patch (RFC 7396): what is null goes, and what is not named stays."""
    collection, request_id = collection_of(request), request.state.request_id
    revision = expected(collection, if_match)
    document = await read_document(request, openapi.METADATA_BYTES)
    done = await change(
        request, response, lambda: people.update(collection, subject_id, document, revision, key, request_id)
    )
    return tagged(collection, response, done)


@subjects.post(f"{SUBJECT}/merge", openapi_extra=openapi.MERGE)
@needs("enrol")
async def merge(
    request: Request, response: Response, subject_id: SubjectPath, key: Key = None, if_match: IfMatch = None
) -> schemas.ChangeAnswer:
    """Make all samples of another subject those of this one, which keeps its metadata; the other one is erased."""
    collection, request_id = collection_of(request), request.state.request_id
    revision = expected(collection, if_match)
    other = read_json(requests.MergeRequest, await read_document(request)).subject_id
    request.state.subjects = [other]
    done = await change(
        request, response, lambda: people.merge(collection, subject_id, other, revision, key, request_id)
    )
    return tagged(collection, response, done)


@subjects.delete(SUBJECT, status_code=204)
@needs("enrol")
async def delete(
    request: Request, response: Response, subject_id: SubjectPath, key: Key = None, if_match: IfMatch = None
) -> None:
    """Erase a subject and all its samples. Once answered, they are off the disk and no search finds them."""
    collection = collection_of(request)
    revision = expected(collection, if_match)
    await change(request, response, lambda: people.delete(collection, subject_id, revision, key))
