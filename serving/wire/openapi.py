"""What the OpenAPI page says beside the schemas: bodies that the service reads itself, errors, and a description."""

from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from serving.access.scopes import COLLECTION as NAME
from serving.wire import requests, schemas
from serving.wire.parsing import JSON, RAW

# Neither key nor limits: they cost nothing and say nothing about anybody. With a key, /readyz says more; the others do
# not look at it, so that an orchestrator with a wrong key does not take a living service for a dead one.
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/docs", "/docs/oauth2-redirect", "/openapi.json"})
DESCRIPTION = """\
Verify (1:1) and identify (1:N) by embeddings, with a calibrated open-set threshold.

* **Images** go as `multipart/form-data`, **embeddings** as `application/json` or, faster, as
  `application/octet-stream`: little-endian float32, one embedding after the other, and all else in the query.
* **Collections** are galleries apart from each other. Every path below `/v1` means the collection `default`, and is
  there below `/v1/collections/{collection}` as well.
* Every **decision** comes with its score, the threshold, and where the threshold came from. Scores at or above the
  threshold match.
* Every **error** is `{"error": {"code", "message", "details"}, "request_id"}`.
* `X-Request-ID` is taken over if sent, and always returned.
* `Idempotency-Key` on every change: the same request under the same key is done once and answered alike.
* Candidates **below the threshold** are left out of an identification unless it asks for them, where that is allowed.

```
curl -F images=@alice.png http://127.0.0.1:8000/v1/subjects/alice/samples
curl -F image=@someone.png http://127.0.0.1:8000/v1/identify
```
"""

_STATUS = {
    400: "Not JSON, a form that cannot be read, or a Host that is not this service's",
    401: "No key was sent, or a wrong one",
    403: "The key is not for this, candidates below the threshold are not shown, or a web page of another site asks",
    404: "No such subject or route",
    408: "The body came too slowly",
    409: "The last sample of a subject, embeddings of another model, a reused idempotency key, or too many samples",
    412: "The subject was changed since the revision in If-Match",
    413: "The body or an image is too large",
    415: "Not an image in an allowed format, another content type, or images for a model that reads none",
    422: "A value that is not allowed",
    429: "Too many requests",
    500: "A fault of the service",
    503: "Loading, overloaded or stopping, or the store cannot be reached",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.ErrorAnswer, "description": text} for status, text in _STATUS.items()
}
_COLLECTION = {
    "name": "collection",
    "in": "path",
    "required": True,
    "description": "1 to 63 of a-z, 0-9, - and _",
    "schema": {"type": "string", "pattern": f"^{NAME}$"},
    "example": "default",
}
_BEARER = {"type": "http", "scheme": "bearer", "description": "The key that the operator gave out."}
METADATA_BYTES = 256 * 1024  # of JSON; in escapes, 4096 bytes are six times as many
_FLOATS = "embeddings, one after the other, in little-endian float32"
_IMAGE = {"type": "string", "format": "binary", "description": "PNG, JPEG, WebP, TIFF, BMP, PGM …"}


@dataclass(frozen=True)
class Body:
    """The body of a request, which the service reads itself: a form with files and fields, or embeddings.

    Attributes:
        files: names of the parts with images; the first is needed.
        fields: the form's other fields, with their schemas; of embeddings as bytes they are the query.
        model: of the JSON; None where only images are taken, and no embeddings as bytes either.
        example: of the JSON.
        many: as many images or embeddings as the service allows; otherwise one a part.
        batch: as many embeddings as bytes as it allows in a batch.
        faces: what the form's field `face` may be: which faces of a photograph are meant; the first is the default.
        beside: bytes of JSON beside the embeddings.
    """

    files: tuple[str, ...]
    fields: dict[str, Any] = field(default_factory=dict)
    model: type[requests.Request] | None = None
    example: dict[str, Any] | None = None
    many: bool = False
    batch: bool = False
    faces: tuple[str, ...] = ("only", "largest")
    beside: int = 4096

    @property
    def form(self) -> dict[str, Any]:
        """The form's fields."""
        told = "which face of a photograph, where the service has a detector"
        return self.fields | {"face": {"enum": list(self.faces), "default": self.faces[0], "description": told}}

    @property
    def query(self) -> dict[str, Any]:
        """The query of embeddings as bytes."""
        return self.fields | {"model_id": {"type": "string", "description": "the model that made the embeddings"}}

    def openapi(self) -> dict[str, Any]:
        """What the OpenAPI page shows of it."""
        image = {"type": "array", "items": _IMAGE, "minItems": 1} if self.many else _IMAGE
        form = {"type": "object", "properties": dict.fromkeys(self.files, image) | self.form}
        content: dict[str, Any] = {"multipart/form-data": {"schema": form | {"required": [self.files[0]]}}}
        if self.model is None:
            return {"requestBody": {"required": True, "content": content}}
        content[JSON] = {"schema": self.model.model_json_schema(), "example": self.example}
        content[RAW] = {"schema": {"type": "string", "format": "binary", "description": _FLOATS}}
        parameters = [
            {"name": name, "in": "query", "schema": schema, "description": f"with {RAW} only"}
            for name, schema in self.query.items()
        ]
        return {"requestBody": {"required": True, "content": content}, "parameters": parameters}


