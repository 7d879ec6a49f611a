"""Many subjects in one request: each item for itself, all that can be in one change."""

import json
import tracemalloc

import numpy as np
import pytest

from serving.answering.bulk import items
from serving.errors import ApiError
from serving.wire.parsing import Sent
from tests.serving.asking import identities, refused
from tests.serving.conftest import DIMENSION, unit_vectors

NDJSON, BYTES = "application/x-ndjson", "application/octet-stream"


def bulk(server, content, kind, **headers):
    return server.http.post("/v1/samples", content=content, headers={"content-type": kind, **headers})


def lines(items):
    return "".join(
        json.dumps({"subject_id": name, "embeddings": np.asarray(rows).tolist()}) + "\n" for name, rows in items
    ).encode()


def as_bytes(names, vectors_BD):
    return json.dumps({"subject_ids": names}).encode() + b"\n" + np.asarray(vectors_BD, "<f4").tobytes()


def found(server, vector):
    answer = server.http.post("/v1/identify", json={"embedding": vector.tolist(), "below_threshold": True}).json()
    return answer["candidates"][0]["subject_id"], round(answer["candidates"][0]["score"], 4)


@pytest.mark.parametrize("kind", [NDJSON, BYTES])
def test_many_subjects_are_enrolled_in_one_change_and_found(server, kind):
    x, names = unit_vectors(50, seed=next(identities)), [f"bulk{next(identities)}" for _ in range(50)]
    before = server.http.get("/readyz").json()["revision"]
    pairs = list(zip(names, x[:, None], strict=True))
    answer = bulk(server, lines(pairs) if kind == NDJSON else as_bytes(names, x), kind)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert (body["enrolled"], body["refused"]) == (50, 0)
    assert [result["subject_id"] for result in body["results"]] == names
    assert all(result["subject_created"] and len(result["samples"]) == 1 for result in body["results"])
    assert server.http.get("/readyz").json()["revision"] == before + 1
    for name, vector in zip(names, x, strict=True):
        assert found(server, vector) == (name, 1.0)


def test_an_item_that_is_refused_leaves_the_others_alone(server):
    x, good = unit_vectors(3, seed=next(identities)), f"good{next(identities)}"
    many = np.repeat(x[2:], 101, axis=0)
    items = [(good, x[:1]), ("a/b", x[:1]), ("short", x[:1, :5]), ("long", 2 * x[:1]), ("full", many), (good, x[1:2])]
    body = bulk(server, lines(items), NDJSON).json()
    codes = [result["error"]["code"] if result["error"] else "enrolled" for result in body["results"]]
    assert codes == ["enrolled", "invalid", "wrong_dimension", "not_a_unit_vector", "invalid", "enrolled"]
    assert (body["enrolled"], body["refused"]) == (2, 4)
    assert [result["subject_created"] for result in body["results"]] == [True, *[False] * 5]
    full = [(f"full{next(identities)}", np.repeat(x[2:], 60, axis=0))] * 2
    body = bulk(server, lines(full), NDJSON).json()
    assert [result["status"] for result in body["results"]] == ["enrolled", "refused"]
    assert body["results"][1]["error"]["code"] == "too_many_samples"


def test_a_repeated_request_is_done_once_and_answered_alike(server):
    x = unit_vectors(3, seed=next(identities))
    names = [f"once{next(identities)}" for _ in range(2)]
    content = lines([(names[0], x[:1]), ("a/b", x[:1]), (names[1], x[1:2]), (names[1], np.repeat(x[1:2], 100, 0))])
    key = {"Idempotency-Key": f"bulk-{names[0]}"}
    first, again = (bulk(server, content, NDJSON, **key) for _ in range(2))
    assert again.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers
    ignored = {"request_id"}
    assert {k: v for k, v in first.json().items() if k not in ignored} == {
        k: v for k, v in again.json().items() if k not in ignored
    }
    refused(bulk(server, lines([(names[0], x[2:])]), NDJSON, **key), 409, "idempotency_key_reused")
    one = server.http.post(f"/v1/subjects/{names[0]}/samples", json={"embeddings": x[:1].tolist()}, headers=key)
    refused(one, 409, "idempotency_key_reused")


@pytest.mark.parametrize(
    ("kind", "content", "status", "code", "told"),
    [
        (NDJSON, b"", 422, "invalid", "no item was sent"),
        (NDJSON, b"\n\n", 422, "invalid", "no item was sent"),
        (NDJSON, lines([("a", unit_vectors(1))]) + b"{", 400, "not_json", "line 2"),
        (NDJSON, b"ab\n" * 10_000_000, 400, "not_json", "line 1"),
        (NDJSON, b"\n" * 30_000_000, 422, "invalid", "lines are blank"),
        (NDJSON, b'{"subject_id": "a"}', 422, "invalid", "line 1"),
        (NDJSON, b'{"subject_id": "a", "embeddings": [], "more": 1}', 422, "invalid", "line 1"),
        (BYTES, b"", 400, "not_json", "line 1"),
        (BYTES, as_bytes(["a"], unit_vectors(2)), 422, "invalid", f"take {4 * DIMENSION}"),
        (BYTES, as_bytes(["a", "b"], unit_vectors(2))[:-1], 422, "invalid", "bytes follow"),
        ("text/plain", b"x", 415, "unsupported_type", "application/x-ndjson"),
    ],
)
def test_a_body_that_cannot_be_read_changes_nothing(server, kind, content, status, code, told):
    before = server.http.get("/readyz").json()["revision"]
    assert told in refused(bulk(server, content, kind), status, code)["message"]
    assert server.http.get("/readyz").json()["revision"] == before


def test_only_the_line_that_is_read_is_copied():
    sent = Sent(document=b"ab\n" * 1_000_000, kind=NDJSON)
    tracemalloc.start()
    try:
        with pytest.raises(ApiError, match="line 1"):
            list(items(sent, DIMENSION))
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_numbers_that_are_no_vector_are_refused_item_by_item(server):
    x = unit_vectors(3, seed=next(identities))
    x[1] = np.nan
    x[2] *= np.float32(1e30)
    body = bulk(server, as_bytes([f"odd{next(identities)}" for _ in x], x), BYTES).json()
    assert [result["status"] for result in body["results"]] == ["enrolled", "refused", "refused"]


def test_another_model_is_refused(server):
    content = json.dumps({"subject_id": "a", "embeddings": unit_vectors(1).tolist(), "model_id": "other"}).encode()
    (result,) = bulk(server, content, NDJSON).json()["results"]
    assert result["error"]["code"] == "wrong_model"
