"""Subjects and samples over HTTP: metadata, filters, pages, ETags, merging, images, and the same request twice."""

import json
import re
import threading

import httpx
import numpy as np
import pytest

from tests.serving.asking import enrol, file, identities, refused
from tests.serving.conftest import unit_vectors

NOBODY = "00000000-0000-4000-8000-000000000000"


@pytest.fixture(scope="module")
def keeping(embedder, tmp_path_factory):
    """A server that keeps images."""
    from tests.serving.conftest import Server

    running = Server(embedder=embedder, store=tmp_path_factory.mktemp("store") / "gallery.db", keep_images=True)
    yield running
    running.kill()


def person(server, metadata=None, samples=1):
    """A new subject of made-up vectors; its name, and the answer."""
    name = f"s{next(identities)}"
    body = {"embeddings": unit_vectors(samples, seed=next(identities)).tolist()}
    answer = server.http.post(f"/v1/subjects/{name}/samples", json=body | ({"metadata": metadata} if metadata else {}))
    assert answer.status_code == 201, answer.text
    return name, answer


def test_a_subject_is_described_and_updated(server):
    name, enrolled = person(server, {"site": "north", "age": 41, "badge": True, "score": 0.5}, samples=2)
    path = f"/v1/subjects/{name}"
    answer = server.http.get(path)
    body = answer.json()
    assert body["metadata"] == {"site": "north", "age": 41, "badge": True, "score": 0.5}
    assert [one["sample_id"] for one in body["samples"]] == [one["sample_id"] for one in enrolled.json()["samples"]]
    assert answer.headers["etag"] == enrolled.headers["etag"]
    assert re.fullmatch(rf'"[0-9a-f]{{8}}-{body["revision"]}"', answer.headers["etag"])
    assert server.http.get(path, headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
    done = server.http.patch(path, json={"metadata": {"site": "south", "age": None, "new": "ä"}})
    assert done.status_code == 200
    after = server.http.get(path)
    assert after.json()["metadata"] == {"site": "south", "badge": True, "score": 0.5, "new": "ä"}
    assert after.headers["etag"] == done.headers["etag"] != answer.headers["etag"]
    assert after.json()["updated"] >= after.json()["created"]
    refused(server.http.get("/v1/subjects/nobody"), 404, "no_subject")
    refused(server.http.patch("/v1/subjects/nobody", json={"metadata": {}}), 404, "no_subject")


def test_a_change_of_what_has_changed_is_refused(server):
    name, enrolled = person(server, {"n": 0})
    path, old = f"/v1/subjects/{name}", enrolled.headers["etag"]
    assert server.http.patch(path, json={"metadata": {"n": 1}}, headers={"If-Match": old}).status_code == 200
    new = server.http.get(path).headers["etag"]
    for method, more in (("PATCH", {"json": {"metadata": {"n": 2}}}), ("DELETE", {})):
        answer = server.http.request(method, path, headers={"If-Match": old}, **more)
        assert refused(answer, 412, "revision_conflict")["details"] == {"revision": int(new.strip('"')[9:])}
        assert answer.headers["etag"] == new
    other = {"If-Match": f'"{"0" * 8}-{new.strip(chr(34))[9:]}"'}  # of a collection of the same name that was dropped
    assert "not one of another" in refused(server.http.delete(path, headers=other), 412, "revision_conflict")["message"]
    body = {"embeddings": unit_vectors(1, seed=next(identities)).tolist()}
    for method in ("POST", "PUT"):
        answer = server.http.request(method, f"{path}/samples", headers={"If-Match": old}, json=body)
        refused(answer, 412, "revision_conflict")
        gone = server.http.request(method, "/v1/subjects/nobody/samples", headers={"If-Match": old}, json=body)
        refused(gone, 404, "no_subject")
    assert "If-Match" in refused(server.http.post("/v1/samples", headers={"If-Match": "*"}), 422, "invalid")["message"]
    added = server.http.post(f"{path}/samples", headers={"If-Match": new}, json=body)
    assert added.status_code == 201
    new = added.headers["etag"]
    for wrong in ("1", 'W/"1"', '"1", "2"', '"x"', ""):
        refused(server.http.delete(path, headers={"If-Match": wrong}), 422, "invalid")
    assert server.http.get(path).json()["metadata"] == {"n": 1}
    assert server.http.delete(path, headers={"If-Match": new}).status_code == 204


def test_of_many_who_patch_at_once_nobody_loses(server):
    name, _ = person(server)
    answers = []

    def patch(number):
        with server.client() as http:
            for tries in range(20):
                key = {"Idempotency-Key": f"{name}-{number}-{tries}"}
                answer = http.patch(f"/v1/subjects/{name}", json={"metadata": {f"k{number}": number}}, headers=key)
                if answer.status_code != 412:
                    break
            answers.append(answer.status_code)

    threads = [threading.Thread(target=patch, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 8
    assert server.http.get(f"/v1/subjects/{name}").json()["metadata"] == {f"k{n}": n for n in range(8)}


def _listed(server, **query):
    names, cursor = [], None
    while True:
        params = query | ({"cursor": cursor} if cursor else {})
        answer = server.http.get("/v1/subjects", params=params)
        assert answer.status_code == 200, answer.text
        names += [one["subject_id"] for one in answer.json()["subjects"]]
        if (cursor := answer.json()["next_cursor"]) is None:
            return names


def test_lists_and_searches_are_filtered_by_metadata(server):
    tag = f"t{next(identities)}"
    names = [person(server, {"tag": tag, "even": n % 2 == 0, "n": n})[0] for n in range(7)]
    assert _listed(server, where=json.dumps({"tag": tag}), limit=3) == names
    assert _listed(server, where=json.dumps({"tag": tag, "even": True}), limit=2) == names[::2]
    assert _listed(server, where=json.dumps({"tag": tag, "n": 3})) == [names[3]]
    assert _listed(server, where=json.dumps({"tag": "nobody's"})) == []
    sample = server.http.get(f"/v1/subjects/{names[3]}").json()["samples"][0]["sample_id"]
    detail = server.http.get(f"/v1/subjects/{names[3]}/samples/{sample}", params={"embedding": True}).json()
    probe = {"embedding": detail["embedding"], "below_threshold": True, "top_k": 100}
    all_of_them = server.http.post("/v1/identify", json=probe | {"where": {"tag": tag}}).json()
    assert (all_of_them["gallery_size"], all_of_them["decision"]) == (7, "match")
    assert all_of_them["candidates"][0]["subject_id"] == names[3]
    assert {one["subject_id"] for one in all_of_them["candidates"]} == set(names)
    others = server.http.post("/v1/identify", json=probe | {"where": {"tag": tag, "even": True}}).json()
    assert (others["gallery_size"], others["decision"]) == (4, "unknown")
    assert {one["subject_id"] for one in others["candidates"]} == set(names[::2])
    nobody = server.http.post("/v1/identify", json=probe | {"where": {"tag": "nobody's"}}).json()
    assert (nobody["candidates"], nobody["decision"], nobody["gallery_size"]) == ([], "unknown", 0)
    batch = {"probes": [{"embedding": probe["embedding"]}] * 2, "where": {"tag": tag}}
    found = server.http.post("/v1/identify/batch", json=batch).json()["results"]
    assert [one["gallery_size"] for one in found] == [7, 7]
    raw = np.asarray(probe["embedding"], "<f4").tobytes()
    kind = {"content-type": "application/octet-stream"}
    query = {"where": json.dumps({"tag": tag})}
    assert server.http.post("/v1/identify", params=query, content=raw, headers=kind).json()["gallery_size"] == 7


@pytest.mark.parametrize(
    "where", ["", "x", "[]", "{}", "1", '{"a": []}', '{"a": null}', '{"a": NaN}', '{"a": {"b": 1}}']
)
def test_filters_that_are_none(server, where):
    refused(server.http.get("/v1/subjects", params={"where": where}), 422, "invalid")
    files = [file(b"x")]
    assert server.http.post("/v1/identify", files=files, data={"where": where}).status_code == 422


def test_cursors_are_signed_and_of_one_list(server, tmp_path):
    tag = f"t{next(identities)}"
    for _ in range(3):
        person(server, {"tag": tag})
    where = json.dumps({"tag": tag})
    cursor = server.http.get("/v1/subjects", params={"limit": 1, "where": where}).json()["next_cursor"]
    assert server.http.get("/v1/subjects", params={"cursor": cursor, "where": where}).status_code == 200
    refused(server.http.get("/v1/subjects", params={"cursor": cursor}), 422, "invalid")
    for at in range(0, len(cursor), 5):
        forged = cursor[:at] + ("A" if cursor[at] != "A" else "B") + cursor[at + 1 :]
        refused(server.http.get("/v1/subjects", params={"cursor": forged, "where": where}), 422, "invalid")


def test_two_subjects_are_merged(server):
    into, _ = person(server, {"keeps": True}, samples=2)
    other, enrolled = person(server, {"goes": True})
    vector = unit_vectors(1, seed=next(identities))[0].tolist()
    server.http.post(f"/v1/subjects/{other}/samples", json={"embeddings": [vector]})
    path = f"/v1/subjects/{into}/merge"
    refused(server.http.post(path, json={"subject_id": into}), 422, "invalid")
    refused(server.http.post(path, json={"subject_id": "nobody"}), 404, "no_subject")
    done = server.http.post(
        path, json={"subject_id": other}, headers={"Idempotency-Key": f"merge {into}".replace(" ", "-")}
    )
    assert (done.status_code, done.json()["subject_samples"]) == (200, 4)
    again = server.http.post(path, json={"subject_id": other}, headers={"Idempotency-Key": f"merge-{into}"})
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json()["revision"] == done.json()["revision"]
    refused(server.http.get(f"/v1/subjects/{other}"), 404, "no_subject")
    body = server.http.get(f"/v1/subjects/{into}").json()
    assert (len(body["samples"]), body["metadata"]) == (4, {"keeps": True})
    assert enrolled.json()["samples"][0]["sample_id"] in {one["sample_id"] for one in body["samples"]}
    found = server.http.post("/v1/identify", json={"embedding": vector, "top_k": 1}).json()
    assert found["candidates"][0]["subject_id"] == into


def test_one_sample_is_read_and_erased(server):
    name, enrolled = person(server, samples=2)
    first, second = (one["sample_id"] for one in enrolled.json()["samples"])
    path = f"/v1/subjects/{name}/samples"
    vector = unit_vectors(2, seed=next(identities) - 1)[0]
    told = server.http.get(f"{path}/{first}", params={"embedding": "true"}).json()
    np.testing.assert_allclose(told["embedding"], vector, atol=1e-6)
    assert server.http.get(f"{path}/{first}").json()["embedding"] is None
    refused(server.http.get(f"{path}/{first}/image"), 404, "no_image")
    for unknown in (NOBODY, "x", "%00", "a" * 60):
        refused(server.http.get(f"{path}/{unknown}"), 404, "no_sample")
        refused(server.http.delete(f"{path}/{unknown}"), 404, "no_sample")
    assert server.http.delete(f"{path}/{first}").status_code == 204
    refused(server.http.delete(f"{path}/{first}"), 404, "no_sample")
    refused(server.http.delete(f"{path}/{second}"), 409, "last_sample")
    found = server.http.post("/v1/identify", json={"embedding": vector.tolist(), "below_threshold": True}).json()
    assert first not in json.dumps(found)


def test_images_are_kept_where_the_operator_says_so(keeping, photos):
    server, name = keeping, f"s{next(identities)}"
    answer = server.http.post(
        f"/v1/subjects/{name}/samples",
        files=[file(photos(1, n), "images") for n in range(2)],
        data={"metadata": '{"site": "north"}'},
    )
    ids = [one["sample_id"] for one in answer.json()["samples"]]
    for number, sample_id in enumerate(ids):
        kept = server.http.get(f"/v1/subjects/{name}/samples/{sample_id}/image")
        assert kept.content == photos(1, number)
        assert kept.headers["content-type"] == "application/octet-stream"
        assert kept.headers["x-content-type-options"] == "nosniff"
    body = server.http.get(f"/v1/subjects/{name}").json()
    assert body["metadata"] == {"site": "north"}
    assert [one["image"] for one in body["samples"]] == [True, True]


def test_enrolment_carries_metadata_and_qualities(server):
    x, name = unit_vectors(2, seed=next(identities)), f"s{next(identities)}"
    body = {"embeddings": x.tolist(), "qualities": [0.5, None], "sample_metadata": [{"camera": 1}, {}]}
    assert server.http.post(f"/v1/subjects/{name}/samples", json=body).status_code == 201
    samples = server.http.get(f"/v1/subjects/{name}").json()["samples"]
    assert [(one["quality"], one["metadata"]) for one in samples] == [(0.5, {"camera": 1}), (None, {})]
    wrong = {
        "too few qualities": {"qualities": [1.0]},
        "not finite": {"qualities": ["nan", 1]},
        "too few": {"sample_metadata": [{}]},
        "a list": {"metadata": []},
        "nested": {"metadata": {"a": {}}},
        "null": {"metadata": {"a": None}},
        "many keys": {"metadata": {f"k{n}": n for n in range(33)}},
        "a long text": {"metadata": {"a": "x" * 4096}},
        "a long key": {"metadata": {"k" * 65: 1}},
        "no key": {"metadata": {"": 1}},
        "huge": {"metadata": {"a": 2**60}},
    }
    for what, more in wrong.items():
        answer = server.http.post(f"/v1/subjects/{name}/samples", json={"embeddings": x.tolist()} | more)
        assert answer.status_code == 422, what
        refused(answer, 422, "invalid")
    assert len(server.http.get(f"/v1/subjects/{name}").json()["samples"]) == 2


def test_bulk_carries_metadata_and_qualities(server):
    x, names = unit_vectors(3, seed=next(identities)), [f"s{next(identities)}" for _ in range(3)]
    lines = [
        {"subject_id": names[0], "embeddings": [x[0].tolist()], "metadata": {"n": 0}, "qualities": [0.25]},
        {"subject_id": names[1], "embeddings": [x[1].tolist()], "metadata": {f"k{n}": "x" * 200 for n in range(30)}},
        {"subject_id": names[2], "embeddings": [x[2].tolist()]},
    ]
    content = "\n".join(map(json.dumps, lines)).encode()
    answer = server.http.post("/v1/samples", content=content, headers={"content-type": "application/x-ndjson"}).json()
    assert [one["status"] for one in answer["results"]] == ["enrolled", "refused", "enrolled"]
    assert "at most 4096" in answer["results"][1]["error"]["message"]
    body = server.http.get(f"/v1/subjects/{names[0]}").json()
    assert (body["metadata"], body["samples"][0]["quality"]) == ({"n": 0}, 0.25)
    head = {"subject_ids": names[1:], "metadata": [{"n": 1}, None], "qualities": [None, 2.0]}
    content = json.dumps(head).encode() + b"\n" + x[1:].astype("<f4").tobytes()
    kind = {"content-type": "application/octet-stream"}
    assert server.http.post("/v1/samples", content=content, headers=kind).json()["enrolled"] == 2
    body = server.http.get(f"/v1/subjects/{names[1]}").json()
    assert (body["metadata"], body["samples"][0]["quality"]) == ({"n": 1}, None)
    head["qualities"] = [1.0]
    content = json.dumps(head).encode() + b"\n" + x[1:].astype("<f4").tobytes()
    refused(server.http.post("/v1/samples", content=content, headers=kind), 422, "invalid")


def test_every_change_is_done_once_under_one_key(server):
    """The same request sent eight times at once, for each verb."""
    name, enrolled = person(server, {"a": 1}, samples=3)
    other, _ = person(server)
    path, sample = f"/v1/subjects/{name}", enrolled.json()["samples"][0]["sample_id"]
    changes = [
        ("PATCH", path, {"metadata": {"a": 2}}, 200),
        ("POST", f"{path}/merge", {"subject_id": other}, 200),
        ("DELETE", f"{path}/samples/{sample}", None, 204),
        ("DELETE", path, None, 204),
    ]
    for number, (method, target, body, status) in enumerate(changes):
        before = server.http.get("/readyz").json()["revision"]
        headers, answers = {"Idempotency-Key": f"{name}-{number}"}, []

        def send(method=method, target=target, body=body, headers=headers, answers=answers):
            with httpx.Client(base_url=server.url, timeout=60) as http:
                answers.append(http.request(method, target, json=body, headers=headers))

        threads = [threading.Thread(target=send) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [status] * 8, (method, target)
        assert sum("idempotent-replayed" in answer.headers for answer in answers) == 7
        assert server.http.get("/readyz").json()["revision"] == before + 1
        reused = server.http.request(method, target, json={"metadata": {"b": 3}}, headers=headers)
        if method == "PATCH":
            refused(reused, 409, "idempotency_key_reused")


def test_enrol_by_image_still_works_beside_metadata(server, photos):
    name = f"s{next(identities)}"
    assert enrol(server, name, photos(1), data={"metadata": '{"a": 1}'}).status_code == 201
    refused(enrol(server, name, photos(1), data={"metadata": "{"}), 422, "invalid")
    refused(enrol(server, name, photos(1), data={"metadata": "[]"}), 422, "invalid")