def json_body(model: type[BaseModel], example: dict[str, Any]) -> dict[str, Any]:
    """A body that is JSON and nothing else."""
    content = {JSON: {"schema": model.model_json_schema(), "example": example}}
    return {"requestBody": {"required": True, "content": content}}


def completed(document: dict[str, Any], keyed: bool) -> dict[str, Any]:
    """The document with what the routes read themselves: the collection in a path, and the key that the Guard asks."""
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if "{collection}" in path:
                operation["parameters"] = [_COLLECTION, *operation.get("parameters", [])]
            if keyed and path not in OPEN_PATHS:
                operation["security"] = [{"HTTPBearer": []}]
    if keyed:
        document["components"]["securitySchemes"] = {"HTTPBearer": _BEARER}
    return document


_SHORT = [0.6, 0.8]  # examples are in two dimensions to stay readable
_OPTIONS = {
    name: {key: value for key, value in schema.items() if key != "title"}
    for name, schema in requests.Options.model_json_schema()["properties"].items()
}
VERIFY = Body(
    ("probe", "reference"),
    {"subject_id": {"type": "string", "description": "instead of reference"}},
    requests.VerifyRequest,
    {"probe": _SHORT, "subject_id": "alice"},
)
IDENTIFY = Body(
    ("image",),
    _OPTIONS,
    requests.IdentifyRequest,
    {"embedding": _SHORT, "top_k": 5},
    many=True,
    faces=("all", "only", "largest"),
)
IDENTIFY_MANY = Body(
    ("images",),
    _OPTIONS,
    requests.IdentifyManyRequest,
    {"probes": [{"embedding": _SHORT}, {"embeddings": [_SHORT, [1, 0]]}]},
    many=True,
    batch=True,
)
ENROL = Body(
    ("images",),
    {"metadata": {"type": "string", "description": "of the subject, in place of what it has; as JSON"}},
    requests.EnrolRequest,
    {"embeddings": [_SHORT], "metadata": {"site": "north"}},
    many=True,
    beside=METADATA_BYTES,
)
PATCH = json_body(requests.SubjectPatch, {"metadata": {"site": "south", "note": None}})
MERGE = json_body(requests.MergeRequest, {"subject_id": "alice-2"})
EMBED = Body(("images",), many=True, faces=("all", "only", "largest"))
EMBEDDED: dict[int | str, dict[str, Any]] = {
    200: {"content": {RAW: {"schema": {"type": "string", "format": "binary", "description": _FLOATS}}}}
}
IMAGE: dict[int | str, dict[str, Any]] = {200: {"content": {RAW: {"schema": {"type": "string", "format": "binary"}}}}}
_LINES = '{"subject_id": "alice", "embeddings": [[0.6, 0.8]]}\n{"subject_id": "bob", "embeddings": [[1, 0]]}\n'
DUPLICATES = json_body(requests.DuplicatesRequest, {"limit": 100})
COLLECTION = json_body(requests.CollectionRequest, {"name": "staff"})
BULK_TYPES = {
    "application/x-ndjson": "a line of JSON for each subject",
    RAW: "a line of JSON with all subjects, then the embeddings",
}
_AFTER_HEADER = (
    "a line of JSON as `contentSchema` says, ended by a newline; then the embeddings, one after the other, in "
    "little-endian float32"
)
_BULK_BODIES: dict[str, Any] = {
    "application/x-ndjson": {
        "schema": {"type": "string", "contentSchema": requests.BulkItem.model_json_schema()},
        "example": _LINES,
    },
    RAW: {
        "schema": {
            "type": "string",
            "format": "binary",
            "description": _AFTER_HEADER,
            "contentSchema": requests.BulkHeader.model_json_schema(),
        },
    },
}
BULK = {"requestBody": {"required": True, "content": _BULK_BODIES}}
