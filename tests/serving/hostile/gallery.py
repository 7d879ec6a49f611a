"""Hostile bodies, names and headers for batches, bytes, metadata, merges, jobs and collections."""

import json as plain
import struct
from collections.abc import Callable
from urllib.parse import quote

from tests.serving.hostile.documents import DIMENSION, EITHER, UNIT
from tests.serving.hostile.wire import REFUSED, Attack, chunked, http, json

MIB = 2**20
RAW = "Content-Type: application/octet-stream"
UNIT_BYTES = struct.pack(f"<{DIMENSION}f", 1.0, *[0.0] * (DIMENSION - 1))
GONE = REFUSED | {404}
ONE_FILE = GONE | {405, 409}  # the service keeps one collection

_BYTES: dict[str, bytes] = {
    "nothing": b"",
    "a byte": b"\0",
    "a byte short": UNIT_BYTES[:-1],
    "a byte more": UNIT_BYTES + b"\0",
    "NaN": struct.pack("<f", float("nan")) * DIMENSION,
    "infinities": struct.pack("<f", float("inf")) * DIMENSION,
    "the largest numbers": struct.pack("<f", 3.4e38) * DIMENSION,
    "denormal numbers": struct.pack("<f", 1e-45) * DIMENSION,
    "zeros": bytes(4 * DIMENSION),
    "33 embeddings": UNIT_BYTES * 33,
    "opposites": UNIT_BYTES + struct.pack(f"<{DIMENSION}f", -1.0, *[0.0] * (DIMENSION - 1)),
}
_QUERIES = {
    "top_k of 5,000 digits": "top_k=" + "9" * 5000,
    "top_k in other digits": "top_k=%D9%A3",
    "an unknown one": "top_q=1",
    "one twice": "top_k=1&top_k=2",
    "10,000 of them": "&".join(f"k{n}=1" for n in range(5000)),
    "fpir NaN": "fpir=NaN",
    "fpir 1e-320": "fpir=1e-320",
    "where of brackets": "where=" + "[" * 30_000,
    "where a list": "where=[]",
    "where NUL": "where=" + quote('{"a": "\\u0000"}') + "&top_k=0",
    "where not UTF-8": "where=%ff%fe",
    "a model of 60 KiB": "model_id=" + "A" * 60_000,
}
_METADATA: dict[str, Callable[[], bytes]] = {
    "lists in lists": lambda: b'{"a":' + b"[" * 100_000,
    "objects in objects": lambda: b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    "70,000 keys": lambda: b"{" + b",".join(b'"k%d":1' % k for k in range(20_000)) + b"}",
    "a key of 200 KiB": lambda: b'{"%b":1}' % (b"A" * 200_000),
    "a text of 200 KiB": lambda: b'{"a":"%b"}' % (b"A" * 200_000),
    "digits": lambda: b'{"a":%b}' % (b"9" * 200_000),
    "a fraction": lambda: b'{"a":0.%b}' % (b"9" * 200_000),
    "1e999": lambda: b'{"a":1e999}',
    "NaN": lambda: b'{"a":NaN}',
    "half a surrogate": lambda: rb'{"a":"\ud800"}',
    "half a surrogate as a key": lambda: rb'{"\ud800":1}',
    "a list": lambda: b'{"a":[1]}',
    "no key": lambda: b'{"":1}',
    "33 keys": lambda: plain.dumps({f"k{n}": n for n in range(33)}).encode(),
    "4 MiB": lambda: b'{"a":"%b"}' % (b"A" * 4 * MIB),
}
_NAMES = {
    **{"two dots": "..", "two dots, encoded": "%2e%2e", "a slash": "a%2fb", "a path": "..%2f..%2fetc", "NUL": "a%00"},
    **{"capitals": "Default", "60 KiB": "a" * 60_000, "a line end": "a%0d%0ab", "not UTF-8": "%ff", "a dot": "a.db"},
    **{"full width": quote("\uff44efault"), "right to left": quote("a\u202eb"), "nothing": "", "a space": "%20"},
}
_TAGS = {
    **{
        "weak": 'W/"1"',
        "two": '"1", "2"',
        "no number": '"x"',
        "digits": f'"{"9" * 5000}"',
        "unended": '"1',
        "NUL": '"\x01"',
    },
    **{"other digits": '"\xb2"', "below 0": '"-1"'},
}


