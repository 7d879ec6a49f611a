"""What routes share: the collection that a request names, its body, threads to compute in, and typed parameters."""

import asyncio
import contextvars
import re
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Header, Path, Request, Response

from serving.access.scopes import DEFAULT_COLLECTION
from serving.answering.collections import Collection
from serving.api.bodies import read
from serving.api.routing import ScopedRoute
from serving.errors import invalid
from serving.service import Service
from serving.storage.changes import ANOTHERS
from serving.wire import openapi, schemas
from serving.wire.parsing import KEY_PATTERN, PATTERN, Sent

T = TypeVar("T")
_NAME, _KEY = "1 to 128 characters, without slashes", "the same key and request again: done once, answered alike"
SubjectPath = Annotated[str, Path(description=_NAME, examples=["alice"], json_schema_extra={"pattern": PATTERN})]
Key = Annotated[
    str | None, Header(alias="Idempotency-Key", description=_KEY, json_schema_extra={"pattern": KEY_PATTERN})
]
IfMatch = Annotated[
    str | None,
    Header(
        alias="If-Match",
        description="the subject's ETag, or its revision in quotes: done only where the subject was not changed since",
        json_schema_extra={"pattern": r'^(\*|"([0-9a-f]{8}-)?[0-9]{1,18}")$'},
    ),
]
Revised = TypeVar("Revised", schemas.EnrolAnswer, schemas.ChangeAnswer, schemas.SubjectDetail)


class Routes(APIRouter):
    """The routes of one noun. Each is there twice: below /v1 for the collection `default`, and below a collection.

    They are put into the app flat, by `create_app`: an included router would be searched twice a request.
    """

    def __init__(self, tag: str) -> None:
        super().__init__(
            responses=openapi.ERRORS,
            tags=[tag],
            generate_unique_id_function=lambda route: route.name,
            route_class=ScopedRoute,
        )

    def add_api_route(self, path: str, endpoint: Callable[..., Any], *, name: str | None = None, **more: Any) -> None:
        name = name or endpoint.__name__
        super().add_api_route(f"/v1{path}", endpoint, name=name, **more)
        super().add_api_route(f"/v1/collections/{{collection}}{path}", endpoint, name=f"{name}_in_collection", **more)


class SingleRoutes(Routes):
    """Routes of the whole service, which are there once, at their own paths."""

    def add_api_route(self, path: str, endpoint: Callable[..., Any], **more: Any) -> None:
        APIRouter.add_api_route(self, path, endpoint, **more)


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def collection_of(request: Request) -> Collection:
    """The collection in the path; `default` where it names none. Raises ApiError 404."""
    return service_of(request).collections.get(request.path_params.get("collection", DEFAULT_COLLECTION))


async def body_of(request: Request, body: openapi.Body, collection: Collection) -> Sent:
    settings = collection.settings
    most = settings.max_images if body.many else 1
    raw = settings.max_probes if body.batch else most * len(body.files)
    with collection.metrics.stage("read"):
        return await read(request, body, most, collection.model.dimension, raw)


def expected(collection: Collection, if_match: str | None) -> int | None:
    """The revision in If-Match; None: any. An earlier collection's ETag fits none. Raises ApiError 422."""
    if if_match is None or if_match.strip() == "*":
        return None
    found = re.fullmatch(r'"(?:([0-9a-f]{8})-)?([0-9]{1,18})"', if_match.strip())
    if found is None:
        raise invalid(("If-Match", "this is not the ETag of a subject; send the one that came with it, or *"))
    return int(found[2]) if found[1] in (None, collection.gallery.uid[:8]) else ANOTHERS


def etag(collection: Collection, revision: int) -> str:
    """Of a subject; what was read of a dropped collection does not fit the next one of its name."""
    return f'"{collection.gallery.uid[:8]}-{revision}"'


def tagged(collection: Collection, response: Response, answer: Revised) -> Revised:
    """The answer, with the subject's ETag among the headers."""
    response.headers["etag"] = etag(collection, answer.revision)
    return answer


async def compute(request: Request, work: Callable[[], T]) -> T:
    """Run `work` in the pool, off the event loop; what it logs and traces is the request's."""
    within = contextvars.copy_context().run
    return await asyncio.get_running_loop().run_in_executor(request.app.state.pool, within, work)


async def change(request: Request, response: Response, work: Callable[[], tuple[T, bool]]) -> T:
    """`compute` for a change, which also says whether the answer is that of an earlier request with the same key."""
    answer, replayed = await compute(request, work)
    if replayed:
        response.headers["Idempotent-Replayed"] = "true"
    return answer


def as_json(answer: schemas.Answer) -> Response:
    """FastAPI would check an answer of its own type once more before writing it."""
    return Response(answer.model_dump_json(), media_type="application/json")
