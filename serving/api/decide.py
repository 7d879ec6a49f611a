"""The routes that decide: identify, verify, and embed."""

import asyncio
import functools

from fastapi import Request, Response

from serving import deciding, openapi, schemas
from serving.api.requests import Routes, as_json, body_of, collection_of, compute

AT_ONCE_BYTES = 64 * 1024  # of JSON that the event loop reads itself: half a millisecond
decide = Routes("decide")


@decide.post("/identify", openapi_extra=openapi.IDENTIFY.openapi(), response_model=schemas.IdentifyAnswer)
async def identify(request: Request) -> Response:
    """Who is this, or is it nobody we know? `unknown` means that the best candidate stays below the threshold."""
    collection = collection_of(request)
    sent = await body_of(request, openapi.IDENTIFY, collection)
    if sent.document is None or len(sent.document) > AT_ONCE_BYTES:
        probe, below = await compute(request, functools.partial(deciding.probe, collection, sent))
    else:  # sooner read than handed to another thread
        probe, below = deciding.probe(collection, sent)
    found = await asyncio.wrap_future(collection.gallery.submit(probe))
    return as_json(deciding.identified(collection, found, below, request.state.request_id))


@decide.post("/verify", openapi_extra=openapi.VERIFY.openapi())
async def verify(request: Request) -> schemas.VerifyAnswer:
    """Are these the same identity? Two images, an image and an enrolled subject, or the same with embeddings."""
    collection = collection_of(request)
    sent = await body_of(request, openapi.VERIFY, collection)
    return await compute(request, functools.partial(deciding.verify, collection, sent, request.state.request_id))


@decide.post("/embed", openapi_extra=openapi.EMBED.openapi())
async def embed(request: Request) -> schemas.EmbedAnswer:
    """Unit vectors of images, to be kept by the client or sent to the other routes. Nothing is stored."""
    collection = collection_of(request)
    sent = await body_of(request, openapi.EMBED, collection)
    return await compute(request, functools.partial(deciding.embed, collection, sent, request.state.request_id))
