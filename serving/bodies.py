"""Reads the bodies of requests: forms with images, JSON with embeddings. Limits come first, parsing after.

What has been read is plain data (`Form` or bytes), so that the rooms below know nothing of the web framework.
"""

import sys
from dataclasses import dataclass

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from serving.errors import ApiError, invalid_fields
from serving.parsing import Form, Sent

MAX_FIELD_BYTES = 4096
# A number in JSON: 17 digits with sign, point and exponent take 24 bytes; the rest is for separators and indentation.
JSON_BYTES_A_NUMBER = 64
JSON_BYTES_BESIDE = 4096


@dataclass(frozen=True)
class Expected:
    """What a route takes: files by part name with the most of each, other fields, and how many vectors as JSON."""

    files: dict[str, int]
    needed: str
    fields: tuple[str, ...] = ()
    vectors: int = 0  # 0: no JSON


class _MemoryParser(MultiPartParser):
    """Keeps files in memory, whose size the Guard bounds: no image of a face ends in a temporary file."""

    spool_max_size = sys.maxsize


async def read(request: Request, expected: Expected, dimension: int) -> Sent:
    """The body of a request: a multipart form as `expected` describes it, or a JSON document, unparsed.

    Raises:
        ApiError: another content type, too large, incomplete, or not the parts that the route takes.
    """
    kind, *parameters = [part.strip().lower() for part in request.headers.get("content-type", "").split(";")]
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "compressed_body", "compressed bodies are not read; send it without Content-Encoding")
    pairs = [parameter.partition("=") for parameter in parameters]
    charsets = [value.strip(' \t"') for name, _, value in pairs if name.strip() == "charset"]
    if any(charset not in ("utf-8", "utf8", "us-ascii") for charset in charsets):
        raise ApiError(
            415, "unsupported_charset", f"charset '{charsets[0][:40]}' is not read; send UTF-8, and leave charset out"
        )
    try:
        if kind == "application/json" and expected.vectors:
            return await _json(request, expected.vectors, dimension)
        if kind == "multipart/form-data":
            return await _form(request, expected)
    except ClientDisconnect as error:
        raise ApiError(400, "body_incomplete", "the connection ended before the body did") from error
    allowed = ["multipart/form-data", "application/json"] if expected.vectors else ["multipart/form-data"]
    told = "multipart/form-data (images)" + ", application/json (embeddings)" * bool(expected.vectors)
    raise ApiError(
        415,
        "unsupported_type",
        f"content type '{kind[:80]}' is not read here; allowed: {told}",
        {"sent": kind[:80], "allowed": allowed},
    )


async def _json(request: Request, vectors: int, dimension: int) -> bytes:
    limit = JSON_BYTES_BESIDE + JSON_BYTES_A_NUMBER * vectors * dimension
    announced = request.headers.get("content-length", "0")
    document = bytearray()
    if not announced.isdigit() or int(announced) <= limit:
        async for piece in request.stream():
            document += piece
            if len(document) > limit:
                break
        else:
            return bytes(document)
    raise ApiError(
        413,
        "json_too_large",
        f"a JSON body of at most {limit} bytes is read here, room for {vectors} embeddings of {dimension} numbers; "
        "send fewer",
        {"max_bytes": limit},
        {"connection": "close"},
    )


async def _form(request: Request, expected: Expected) -> Form:
    most = sum(expected.files.values())
    parser = _MemoryParser(
        request.headers,
        request.stream(),
        max_files=most,
        max_fields=len(expected.fields) + 1,  # one more, to name one that does not belong here
        max_part_size=MAX_FIELD_BYTES,
    )
    try:
        data = await parser.parse()
    except MultiPartException as error:
        raise ApiError(
            400,
            "bad_form",
            f"the form cannot be read: {error.message[:200]} At most {most} files fit one request",
            headers={"connection": "close"},  # what is left of the body is not read
        ) from error
    form = Form({}, {})
    for name, value in data.multi_items():
        if isinstance(value, UploadFile):
            _belongs(name, expected.files)
            form.files.setdefault(name, []).append(await value.read())
            await value.close()
        elif name in expected.files:
            raise invalid_fields([(name, "this must be a file with a file name, as curl -F name=@file sends it")])
        elif name not in expected.fields or name in form.fields:
            allowed = ", ".join(expected.fields) or "no fields"
            raise invalid_fields([(name, f"no field of this name, or a second one; allowed once: {allowed}")])
        else:
            form.fields[name] = value
    for name, number in expected.files.items():
        found = len(form.files.get(name, []))
        if found > number or (name == expected.needed and not found):
            raise invalid_fields([(name, f"{found} files were sent; allowed: 1" + (f" to {number}" * (number > 1)))])
    return form


def _belongs(name: str, files: dict[str, int]) -> None:
    if name not in files:
        raise invalid_fields([(name, f"no file of this name belongs here; allowed: {', '.join(files)}")])
