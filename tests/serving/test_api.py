"""The whole service over HTTP: uvicorn in a process of its own, SQLite, FAISS and ONNX Runtime as in production."""

import itertools
import re
import socket
import time
import zlib
from urllib.parse import quote

import jsonschema
import numpy as np
import pytest
from PIL import Image

from serving.embedder import Embedder
from trainer.artifact import read_manifest

identities = itertools.count(1000)  # every test has people of its own


def _file(content, name="image"):
    return (name, ("photo.png", content, "image/png"))


def _enrol(server, subject_id, *images, **options):
    return server.http.put(f"/v1/subjects/{subject_id}/samples", files=[_file(i, "images") for i in images], **options)


def _identify(server, image, **fields):
    return server.http.post("/v1/identify", files=[_file(image)], data=fields)


def _refused(answer, status, code):
    """Every error has one shape, and its request id in the header too."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error", "request_id"}
    assert set(body["error"]) == {"code", "message", "details"}
    assert body["error"]["code"] == code
    assert body["request_id"] == answer.headers["x-request-id"]
    assert "Traceback" not in answer.text
    return body["error"]


# Deciding


def test_a_mate_is_found_and_a_stranger_is_unknown(server, embedder, photos):
    mate, other, stranger = next(identities), next(identities), next(identities)
    enrolled = _enrol(server, f"s{mate}", photos(mate, 0))
    assert enrolled.status_code == 201
    assert _enrol(server, f"s{other}", photos(other, 0)).status_code == 201
    answer = _identify(server, photos(mate, 1), top_k=2).json()
    assert answer["decision"] == "match"
    assert answer["candidates"][0]["subject_id"] == f"s{mate}"
    assert answer["candidates"][0]["sample_id"] == enrolled.json()["samples"][0]["sample_id"]
    assert answer["candidates"][0]["score"] >= answer["threshold"] == 0.7
    assert answer["threshold_source"].startswith("calibrated for FPIR 0.01: a test")
    assert (answer["fpir_target"], answer["fpir_interval"]) == (0.01, [0.005, 0.02])
    assert answer["calibrated_gallery_size"] == 4
    assert answer["gallery_size"] >= 2
    assert answer["model_id"] == read_manifest(embedder).model_id
    answer = _identify(server, photos(stranger), top_k=2).json()
    assert answer["decision"] == "unknown"
    assert len(answer["candidates"]) == 2
    assert answer["candidates"][0]["score"] < answer["threshold"]


def test_several_samples_of_a_subject_are_one_candidate(server, photos):
    person = next(identities)
    _enrol(server, f"s{person}", photos(person, 0), photos(person, 1))
    more = _enrol(server, f"s{person}", photos(person, 2)).json()
    assert (more["subject_created"], more["subject_samples"], len(more["samples"])) == (False, 3, 1)
    answer = _identify(server, photos(person, 2), top_k=100).json()
    found = [candidate["subject_id"] for candidate in answer["candidates"]]
    assert found[0] == f"s{person}"
    assert len(found) == len(set(found))
    assert answer["candidates"][0]["sample_id"] == more["samples"][0]["sample_id"]
    assert answer["candidates"][0]["score"] == pytest.approx(1, abs=1e-5)


def test_deleted_subjects_are_gone_from_the_next_search(server, photos):
    person = next(identities)
    _enrol(server, f"s{person}", photos(person))
    assert _identify(server, photos(person)).json()["candidates"][0]["subject_id"] == f"s{person}"
    answer = server.http.delete(f"/v1/subjects/s{person}")
    assert (answer.status_code, answer.content) == (204, b"")
    answer = _identify(server, photos(person), top_k=100).json()
    assert f"s{person}" not in [candidate["subject_id"] for candidate in answer["candidates"]]
    _refused(server.http.delete(f"/v1/subjects/s{person}"), 404, "no_subject")
    assert _enrol(server, f"s{person}", photos(person)).json()["subject_created"] is True


def test_verify(server, photos):
    person, other = next(identities), next(identities)
    enrolled = _enrol(server, f"s{person}", photos(person, 0)).json()
    same = server.http.post(
        "/v1/verify", files=[_file(photos(person, 1), "probe"), _file(photos(person, 2), "reference")]
    ).json()
    assert (same["decision"], same["threshold"], same["fmr_target"]) == ("match", 0.6, 0.01)
    assert same["threshold_source"] == "calibrated for FMR 0.01: a test"
    assert same["score"] >= same["threshold"]
    different = server.http.post(
        "/v1/verify", files=[_file(photos(person, 1), "probe"), _file(photos(other, 1), "reference")]
    ).json()
    assert different["decision"] == "no_match"
    assert different["score"] < different["threshold"]
    files, fields = [_file(photos(person, 3), "probe")], {"subject_id": f"s{person}"}
    subject = server.http.post("/v1/verify", files=files, data=fields).json()
    assert (subject["decision"], subject["subject_id"]) == ("match", f"s{person}")
    assert subject["sample_id"] == enrolled["samples"][0]["sample_id"]
    _refused(server.http.post("/v1/verify", files=files, data={"subject_id": "nobody"}), 404, "no_subject")
    _refused(server.http.post("/v1/verify", files=files), 422, "invalid")
    files.append(_file(photos(person), "reference"))
    _refused(server.http.post("/v1/verify", files=files, data=fields), 422, "invalid")


def test_embeddings_do_what_images_do(server, embedder, photos):
    person = next(identities)
    answer = server.http.post("/v1/embed", files=[_file(photos(person, k), "images") for k in range(3)]).json()
    x = np.asarray(answer["embeddings"], np.float32)
    np.testing.assert_allclose(x, Embedder.open(embedder).embed_files([photos(person, k) for k in range(3)]), atol=1e-6)
    assert (answer["dimension"], x.shape) == (32, (3, 32))
    first, second, third = answer["embeddings"]
    body = {"embeddings": [first, second], "model_id": answer["model_id"]}
    enrolled = server.http.put(f"/v1/subjects/s{person}/samples", json=body)
    assert (enrolled.status_code, len(enrolled.json()["samples"])) == (201, 2)
    by_embedding = server.http.post("/v1/identify", json={"embedding": third, "top_k": 1}).json()
    by_image = _identify(server, photos(person, 2), top_k=1).json()
    assert by_embedding["decision"] == by_image["decision"] == "match"
    assert by_embedding["candidates"][0]["sample_id"] == by_image["candidates"][0]["sample_id"]
    assert by_embedding["candidates"][0]["score"] == pytest.approx(by_image["candidates"][0]["score"], abs=1e-6)
    pair = server.http.post("/v1/verify", json={"probe": first, "reference": third}).json()
    assert (pair["decision"], pair["subject_id"]) == ("match", None)
    assert pair["score"] == pytest.approx(float(x[0] @ x[2]), abs=1e-5)
    known = server.http.post("/v1/verify", json={"probe": third, "subject_id": f"s{person}"}).json()
    assert (known["decision"], known["subject_id"]) == ("match", f"s{person}")


def test_other_formats_and_sizes_are_read(server, photos, tmp_path):
    person = next(identities)
    _enrol(server, f"s{person}", photos(person))
    (tmp_path / "a.png").write_bytes(photos(person))
    with Image.open(tmp_path / "a.png") as picture:
        picture.convert("RGB").resize((160, 160), Image.Resampling.BICUBIC).save(tmp_path / "a.webp", lossless=True)
        picture.save(tmp_path / "a.bmp")
    for name in ("a.webp", "a.bmp"):
        answer = _identify(server, (tmp_path / name).read_bytes()).json()
        assert (answer["decision"], answer["candidates"][0]["subject_id"]) == ("match", f"s{person}")


# Lists


def test_pages_hold_every_subject_once(serve, vectors):
    server = serve()
    names = [f"subject {number}" for number in range(11)]
    for name, row in zip(names, vectors(11), strict=True):
        server.http.put(f"/v1/subjects/{name}/samples", json={"embeddings": [row.tolist()]})
    found, cursor = [], None
    for _ in range(4):
        answer = server.http.get("/v1/subjects", params={"limit": 4} | ({"cursor": cursor} if cursor else {})).json()
        found += [subject["subject_id"] for subject in answer["subjects"]]
        assert answer["gallery_size"] == 11
        if not found[4:]:  # what happens between two pages neither repeats nor skips one
            server.http.put("/v1/subjects/late/samples", json={"embeddings": [vectors(1, seed=9)[0].tolist()]})
            server.http.delete("/v1/subjects/subject 0")
        cursor = answer["next_cursor"]
        if cursor is None:
            break
    assert found == [*names, "late"]
    assert server.http.get("/v1/subjects").json()["next_cursor"] is None


@pytest.mark.parametrize(
    "query",
    ["cursor=nonsense", "cursor=%00", "cursor=cDEyMzQ1Njc4OTAxMjM0NTY3ODkw", "limit=0", "limit=1001", "limit=x"],
)
def test_bad_pages_are_refused(server, query):
    _refused(server.http.get(f"/v1/subjects?{query}"), 422, "invalid")


# Once


def test_a_repeated_key_is_answered_alike_and_done_once(server, photos):
    person, key = next(identities), {"Idempotency-Key": "first-try"}
    first = _enrol(server, f"s{person}", photos(person), headers=key)
    again = _enrol(server, f"s{person}", photos(person), headers=key)
    assert first.status_code == again.status_code == 201
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert {**again.json(), "request_id": ""} == {**first.json(), "request_id": ""}
    assert again.json()["subject_samples"] == 1
    _refused(_enrol(server, f"s{person}", photos(person, 1), headers=key), 409, "idempotency_key_reused")
    _refused(_enrol(server, "other", photos(person), headers=key), 409, "idempotency_key_reused")
    _refused(server.http.delete(f"/v1/subjects/s{person}", headers=key), 409, "idempotency_key_reused")
    gone = {"Idempotency-Key": "gone"}
    assert server.http.delete(f"/v1/subjects/s{person}", headers=gone).status_code == 204
    again = server.http.delete(f"/v1/subjects/s{person}", headers=gone)
    assert (again.status_code, again.headers["idempotent-replayed"]) == (204, "true")
    late = _enrol(server, f"s{person}", photos(person), headers=key)
    assert late.headers["idempotent-replayed"] == "true"
    _refused(server.http.delete(f"/v1/subjects/s{person}"), 404, "no_subject")
    _refused(_enrol(server, "other", photos(person), headers={"Idempotency-Key": "a b"}), 422, "invalid")


# What is refused


def _json(**body):
    return {"json": body}


UNIT = [1.0] + [0.0] * 31
BAD_BODIES = {
    "no body": ({}, 415, "unsupported_type"),
    "plain text": ({"content": b"x", "headers": {"content-type": "text/plain"}}, 415, "unsupported_type"),
    "raw image": ({"content": b"x", "headers": {"content-type": "image/png"}}, 415, "unsupported_type"),
    "compressed": (
        {"content": b"x", "headers": {"content-type": "application/json", "content-encoding": "gzip"}},
        415,
        "compressed_body",
    ),
    "not JSON": ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "not_json"),
    "empty JSON": ({"content": b"", "headers": {"content-type": "application/json"}}, 400, "not_json"),
    "deep JSON": ({"content": b"[" * 100_000, "headers": {"content-type": "application/json"}}, 400, "not_json"),
    "a list": ({"json": [1]}, 422, "invalid"),
    "no embedding": (_json(top_k=3), 422, "invalid"),
    "unknown key": (_json(embedding=UNIT, topk=3), 422, "invalid"),
    "top_k 0": (_json(embedding=UNIT, top_k=0), 422, "invalid"),
    "top_k 101": (_json(embedding=UNIT, top_k=101), 422, "invalid"),
    "top_k text": (_json(embedding=UNIT, top_k="many"), 422, "invalid"),
    "text as embedding": (_json(embedding="vector"), 422, "invalid"),
    "text in embedding": (_json(embedding=["x", *UNIT[1:]]), 422, "invalid"),
    "empty embedding": (_json(embedding=[]), 422, "invalid"),
    "short embedding": (_json(embedding=[1.0]), 422, "wrong_dimension"),
    "long embedding": (_json(embedding=[*UNIT, 0.0]), 422, "wrong_dimension"),
    "huge embedding": (_json(embedding=[0.0] * 9000), 422, "invalid"),
    "zero embedding": (_json(embedding=[0.0] * 32), 422, "not_a_unit_vector"),
    "doubled embedding": (_json(embedding=[2.0, *UNIT[1:]]), 422, "not_a_unit_vector"),
    "overflowing embedding": (_json(embedding=[1e300] * 32), 422, "not_a_unit_vector"),
    "NaN": (
        {
            "content": b'{"embedding": [NaN' + b", 0" * 31 + b"]}",
            "headers": {"content-type": "application/json"},
        },
        422,
        "invalid",
    ),
    "another model": (_json(embedding=UNIT, model_id="f" * 32), 409, "wrong_model"),
    "no boundary": ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "bad_form"),
    "broken form": (
        {"content": b"garbage", "headers": {"content-type": "multipart/form-data; boundary=b"}},
        400,
        "bad_form",
    ),
    "cut-off form": (
        {
            "content": b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nabc',
            "headers": {"content-type": "multipart/form-data; boundary=b"},
        },
        422,
        "invalid",
    ),
    "no file": ({"files": [("top_k", (None, "3"))]}, 422, "invalid"),
    "a field for a file": ({"files": [("image", (None, "text"))]}, 422, "invalid"),
    "a file of another name": ({"files": [_file(b"x", "picture")]}, 422, "invalid"),
    "two files": ({"files": [_file(b"x"), _file(b"x")]}, 400, "bad_form"),
    "an unknown field": ({"files": [_file(b"x")], "data": {"colour": "red"}}, 422, "invalid"),
    "a huge field": ({"files": [_file(b"x")], "data": {"top_k": "1" * 5000}}, 400, "bad_form"),
    "an empty file": ({"files": [_file(b"")]}, 422, "bad_image"),
    "text as image": ({"files": [_file(b"this is text")]}, 415, "not_an_image"),
    "PDF as image": ({"files": [_file(b"%PDF-1.4\n%%EOF")]}, 415, "not_an_image"),
    "an 11 MiB file": ({"files": [_file(b"x" * (11 << 20))]}, 413, "image_too_large"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_bodies_are_refused(server, name):
    request, status, code = BAD_BODIES[name]
    error = _refused(server.http.post("/v1/identify", **request), status, code)
    assert len(error["message"]) > 20


def test_bad_images_are_refused(server, photos):
    good = photos(1)
    error = _refused(_identify(server, good[: len(good) // 2]), 422, "bad_image")
    assert "damaged" in error["message"]
    # The header alone says 60000 x 60000 pixels; the service must not try to decode them.
    bomb = bytearray(good)
    bomb[16:24] = (60000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    assert "pixels" in _refused(_identify(server, bytes(bomb)), 422, "bad_image")["message"]
    second = _refused(_enrol(server, "somebody", good, b"not an image"), 415, "not_an_image")
    assert second["details"] == {"part": "images", "number": 2}
    _refused(server.http.delete("/v1/subjects/somebody"), 404, "no_subject")  # nothing of it was enrolled


def test_an_image_of_one_colour_is_refused(server, tmp_path):
    Image.new("L", (16, 16), 90).save(tmp_path / "flat.png")
    error = _refused(_identify(server, (tmp_path / "flat.png").read_bytes()), 422, "bad_image")
    assert "one flat colour" in error["message"]


def test_another_model_is_named(server, embedder):
    served = read_manifest(embedder).model_id
    for method, path, body in (
        ("POST", "/v1/identify", {"embedding": UNIT}),
        ("POST", "/v1/verify", {"probe": UNIT, "reference": UNIT}),
        ("PUT", "/v1/subjects/alice/samples", {"embeddings": [UNIT]}),
    ):
        error = _refused(server.http.request(method, path, json=body | {"model_id": "f" * 32}), 409, "wrong_model")
        assert error["details"] == {"sent": "f" * 32, "served": served}
        assert served in error["message"]
        assert "f" * 32 in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "no_route"),
        ("GET", "/v1/nothing", 404, "no_route"),
        ("PUT", "/v1/subjects/a%2Fb/samples", 404, "no_route"),
        ("GET", "/v1/identify", 405, "wrong_method"),
        ("PATCH", "/v1/subjects", 405, "wrong_method"),
        ("OPTIONS", "/healthz", 405, "wrong_method"),
        ("DELETE", "/v1/subjects/" + "a" * 129, 422, "invalid"),
        ("DELETE", "/v1/subjects/%00", 422, "invalid"),
        ("DELETE", "/v1/subjects/%20a", 422, "invalid"),
        ("DELETE", "/v1/subjects/%FF", 422, "invalid"),
    ],
)
def test_bad_routes_and_names_are_refused(server, method, path, status, code):
    _refused(server.http.request(method, path), status, code)


@pytest.mark.parametrize("name", ["Ålesund 7", "a.b@c:d", "character01 (katakana)", "名前", "x" * 128, "a+b&c=d?e#f"])
def test_names_people_use_are_allowed(server, photos, name):
    person = next(identities)
    assert _enrol(server, quote(name, safe=""), photos(person)).json()["subject_id"] == name
    assert _identify(server, photos(person)).json()["candidates"][0]["subject_id"] == name
    assert server.http.delete(f"/v1/subjects/{quote(name, safe='')}").status_code == 204


def test_too_many_images_or_samples_are_refused(strict, photos, vectors):
    rows = vectors(5).tolist()
    _refused(_enrol(strict, "a", *[photos(k) for k in range(4)]), 400, "bad_form")
    _refused(strict.http.put("/v1/subjects/a/samples", json={"embeddings": rows[:4]}), 422, "invalid")
    assert strict.http.put("/v1/subjects/a/samples", json={"embeddings": rows[:3]}).status_code == 201
    _refused(strict.http.put("/v1/subjects/a/samples", json={"embeddings": rows[:2]}), 409, "too_many_samples")
    assert strict.http.get("/readyz").json()["samples"] == 3


def _until_closed(wire):
    """The whole answer; the server ends a connection whose request it did not read to the end."""
    answer = b""
    while piece := wire.recv(4096):
        answer += piece
    return answer


def test_large_bodies_are_refused_before_they_are_read(strict):
    host, port = re.fullmatch(r"http://(.*):(\d+)", strict.url).groups()
    # By what the client announces: not one byte of the body is sent.
    with socket.create_connection((host, int(port)), timeout=10) as wire:
        wire.sendall(b"POST /v1/identify HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n")
        assert wire.recv(4096).startswith(b"HTTP/1.1 413")
    # By what it sends, when it announces nothing: the answer comes while it is still sending.
    with socket.create_connection((host, int(port)), timeout=10) as wire:
        wire.sendall(
            b"POST /v1/identify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
            b"Content-Type: application/json\r\n\r\n"
        )
        for _ in range(11):
            wire.sendall(b"2710\r\n" + b" " * 10_000 + b"\r\n")
        answer = _until_closed(wire)
        assert answer.startswith(b"HTTP/1.1 413")
        assert b'"code":"body_too_large"' in answer
    assert strict.http.get("/healthz").status_code == 200


def test_slow_bodies_are_refused(strict):
    host, port = re.fullmatch(r"http://(.*):(\d+)", strict.url).groups()
    with socket.create_connection((host, int(port)), timeout=20) as wire:
        wire.sendall(
            b"POST /v1/identify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\nContent-Type: application/json\r\n\r\n{"
        )
        answer = _until_closed(wire)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b'"code":"body_late"' in answer


def test_no_more_requests_than_allowed(serve):
    server = serve(max_requests=1)
    host, port = re.fullmatch(r"http://(.*):(\d+)", server.url).groups()
    with socket.create_connection((host, int(port)), timeout=20) as wire:
        wire.sendall(
            b"POST /v1/identify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\nContent-Type: application/json\r\n\r\n{"
        )
        end = time.monotonic() + 20
        while (answer := server.http.get("/v1/subjects")).status_code == 200 and time.monotonic() < end:
            time.sleep(0.01)
        _refused(answer, 503, "overloaded")
        assert answer.headers["retry-after"] == "1"
        assert server.http.get("/healthz").status_code == 200  # who looks after it still gets through
    while (answer := server.http.get("/v1/subjects")).status_code == 503 and time.monotonic() < end:
        time.sleep(0.01)
    assert answer.status_code == 200


def test_the_key_and_the_rate(serve, photos):
    server = serve(api_key="correct-horse-battery", rate_limit=0.01, rate_burst=4)
    for path in ("/healthz", "/readyz", "/openapi.json"):
        assert server.http.get(path).status_code == 200
    answer = server.http.get("/v1/subjects")
    _refused(answer, 401, "key_missing")
    assert answer.headers["www-authenticate"] == "Bearer"
    _refused(server.http.get("/metrics", headers={"X-API-Key": "wrong"}), 403, "key_wrong")
    key = {"Authorization": "Bearer correct-horse-battery"}
    assert server.http.get("/v1/subjects", headers=key).status_code == 200
    assert _identify(server, photos(1)).status_code == 401
    answer = server.http.get("/v1/subjects", headers=key)
    _refused(answer, 429, "too_many_requests")
    assert int(answer.headers["retry-after"]) > 0
    assert server.http.get("/healthz").status_code == 200
    assert "correct-horse" not in "".join(server.output)


# Operating


def test_request_ids(server):
    answer = server.http.get("/readyz", headers={"X-Request-ID": "job-7.a_b"})
    assert answer.headers["x-request-id"] == answer.json()["request_id"] == "job-7.a_b"
    for bad in ("a b", "<script>", "a" * 65, ""):
        answer = server.http.get("/readyz", headers={"X-Request-ID": bad})
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


def test_ready(server, embedder):
    answer = server.http.get("/readyz").json()
    assert (answer["status"], answer["model_id"]) == ("ready", read_manifest(embedder).model_id)
    answer = server.http.get("/healthz")
    assert answer.json() == {"status": "alive"}
    assert (answer.headers["cache-control"], answer.headers["x-content-type-options"]) == ("no-store", "nosniff")


def _metric(server, name, **labels):
    text = server.http.get("/metrics").text
    wanted = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
    pattern = "^" + re.escape(name + (f"{{{wanted}}}" if labels else "")) + r" (\S+)$"
    found = re.search(pattern, text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_metrics_count(serve, photos):
    server = serve()
    _enrol(server, "alice", photos(1), photos(1, 1))
    for person in (1, 1, 2):
        _identify(server, photos(person, 5))
    server.http.post("/v1/verify", files=[_file(photos(1), "probe"), _file(photos(2), "reference")])
    server.http.get("/secret/alice")
    server.http.delete("/v1/subjects/alice")
    count = "hypersphere_requests_total"
    assert _metric(server, count, route="/v1/identify", method="POST", status="200") == 3
    assert _metric(server, count, route="/v1/subjects/{subject_id}/samples", method="PUT", status="201") == 1
    assert _metric(server, count, route="/v1/subjects/{subject_id}", method="DELETE", status="204") == 1
    assert _metric(server, count, route="none", method="GET", status="404") == 1
    assert _metric(server, "hypersphere_decisions_total", operation="identify", decision="match") == 2
    assert _metric(server, "hypersphere_decisions_total", operation="identify", decision="unknown") == 1
    assert _metric(server, "hypersphere_decisions_total", operation="verify", decision="no_match") == 1
    assert _metric(server, "hypersphere_embedded_images_total") == 7
    assert _metric(server, "hypersphere_embed_seconds_count") == 5
    assert _metric(server, "hypersphere_search_seconds_count") == 3
    assert _metric(server, "hypersphere_request_seconds_count", route="/v1/identify") == 3
    assert _metric(server, "hypersphere_gallery_subjects") == 0
    text = server.http.get("/metrics").text
    assert "alice" not in text


def test_the_openapi_page(server):
    schema = server.http.get("/openapi.json").json()
    assert schema["openapi"].startswith("3.1")
    assert set(schema["paths"]) == {
        "/v1/verify",
        "/v1/identify",
        "/v1/subjects",
        "/v1/subjects/{subject_id}",
        "/v1/subjects/{subject_id}/samples",
        "/v1/embed",
        "/healthz",
        "/readyz",
        "/metrics",
    }
    components = {"components": schema["components"]}
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            assert operation["description"], path
            for kind, content in operation.get("requestBody", {}).get("content", {}).items():
                jsonschema.Draft202012Validator.check_schema(content["schema"])
                if kind == "application/json":
                    jsonschema.validate(content["example"], content["schema"] | components)
    for name in ("VerifyAnswer", "IdentifyAnswer"):
        (example,) = schema["components"]["schemas"][name]["examples"]
        jsonschema.validate(example, {"$ref": f"#/components/schemas/{name}"} | components)
    answer = server.http.get("/readyz").json()
    jsonschema.validate(answer, {"$ref": "#/components/schemas/ReadyAnswer"} | components)
    error = server.http.get("/v1/subjects?limit=0").json()
    jsonschema.validate(error, {"$ref": "#/components/schemas/ErrorAnswer"} | components)


def test_the_documentation_needs_no_other_host(server):
    page = server.http.get("/docs").text
    links = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert any(link.endswith(".js") for link in links)
    for link in links:
        assert link.startswith("/"), link
        asset = server.http.get(link)
        assert asset.status_code == 200, link
        assert len(asset.content) > 1000
    assert "http:" not in page
    assert "https:" not in page