def _raw(body: bytes, target: str) -> bytes:
    return http("POST", target, body, RAW)


def _patch(metadata: bytes) -> bytes:
    return json(b'{"metadata":' + metadata + b"}", "/v1/subjects/nobody", "PATCH")


def _enrol(metadata: bytes) -> bytes:
    return json(b'{"embeddings":[' + UNIT + b'],"metadata":' + metadata + b"}", "/v1/subjects/bomb/samples")


GALLERY = {
    **{
        f"identify by bytes: {name}": Attack(lambda body=body: _raw(body, "/v1/identify"))
        for name, body in _BYTES.items()
    },
    **{
        f"enrol by bytes: {name}": Attack(lambda body=body: _raw(body, "/v1/subjects/bomb/samples"), EITHER | {201})
        for name, body in _BYTES.items()
        if name == "opposites"
    },
    **{
        f"verify by bytes: {name}": Attack(lambda body=body: _raw(body, "/v1/verify"), EITHER)
        for name, body in _BYTES.items()
    },
    **{
        f"identify by bytes, {name}": Attack(lambda query=query: _raw(UNIT_BYTES, f"/v1/identify?{query}"))
        for name, query in _QUERIES.items()
    },
    **{
        f"a collection's name: {name}": Attack(
            lambda name=name: http("GET", f"/v1/collections/{name}/subjects"), GONE | {405}
        )
        for name in _NAMES.values()
    },
    **{
        f"a collection to create: {name}": Attack(
            lambda name=name: json(plain.dumps({"name": name}).encode(), "/v1/collections"), ONE_FILE
        )
        for name in ("..", "a/b", "A", "a\0", "\ud800", "a" * 3000, "default")
    },
    **{
        f"If-Match {name}": Attack(
            lambda tag=tag: http("DELETE", "/v1/subjects/nobody", b"", f"If-Match: {tag}"), GONE | {412}
        )
        for name, tag in _TAGS.items()
    },
    "merge into itself": Attack(lambda: json(b'{"subject_id":"a"}', "/v1/subjects/a/merge"), GONE),
    "merge with a path": Attack(lambda: json(b'{"subject_id":"../a"}', "/v1/subjects/a/merge"), GONE),
    "a job of nobody": Attack(lambda: http("GET", "/v1/jobs/" + "%00" * 1000), GONE),
    "a sample of 60 KiB": Attack(lambda: http("GET", "/v1/subjects/a/samples/" + "a" * 60_000), GONE),
    "duplicates below nothing": Attack(lambda: json(b'{"threshold":-1e999}', "/v1/duplicates")),
    "duplicates without end": Attack(lambda: json(b'{"limit":1e300}', "/v1/duplicates")),
    "where of 4 KiB of brackets": Attack(lambda: http("GET", "/v1/subjects?where=" + "%5B" * 4000)),
    "256 probes and one": Attack(lambda: _raw(UNIT_BYTES * 257, "/v1/identify/batch")),
    "33 probes": Attack(
        lambda: json(b'{"probes":[' + b",".join([b'{"embedding":%b}' % UNIT] * 33) + b"]}", "/v1/identify/batch")
    ),
    "no probes": Attack(lambda: json(b'{"probes":[]}', "/v1/identify/batch")),
    "probes of nothing": Attack(lambda: json(b'{"probes":[' + b"{}," * 300_000 + b"{}]}", "/v1/identify/batch")),
    "probes in probes": Attack(lambda: json(b'{"probes":' + b"[" * 900_000, "/v1/identify/batch")),
}
LARGE_GALLERY = {
    **{f"patch with {name}": Attack(lambda make=make: _patch(make()), GONE) for name, make in _METADATA.items()},
    **{
        f"enrol with metadata of {name}": Attack(
            lambda make=make: _enrol(make()), EITHER | {201} if name == "a fraction" else REFUSED
        )
        for name, make in _METADATA.items()
    },
    "30 MiB of bytes": Attack(lambda: _raw(bytes(30 * MIB), "/v1/identify")),
    "30 MiB of bytes in chunks": Attack(
        lambda: chunked(bytes(30 * MIB), 2**16, "/v1/identify/batch", "application/octet-stream")
    ),
    "duplicates with a body of 4 MiB": Attack(lambda: json(b" " * 4 * MIB + b"{}", "/v1/duplicates")),
}
