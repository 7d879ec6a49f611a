"""Hostile JSON: each is small to write and dear to read carelessly."""

import json as plain
import math
from collections.abc import Callable

from tests.serving.hostile.wire import REFUSED, Attack, chunked, enrolment, http, json

MIB = 2**20
DIMENSION = 512
UNIT = plain.dumps([1.0] + [0.0] * (DIMENSION - 1)).encode()
EITHER = REFUSED | {200}  # harmless: whether it is read is a matter of taste


def _list(item: bytes, size: int) -> bytes:
    """`{"embeddings":[item,item,...]}` of about `size` bytes."""
    return b'{"embeddings":[' + b",".join([item] * (size // (len(item) + 1))) + b"]}"


def _probe(embedding: bytes, rest: bytes = b"") -> bytes:
    return b'{"embedding":' + embedding + rest + b"}"


# Bodies of an enrolment. What is shorter than a MiB has room where 32 vectors of 512 numbers have it, and is parsed.
PARSED = MIB - 1000
_UNITS = {
    "ones": b"1",
    "empty lists": b"[]",
    "empty objects": b"{}",
    "nulls": b"null",
    "short strings": b'"a"',
    "lists of one number": b"[1]",
    "lists of a fault": b'[""]',
    "good vectors": UNIT,
}
_ENROLMENTS: dict[str, Callable[[], bytes]] = {
    **{f"{name}, 1 MiB": lambda unit=unit: _list(unit, PARSED) for name, unit in _UNITS.items()},
    "ones, 4 MiB": lambda: _list(b"1", 4 * MIB),
    "ones, 30 MiB": lambda: _list(b"1", 30 * MIB),
    "good vectors, 30 MiB": lambda: _list(UNIT, 30 * MIB),
    "33 good vectors": lambda: _list(UNIT, 33 * (len(UNIT) + 1)),
    "one vector of 1 MiB": lambda: b'{"embeddings":[' + UNIT[:-1] + b",0" * (PARSED // 2 - len(UNIT)) + b"]]}",
    "32 vectors of 8192 faults": lambda: _list(b"[" + b",".join([b'""'] * 8192) + b"]", 32 * 8192 * 3),
    "lists in lists": lambda: b'{"embeddings":' + b"[" * PARSED,
    "lists in lists, closed": lambda: b'{"embeddings":' + b"[" * 400_000 + b"]" * 400_000 + b"}",
    "objects in objects": lambda: b'{"embeddings":' * 60_000 + b"1" + b"}" * 60_000,
    "a text for the list": lambda: b'{"embeddings":"%b"}' % (b"A" * PARSED),
    "an object for the list": lambda: b'{"embeddings":{"0":%b}}' % UNIT,
    "a key of 1 MiB": lambda: b'{"%b":1}' % (b"A" * PARSED),
    "a key of 4 MiB": lambda: b'{"%b":1}' % (b"A" * 4 * MIB),
    "a model of 1 MiB": lambda: b'{"model_id":"%b","embeddings":[%b]}' % (b"A" * (PARSED - 4000), UNIT),
    "escapes": lambda: b'{"model_id":"%b","embeddings":[%b]}' % (rb"\u0041" * (MIB // 7), UNIT),
    "70,000 unknown keys": lambda: b'{%b,"embeddings":[1]}' % b",".join(b'"k%d":1' % k for k in range(70_000)),
    "spaces, 1 MiB": lambda: b" " * PARSED + b'{"embeddings":[]}',
    "digits, 1 MiB": lambda: b'{"embeddings":[[' + b"9" * PARSED + b"]]}",
    "a fraction of 1 MiB": lambda: b'{"embeddings":[[0.' + b"9" * PARSED + b"]]}",
}
_PROBES: dict[str, tuple[Callable[[], bytes], frozenset[int]]] = {
    "1e999": (lambda: _probe(UNIT.replace(b"1.0", b"1e999")), REFUSED),
    "1e-999999999": (lambda: _probe(UNIT.replace(b"0.0", b"1e-999999999")), EITHER),
    "a number of 30,000 digits": (lambda: _probe(b"[" + b"9" * 30_000 + b"]"), REFUSED),
    "a fraction of 30 KiB": (lambda: _probe(UNIT.replace(b"1.0", b"0." + b"9" * 30_000)), EITHER),
    "top_k of 30,000 digits": (lambda: _probe(UNIT, b',"top_k":' + b"9" * 30_000), REFUSED),
    "top_k 1e5": (lambda: _probe(UNIT, b',"top_k":1e5'), REFUSED),
    "top_k true": (lambda: _probe(UNIT, b',"top_k":true'), EITHER),
    "NaN": (lambda: _probe(UNIT.replace(b"1.0", b"NaN")), REFUSED),
    "-Infinity": (lambda: _probe(UNIT.replace(b"1.0", b"-Infinity")), REFUSED),
    "not quite a unit vector": (lambda: _probe(UNIT.replace(b"1.0", b"%.3f" % math.sqrt(2))), REFUSED),
    "numbers as text": (lambda: _probe(UNIT.replace(b"1.0", b'"1.0"')), EITHER),
    "3,000 equal keys": (lambda: b"{" + b'"top_k":5,' * 3_000 + b'"embedding":' + UNIT + b"}", EITHER),
    "not UTF-8": (lambda: _probe(UNIT, b',"model_id":"\xff\xfe\xc0\x80"'), REFUSED),
    "UTF-16": (lambda: _probe(UNIT).decode().encode("utf-16"), REFUSED),
    "half a surrogate": (lambda: _probe(UNIT, rb',"model_id":"\ud800"'), REFUSED | {409}),
    "NUL": (lambda: _probe(UNIT, rb',"model_id":"\u0000"'), REFUSED | {409}),
    "something behind": (lambda: _probe(UNIT) + b"{}", REFUSED),
    "one brace": (lambda: b"{", REFUSED),
    "null": (lambda: b"null", REFUSED),
    "a comment": (lambda: _probe(UNIT, b"/* */"), REFUSED),
}
_HEADS = {
    "gzip": "Content-Encoding: gzip",
    "many encodings": "Content-Encoding: " + "gzip, " * 1000 + "gzip",
    "an undefined charset": "X-A: b\r\nContent-Type: application/json; charset=undefined",
}

DOCUMENTS = {
    **{
        f"identify {name}": Attack(lambda make=make: json(make()), allowed) for name, (make, allowed) in _PROBES.items()
    },
    **{
        f"JSON with {name}": Attack(
            lambda head=head: http("POST", "/v1/identify", _probe(UNIT), head, "Content-Type: application/json"), EITHER
        )
        for name, head in _HEADS.items()
    },
    "embed JSON": Attack(lambda: json(b"{}", "/v1/embed")),
}
LARGE_DOCUMENTS = {
    **{f"enrol {name}": Attack(lambda make=make: enrolment(make())) for name, make in _ENROLMENTS.items()},
    "verify ones, 60 KiB": Attack(lambda: json(b'{"probe":[' + b"1," * 30_000 + b"1]}", "/v1/verify")),
    "verify faults, 60 KiB": Attack(lambda: json(b'{"probe":[' + b"[]," * 20_000 + b"1]}", "/v1/verify")),
    "ones in chunks": Attack(
        lambda: chunked(_list(b"1", PARSED), 2**10, "/v1/subjects/bomb/samples", "application/json")
    ),
    "spaces in one chunk": Attack(lambda: chunked(b" " * 4 * MIB, 4 * MIB, kind="application/json")),
}
