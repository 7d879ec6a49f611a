"""The routes of collections: list, create, describe, drop."""

from typing import Any

from fastapi import Request, Response

from serving.access.scopes import Needs, Scope, authorise, needs
from serving.answering.collections import Collection
from serving.api.bodies import read_document
from serving.api.requests import Key, SingleRoutes, change, collection_of, service_of
from serving.wire import openapi, operations, requests
from serving.wire.parsing import idempotency_key, read_json

collections = SingleRoutes("collections")


@collections.get("/v1/collections", name="collections")
@needs("read", of="own")
async def list_(request: Request) -> operations.CollectionsAnswer:
    """The collections, by name. `default` is the one that paths without a collection mean."""
    found = [
        operations.CollectionFacts(**_facts(collection))
        for collection in service_of(request).collections.all()
        if request.state.caller.reaches(collection.name)
    ]
    return operations.CollectionsAnswer(collections=found, request_id=request.state.request_id)


@collections.post("/v1/collections", status_code=201, openapi_extra=openapi.COLLECTION)
@needs("admin", of="own")
async def create_collection(request: Request, response: Response, key: Key = None) -> operations.CollectionAnswer:
    """Begin an empty collection, in a file of its own, for vectors of one of the models that the service has loaded."""
    document, every = await read_document(request), service_of(request).collections
    body = read_json(requests.CollectionRequest, document)
    request.state.collection = body.name
    authorise(request.state.caller, Needs(Scope.ADMIN), body.name)
    once = idempotency_key(key, "POST collection", body.name, [document])
    return _described(request, await change(request, response, lambda: every.create(body.name, body.model_id, once)))


@collections.get("/v1/collections/{collection}", name="collection")
@needs("read")
async def get(request: Request) -> operations.CollectionAnswer:
    """What a collection holds, and the model that it is pinned to."""
    return _described(request, collection_of(request))


@collections.delete("/v1/collections/{collection}", status_code=204)
@needs("admin")
async def drop_collection(request: Request, response: Response, key: Key = None) -> None:
    """Remove a collection and all that is enrolled in it, with its files. It cannot be undone."""
    every, name = service_of(request).collections, request.path_params["collection"]
    once = idempotency_key(key, "DELETE collection", name, ())
    await change(request, response, lambda: (None, every.drop(name, once)))


def _described(request: Request, collection: Collection) -> operations.CollectionAnswer:
    return operations.CollectionAnswer(**_facts(collection), request_id=request.state.request_id)


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
