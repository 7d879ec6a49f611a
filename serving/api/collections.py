"""The routes of collections: list, create, describe, drop."""

import functools
from typing import Any

from fastapi import Request

from serving import openapi, schemas
from serving.api.requests import SingleRoutes, collection_of, compute, service_of
from serving.bodies import read_document
from serving.collections import Collection
from serving.parsing import read_json

collections = SingleRoutes("collections")


@collections.get("/v1/collections", name="collections")
async def list_(request: Request) -> schemas.CollectionsAnswer:
    """The collections, by name. `default` is the one that paths without a collection mean."""
    found = [schemas.CollectionFacts(**_facts(collection)) for collection in service_of(request).collections.all()]
    return schemas.CollectionsAnswer(collections=found, request_id=request.state.request_id)


@collections.post("/v1/collections", status_code=201, openapi_extra=openapi.COLLECTION)
async def create_collection(request: Request) -> schemas.CollectionAnswer:
    """Begin an empty collection, in a file of its own, for vectors of one of the models that the service has loaded."""
    body = read_json(schemas.CollectionRequest, await read_document(request))
    create = functools.partial(service_of(request).collections.create, body.name, body.model_id)
    return _described(request, await compute(request, create))


@collections.get("/v1/collections/{collection}", name="collection")
async def get(request: Request) -> schemas.CollectionAnswer:
    """What a collection holds, and the model that it is pinned to."""
    return _described(request, collection_of(request))


@collections.delete("/v1/collections/{collection}", status_code=204)
async def drop_collection(request: Request) -> None:
    """Remove a collection and all that is enrolled in it, with its files. It cannot be undone."""
    service, name = service_of(request), collection_of(request).name
    await compute(request, functools.partial(service.collections.drop, name))


def _described(request: Request, collection: Collection) -> schemas.CollectionAnswer:
    return schemas.CollectionAnswer(**_facts(collection), request_id=request.state.request_id)


def _facts(collection: Collection) -> dict[str, Any]:
    gallery = collection.gallery
    return {
        "name": collection.name,
        "model_id": gallery.model_id,
        "dimension": gallery.dimension,
        "state": gallery.status().state,
        "subjects": gallery.size,
        "samples": gallery.samples,
        "revision": gallery.revision,
    }
