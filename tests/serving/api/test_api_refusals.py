"""What the service refuses over HTTP, and the one shape in which it says so."""

import contextlib
import re
import socket
import time
import zlib
from urllib.parse import quote

import pytest
from PIL import Image

from tests.serving.asking import enrol, file, identify, identities, refused
from trainer.embedder import Embedder


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
    "deep JSON": ({"content": b"[" * 5000, "headers": {"content-type": "application/json"}}, 400, "not_json"),
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
    "huge embedding": (_json(embedding=[0.0] * 40_000), 413, "json_too_large"),
    "a huge key": (_json(**{"k" * 100_000: 1}), 413, "json_too_large"),
    "a long key": (_json(embedding=UNIT, **{"k" * 2000: 1}), 422, "invalid"),
    "many keys": (_json(**{str(k): k for k in range(100)}), 422, "invalid"),
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
    "a charset": (
        {"content": b"--b--\r\n", "headers": {"content-type": "multipart/form-data; boundary=b; charset=undefined"}},
        415,
        "unsupported_charset",
    ),
    "a charset behind a space": (
        {
            "content": b'--b\r\nContent-Disposition: form-data; name="top_k"\r\n\r\n\xff\r\n--b--\r\n',
            "headers": {"content-type": "multipart/form-data; boundary=b; charset =undefined"},
        },
        415,
        "unsupported_charset",
    ),
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
    "a file of another name": ({"files": [file(b"x", "picture")]}, 422, "invalid"),
    "more files than are allowed": ({"files": [file(b"x")] * 33}, 400, "bad_form"),
    "an unknown field": ({"files": [file(b"x")], "data": {"colour": "red"}}, 422, "invalid"),
    "a huge field": ({"files": [file(b"x")], "data": {"top_k": "1" * 5000}}, 400, "bad_form"),
    "an empty file": ({"files": [file(b"")]}, 422, "bad_image"),
    "text as image": ({"files": [file(b"this is text")]}, 415, "not_an_image"),
    "PDF as image": ({"files": [file(b"%PDF-1.4\n%%EOF")]}, 415, "not_an_image"),
    "an 11 MiB file": ({"files": [file(b"x" * (11 << 20))]}, 413, "image_too_large"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_bodies_are_refused(server, name):
    request, status, code = BAD_BODIES[name]
    error = refused(server.http.post("/v1/identify", **request), status, code)
    assert 20 < len(error["message"]) < 400


def test_bad_images_are_refused(server, photos):
    good = photos(1)
    error = refused(identify(server, good[: len(good) // 2]), 422, "bad_image")
    assert "damaged" in error["message"]
    # The header alone says 60000 x 60000 pixels; the service must not try to decode them.
    bomb = bytearray(good)
    bomb[16:24] = (60000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    assert "pixels" in refused(identify(server, bytes(bomb)), 422, "too_many_pixels")["message"]
    second = refused(enrol(server, "somebody", good, b"not an image"), 415, "not_an_image")
    assert second["details"] == {"part": "images", "number": 2}
    refused(server.http.delete("/v1/subjects/somebody"), 404, "no_subject")  # nothing of it was enrolled


def test_an_image_of_one_colour_is_refused(server, tmp_path):
    Image.new("L", (16, 16), 90).save(tmp_path / "flat.png")
    error = refused(identify(server, (tmp_path / "flat.png").read_bytes()), 422, "bad_image")
    assert "one flat colour" in error["message"]


def test_another_model_is_named(server, embedder):
    served = Embedder.open(embedder).model_id
    for method, path, body in (
        ("POST", "/v1/identify", {"embedding": UNIT}),
        ("POST", "/v1/verify", {"probe": UNIT, "reference": UNIT}),
        ("POST", "/v1/subjects/alice/samples", {"embeddings": [UNIT]}),
    ):
        error = refused(server.http.request(method, path, json=body | {"model_id": "f" * 32}), 409, "wrong_model")
        assert error["details"] == {"sent": "f" * 32, "served": served}
        assert served in error["message"]
        assert "f" * 32 in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "no_route"),
        ("GET", "/v1/nothing", 404, "no_route"),
        ("POST", "/v1/subjects/a%2Fb/samples", 404, "no_route"),
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
    refused(server.http.request(method, path), status, code)


@pytest.mark.parametrize("name", ["Ålesund 7", "a.b@c:d", "character01 (katakana)", "名前", "x" * 128, "a+b&c=d?e#f"])
def test_names_people_use_are_allowed(server, photos, name):
    person = next(identities)
    assert enrol(server, quote(name, safe=""), photos(person)).json()["subject_id"] == name
    assert identify(server, photos(person)).json()["candidates"][0]["subject_id"] == name
    assert server.http.delete(f"/v1/subjects/{quote(name, safe='')}").status_code == 204


def test_too_many_images_or_samples_are_refused(strict, photos, vectors):
    rows = vectors(5).tolist()
    refused(enrol(strict, "a", *[photos(k) for k in range(4)]), 400, "bad_form")
    refused(strict.http.post("/v1/subjects/a/samples", json={"embeddings": rows[:4]}), 422, "invalid")
    assert strict.http.post("/v1/subjects/a/samples", json={"embeddings": rows[:3]}).status_code == 201
    refused(strict.http.post("/v1/subjects/a/samples", json={"embeddings": rows[:2]}), 409, "too_many_samples")
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
        wire.sendall(b"POST /v1/identify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000\r\n\r\n")
        assert wire.recv(4096).startswith(b"HTTP/1.1 413")
    # By what it sends, when it announces nothing: the answer comes while it is still sending.
    with socket.create_connection((host, int(port)), timeout=10) as wire:
        wire.sendall(
            b"POST /v1/identify HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
        )
        part = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        wire.sendall(b"%x\r\n%s\r\n" % (len(part), part))
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
            b"POST /v1/identify HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Length: 1000\r\nContent-Type: application/json\r\n\r\n{"
        )
        answer = _until_closed(wire)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b'"code":"body_late"' in answer


def test_no_more_requests_than_allowed(serve):
    server = serve(max_requests=1)
    host, port = re.fullmatch(r"http://(.*):(\d+)", server.url).groups()
    head = b"POST /v1/identify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    answer, end = server.http.get("/v1/subjects"), time.monotonic() + 20
    while answer.status_code == 200 and time.monotonic() < end:  # the slow one may itself come second, and be refused
        with socket.create_connection((host, int(port)), timeout=20) as wire:
            wire.sendall(head + b"Content-Length: 1000\r\n\r\n{")
            time.sleep(0.1)
            answer = server.http.get("/v1/subjects")
            alive = server.http.get("/healthz")
    refused(answer, 503, "overloaded")
    assert answer.headers["retry-after"] == "1"
    assert alive.status_code == 200  # who looks after it still gets through
    while (answer := server.http.get("/v1/subjects")).status_code == 503 and time.monotonic() < end:
        time.sleep(0.01)
    assert answer.status_code == 200


def test_the_key_and_the_rate(serve, photos):
    server = serve(api_key="correct-horse-battery", rate_limit=0.01, rate_burst=4)
    for path in ("/healthz", "/readyz", "/openapi.json"):
        assert server.http.get(path).status_code == 200
    answer = server.http.get("/v1/subjects")
    refused(answer, 401, "key_missing")
    assert answer.headers["www-authenticate"] == "Bearer"
    refused(server.http.get("/metrics", headers={"X-API-Key": "wrong"}), 401, "key_wrong")
    key = {"Authorization": "Bearer correct-horse-battery"}
    assert server.http.get("/v1/subjects", headers=key).status_code == 200
    assert identify(server, photos(1)).status_code == 401
    answer = server.http.get("/v1/subjects", headers=key)
    refused(answer, 429, "too_many_requests")
    assert int(answer.headers["retry-after"]) > 0
    assert server.http.get("/healthz", headers={"X-API-Key": "wrong"}).status_code == 200  # as for an orchestrator
    refused(server.http.get("/readyz", headers={"X-API-Key": "wrong"}), 401, "key_wrong")
    assert "correct-horse" not in "".join(server.output)


def test_wrong_keys_are_limited_logged_and_do_not_lock_out(serve):
    server = serve(api_key="correct-horse-battery\n", wrong_keys_a_minute=5)
    right, wrong = {"X-API-Key": "correct-horse-battery"}, {"X-API-Key": "wrong-horse-battery"}
    answers = [server.http.get("/v1/subjects", headers=wrong).status_code for _ in range(20)]
    assert answers[:5] == [401] * 5
    assert answers[-1] == 429
    assert server.http.get("/v1/subjects", headers=right).status_code == 200
    assert server.http.get("/readyz", headers=wrong).status_code == 429  # no other way to try keys
    log = "".join(server.output)
    assert log.count("a wrong key came from 127.0.0.1") == answers.count(401)
    assert "horse" not in log


def test_without_the_key_readyz_says_nothing_of_the_gallery(serve):
    server = serve(api_key="correct-horse-battery")
    assert set(server.http.get("/readyz").json()) == {"status", "request_id"}
    told = server.http.get("/readyz", headers={"X-API-Key": "correct-horse-battery"}).json()
    assert told["gallery_size"] == told["samples"] == 0
    refused(server.http.get("/metrics"), 401, "key_missing")


def test_bodies_in_memory_are_bounded(serve):
    """Clients that send a part of a body each and then wait, until together they hold too much."""
    server = serve(max_buffered_bytes=400_000, body_timeout_s=20)
    host, port = re.fullmatch(r"http://(.*):(\d+)", server.url).groups()
    head = b"POST /v1/identify HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    part = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    with contextlib.ExitStack() as opened:
        for _ in range(10):
            wire = opened.enter_context(socket.create_connection((host, int(port)), timeout=20))
            with contextlib.suppress(ConnectionError):  # it may have been refused already
                wire.sendall(head + b"Content-Length: 90000\r\n\r\n" + part + b"x" * 60_000)
        answer = _until_closed(wire)
    assert answer.startswith(b"HTTP/1.1 503")
    assert b'"code":"overloaded"' in answer or b'"code": "overloaded"' in answer
    end = time.monotonic() + 20
    while (answer := server.http.post("/v1/identify", json={"embedding": UNIT})).status_code == 503:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert answer.status_code == 200


def test_candidates_below_the_threshold_are_shown_where_allowed(serve, photos, tmp_path):
    for rule, status, shown in (("never", 403, 0), ("on_request", 200, 1), ("always", 200, 1)):
        server = serve(below_threshold=rule, store=tmp_path / f"{rule}.db")
        enrol(server, "ada", photos(1))
        asked = identify(server, photos(2), below_threshold="true")
        assert asked.status_code == status
        if status == 200:
            assert len(asked.json()["candidates"]) == shown
        silent = identify(server, photos(2)).json()
        assert (silent["decision"], len(silent["candidates"])) == ("unknown", int(rule == "always"))
        server.end()


def test_put_is_answered_as_post_and_names_it(server, photos):
    answer = server.http.put(f"/v1/subjects/s{next(identities)}/samples", files=[file(photos(3), "images")])
    assert answer.status_code == 201
    assert answer.headers["deprecation"].startswith("@")
    assert re.fullmatch(r'</v1/subjects/s\d+/samples>; rel="successor-version"; method="POST"', answer.headers["link"])


def test_other_hosts_are_refused(server):
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost@evil.example", ""):
        error = refused(server.http.get("/v1/subjects", headers={"host": host}), 400, "wrong_host")
        assert "--allowed-hosts" in error["message"]
    for host in ("localhost", "localhost:1234", "LOCALHOST", "[::1]:80"):
        assert server.http.get("/healthz", headers={"host": host}).status_code == 200


def test_pages_of_other_sites_change_nothing_without_a_key(server, photos):
    """A browser lets any page post a form here; only its Origin tells."""
    for origin in ("https://elsewhere.example", "null", "http://127.0.0.1.elsewhere.example"):
        refused(enrol(server, "forged", photos(1), headers={"origin": origin}), 403, "other_site")
    assert "forged" not in server.http.get("/v1/subjects?limit=1000").text
    assert enrol(server, "own-page", photos(1), headers={"origin": server.url}).status_code == 201
    server.http.delete("/v1/subjects/own-page")


def test_the_methods_of_a_route_are_named_once(server):
    assert server.http.head("/healthz").headers.get_list("allow") == ["GET"]


def test_what_does_not_go_together_is_told_plainly(server):
    error = refused(server.http.post("/v1/verify", json={"probe": UNIT}), 422, "invalid")
    assert error["message"].startswith("the request: give either reference or subject_id")
