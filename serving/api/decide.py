"""The routes that decide: identify, verify, and embed."""

import asyncio

from fastapi import Request, Response

from serving.access.scopes import needs
from serving.answering import deciding
from serving.api.requests import Routes, as_json, body_of, collection_of, compute
from serving.telemetry import tracing
from serving.wire import openapi, schemas
from serving.wire.parsing import RAW

AT_ONCE_BYTES = 64 * 1024  # of JSON that the event loop reads itself: half a millisecond
decide = Routes("decide")


@decide.post("/identify", openapi_extra=openapi.IDENTIFY.openapi(), response_model=schemas.IdentifyAnswer)
@needs("read")
async def identify(request: Request) -> Response:
    """Who is this, or is it nobody we know? `unknown` means that the best candidate stays below the threshold.

    Several images or embeddings are of one person: their mean, brought to length 1, is searched for. Where the service
    has a detector, an image is a photograph, and each of its faces is searched for.
    """
    collection = collection_of(request)
    sent = await body_of(request, openapi.IDENTIFY, collection)
    if sent.document is None or len(sent.document) > AT_ONCE_BYTES:
        asked = await compute(request, lambda: deciding.asked(collection, sent))
    else:  # sooner read than handed to another thread
        asked = deciding.asked(collection, sent)
    if asked.where is not None:
        asked = await compute(request, lambda: deciding.narrowed(collection, asked))
    waiting = [asyncio.wrap_future(collection.gallery.submit(probe)) for probe in asked.probes]
    with tracing.span("search"):
        found = [await one for one in waiting]
    answer = deciding.identified(collection, asked, found, request.state.request_id)
    faces = [candidate.subject_id for face in answer.faces for candidate in face.candidates]
    request.state.subjects = faces or [candidate.subject_id for candidate in answer.candidates]
    return as_json(answer)


@decide.post(
    "/identify/batch", openapi_extra=openapi.IDENTIFY_MANY.openapi(), response_model=schemas.IdentifyManyAnswer
)
@needs("read")
async def identify_many(request: Request) -> Response:
    """Who are these? An answer for each image or embedding; in JSON, a probe may have several embeddings."""
    collection, request_id = collection_of(request), request.state.request_id
    sent = await body_of(request, openapi.IDENTIFY_MANY, collection)
    asked = await compute(request, lambda: deciding.narrowed(collection, deciding.asked_many(collection, sent)))
    waiting = [asyncio.wrap_future(collection.gallery.submit(probe)) for probe in asked.probes]
    with tracing.span("search"):
        found = await asyncio.gather(*waiting)
    answer = await compute(request, lambda: deciding.identified_many(collection, asked, found, request_id))
    request.state.subjects = [one.subject_id for result in answer.results for one in result.candidates]
    return await compute(request, lambda: as_json(answer))


@decide.post("/verify", openapi_extra=openapi.VERIFY.openapi())
@needs("read")
async def verify(request: Request) -> schemas.VerifyAnswer:
    """Are these the same identity? Two images, an image and an enrolled subject, or the same with embeddings."""
    collection, request_id = collection_of(request), request.state.request_id
    sent = await body_of(request, openapi.VERIFY, collection)
    request.state.subjects = about = list[str]()
    return await compute(request, lambda: deciding.verify(collection, sent, request_id, about))


@decide.post(
    "/embed",
    openapi_extra=openapi.EMBED.openapi(),
    response_model=schemas.EmbedAnswer,
    responses=openapi.EMBEDDED,
)
@needs("read")
async def embed(request: Request) -> Response:
    """Unit vectors of images, to be kept by the client or sent to the other routes. Nothing is stored.

    With `Accept: application/octet-stream` they come as little-endian float32, one after the other, and the model's id
    in the header X-Model-Id.
    """
    collection = collection_of(request)
    sent = await body_of(request, openapi.EMBED, collection)
    crops = await compute(request, lambda: deciding.embed(collection, sent))
    if RAW in request.headers.get("accept", ""):
        headers = {"x-model-id": collection.model.model_id}
        content = b"".join(crop.vector_D.astype("<f4").tobytes() for crop in crops)
        return Response(content, media_type=RAW, headers=headers)
    return as_json(deciding.embedded(collection, crops, request.state.request_id))
