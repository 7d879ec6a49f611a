"""Reads the bodies of requests: forms with images, JSON with embeddings. Limits come first, parsing after.

What has been read is plain data, so that the rooms below know nothing of the web framework.
"""

import sys
from collections.abc import Mapping

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from serving.errors import ApiError, invalid
from serving.wire.openapi import BULK_TYPES, Body
from serving.wire.parsing import JSON, RAW, Sent

MAX_FIELD_BYTES = 4096
# A number in JSON: 17 digits with sign, point and exponent take 24 bytes; the rest is for separators and indentation.
JSON_BYTES_A_NUMBER = 64


class _MemoryParser(MultiPartParser):
    """Keeps files in memory, whose size the Guard bounds: no image of a face ends in a temporary file."""

    spool_max_size = sys.maxsize


async def read(request: Request, body: Body, most: int, dimension: int, raw: int) -> Sent:
    """The body of a request: a multipart form, or embeddings as JSON or bytes, unparsed.

    Args:
        most: images of a part, and so vectors in JSON, of `dimension` numbers each.
        raw: vectors as bytes.

    Raises:
        ApiError: another content type, too large, incomplete, or not the parts that the route takes.
    """
    kind = _content_type(request)
    try:
        if kind == JSON and body.model is not None:
            return await _json(request, most * len(body.files), dimension, body.beside)
        if kind == RAW and body.model is not None:
            return await _raw(request, body, raw, dimension)
        if kind == "multipart/form-data":
            return await _form(request, body, most)
    except ClientDisconnect as error:
        raise ApiError(400, "body_incomplete", "the connection ended before the body did") from error
    embeddings = {JSON: "embeddings", RAW: "embeddings as float32"}
    raise _unsupported(kind, {"multipart/form-data": "images"} | (embeddings if body.model else {}))


async def read_document(request: Request, limit: int = 4096) -> bytes:
    """A JSON document without embeddings, unparsed, of at most `limit` bytes. Raises ApiError."""
    if (kind := _content_type(request)) != JSON:
        raise _unsupported(kind, {JSON: "an object"})
    try:
        return (await _json(request, 0, 0, limit)).document or b""
    except ClientDisconnect as error:
        raise ApiError(400, "body_incomplete", "the connection ended before the body did") from error


async def read_bulk(request: Request) -> Sent:
    """The body of a bulk enrolment, unparsed; its size was bounded by the Guard.

    Raises:
        ApiError: another content type, or incomplete.
    """
    kind = _content_type(request)
    if kind not in BULK_TYPES:
        raise _unsupported(kind, BULK_TYPES)
    try:
        return Sent(document=await request.body(), kind=kind)
    except ClientDisconnect as error:
        raise ApiError(400, "body_incomplete", "the connection ended before the body did") from error


def _content_type(request: Request) -> str:
    """Raises ApiError 415 for a body that is compressed or in another charset than UTF-8."""
    kind, *parameters = [part.strip().lower() for part in request.headers.get("content-type", "").split(";")]
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "compressed_body", "compressed bodies are not read; send it without Content-Encoding")
    pairs = [parameter.partition("=") for parameter in parameters]
    charsets = [value.strip(' \t"') for name, _, value in pairs if name.strip() == "charset"]
    if any(charset not in ("utf-8", "utf8", "us-ascii") for charset in charsets):
        raise ApiError(
            415, "unsupported_charset", f"charset '{charsets[0][:40]}' is not read; send UTF-8, and leave charset out"
        )
    return kind


def _unsupported(kind: str, allowed: Mapping[str, str]) -> ApiError:
    told = ", ".join(f"{name} ({what})" for name, what in allowed.items())
    message = f"content type '{kind[:80]}' is not read here; allowed: {told}"
    return ApiError(415, "unsupported_type", message, {"sent": kind[:80], "allowed": list(allowed)})


async def _json(request: Request, vectors: int, dimension: int, beside: int) -> Sent:
    limit = beside + JSON_BYTES_A_NUMBER * vectors * dimension
    if (document := await _at_most(request, limit)) is not None:
        return Sent(document=document)
    room = f", room for {vectors} embeddings of {dimension} numbers; send fewer" if vectors else "; send less"
    message = f"a JSON body of at most {limit} bytes is read here{room}"
    raise ApiError(413, "json_too_large", message, {"max_bytes": limit}, {"connection": "close"})


async def _raw(request: Request, body: Body, vectors: int, dimension: int) -> Sent:
    fields = dict(request.query_params)
    for name in fields:
        if name not in body.query or len(request.query_params.getlist(name)) > 1:
            raise invalid((name, f"no parameter of this name, or a second one; allowed once: {', '.join(body.query)}"))
    limit = 4 * vectors * dimension
    if (document := await _at_most(request, limit)) is not None:
        return Sent(document=document, kind=RAW, fields=fields)
    message = f"at most {vectors} embeddings of {dimension} float32, {limit} bytes, are read here; send fewer"
    raise ApiError(413, "raw_too_large", message, {"max_bytes": limit}, {"connection": "close"})


async def _at_most(request: Request, limit: int) -> bytes | None:
    """The body; None, and unread from there on, where it has more bytes than `limit`."""
    announced = request.headers.get("content-length", "0")
    document = bytearray()
    if not announced.isdigit() or int(announced) <= limit:
        async for piece in request.stream():
            document += piece
            if len(document) > limit:
                return None
        return bytes(document)
    return None


async def _form(request: Request, body: Body, most: int) -> Sent:
    in_all = most * len(body.files)
    parser = _MemoryParser(
        request.headers,
        request.stream(),
        max_files=in_all,
        max_fields=len(body.form) + 1,  # one more, to name one that does not belong here
        max_part_size=MAX_FIELD_BYTES,
    )
    try:
        data = await parser.parse()
    except MultiPartException as error:
        message = f"the form cannot be read: {error.message[:200]} At most {in_all} files fit one request"
        # What is left of the body is not read.
        raise ApiError(400, "bad_form", message, headers={"connection": "close"}) from error
    sent = Sent()
    for name, value in data.multi_items():
        if isinstance(value, UploadFile):
            if name not in body.files:
                raise invalid((name, f"no file of this name belongs here; allowed: {', '.join(body.files)}"))
            sent.files.setdefault(name, []).append(await value.read())
            await value.close()
        elif name in body.files:
            raise invalid((name, "this must be a file with a file name, as curl -F name=@file sends it"))
        elif name not in body.form or name in sent.fields:
            allowed = ", ".join(body.form)
            raise invalid((name, f"no field of this name, or a second one; allowed once: {allowed}"))
        else:
            sent.fields[name] = value
    for name in body.files:
        found = len(sent.files.get(name, []))
        if found > most or (name == body.files[0] and not found):
            raise invalid((name, f"{found} files were sent; allowed: 1" + (f" to {most}" * (most > 1))))
    return sent
