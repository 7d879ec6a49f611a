"""What the OpenAPI page shows of bodies that the service parses itself: schemas and examples."""

from typing import Any

from serving.schemas import EnrolRequest, ErrorAnswer, IdentifyRequest, Request, VerifyRequest

DESCRIPTION = """\
Verify (1:1) and identify (1:N) by embeddings, with a calibrated open-set threshold.

* **Images** go as `multipart/form-data`, **embeddings** as `application/json`.
* Every **decision** comes with its score, the threshold, and where the threshold came from. Scores at or above the
  threshold match.
* Every **error** is `{"error": {"code", "message", "details"}, "request_id"}`.
* `X-Request-ID` is taken over if sent, and always returned.
* `Idempotency-Key` on enrolment and `DELETE`: the same request under the same key is done once and answered alike.
* Candidates **below the threshold** are left out of an identification unless it asks for them, where that is allowed.

```
curl -F images=@alice.png http://127.0.0.1:8000/v1/subjects/alice/samples
curl -F image=@someone.png http://127.0.0.1:8000/v1/identify
```
"""

_STATUS = {
    400: "Not JSON, a form that cannot be read, or a Host that is not this service's",
    401: "No key was sent, or a wrong one",
    403: "Candidates below the threshold are not shown here, or a web page of another site asks",
    404: "No such subject or route",
    408: "The body came too slowly",
    409: "Embeddings of another model, a reused idempotency key, or too many samples",
    413: "The body or an image is too large",
    415: "Not an image in an allowed format, or another content type",
    422: "A value that is not allowed",
    429: "Too many requests",
    500: "A fault of the service",
    503: "Loading, overloaded or stopping, or the store cannot be reached",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text} for status, text in _STATUS.items()
}
_IMAGE = {"type": "string", "format": "binary", "description": "PNG, JPEG, WebP, TIFF, BMP, PGM …"}
_IMAGES = {"type": "array", "items": _IMAGE, "minItems": 1}
_SHORT = [0.6, 0.8]  # examples are in two dimensions to stay readable


def _body(
    form: dict[str, Any], required: list[str], model: type[Request] | None = None, example: dict[str, Any] | None = None
) -> dict[str, Any]:
    content: dict[str, Any] = {
        "multipart/form-data": {"schema": {"type": "object", "properties": form, "required": required}}
    }
    if model is not None:
        content["application/json"] = {"schema": model.model_json_schema(), "example": example}
    return {"requestBody": {"required": True, "content": content}}


VERIFY = _body(
    {"probe": _IMAGE, "reference": _IMAGE, "subject_id": {"type": "string", "description": "instead of reference"}},
    ["probe"],
    VerifyRequest,
    {"probe": _SHORT, "subject_id": "alice"},
)
IDENTIFY = _body(
    {
        "image": _IMAGE,
        "top_k": {"type": "integer", "minimum": 1, "maximum": 100, "default": 5},
        "below_threshold": {"type": "boolean", "default": False},
    },
    ["image"],
    IdentifyRequest,
    {"embedding": _SHORT, "top_k": 5},
)
ENROL = _body({"images": _IMAGES}, ["images"], EnrolRequest, {"embeddings": [_SHORT]})
EMBED = _body({"images": _IMAGES}, ["images"])
