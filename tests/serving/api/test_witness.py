"""What the service writes into its audit log, and what it does when it cannot."""

import itertools
import json
import re

import pytest

from serving.access.chain import entries, find, verify
from serving.access.keys import keys_path, opened
from serving.access.scopes import Scope
from tests.disk import small_disk
from tests.serving.asking import enrol, file, identify, refused
from tests.serving.conftest import DIMENSION, unit_vectors


def lines(folder):
    return [json.loads(text) for _, _, text in entries(folder)]


def test_who_did_what(serve, tmp_path, photos):
    folder = tmp_path / "log"
    with opened(keys_path(tmp_path / "gallery.db"), make=True) as keys:
        door = keys.create("door", [Scope.READ])
        desk = keys.create("desk", [Scope.ENROL, Scope.READ, Scope.AUDIT])
    server = serve(audit=folder, audit_file_bytes=4096, api_key="correct-horse-battery")
    as_desk = {"Authorization": f"Bearer {desk}"}
    assert enrol(server, "alice", photos(1), headers=as_desk).status_code == 201
    assert lines(folder)[-1]["do"] == "POST /v1/subjects/{subject_id}/samples"  # before its answer
    server.http.headers["X-API-Key"] = door
    assert identify(server, photos(1, 1)).json()["decision"] == "match"
    refused(enrol(server, "bob", photos(2)), 403, "scope_missing")
    server.http.headers["X-API-Key"] = desk
    body = "".join(
        json.dumps({"subject_id": f"p{number}", "embeddings": [vector.tolist()]}) + "\n"
        for number, vector in enumerate(unit_vectors(3, dimension=DIMENSION))
    )
    bulk = server.http.post("/v1/samples", content=body, headers={"Content-Type": "application/x-ndjson"})
    assert bulk.json()["enrolled"] == 3
    merged = server.http.post("/v1/subjects/p0/merge", json={"subject_id": "p1"})
    assert merged.status_code == 200
    server.http.post("/v1/verify", files=[file(photos(1), "probe")], data={"subject_id": "alice"})
    deleted = server.http.delete("/v1/subjects/alice", headers={"X-Request-ID": "the-end"})
    assert deleted.status_code == 204
    refused(server.http.delete("/v1/subjects/alice"), 404, "no_subject")
    for wrong in ("wrong-horse-battery", f"hsk_{12 * 'a'}_{16 * 'bad0'}"):
        refused(server.http.get("/v1/subjects", headers={"X-API-Key": wrong}), 401, "key_wrong")
    with opened(keys_path(tmp_path / "gallery.db")) as keys:
        keys.revoke(door.split("_")[1])
    while server.http.get("/v1/collections", headers={"X-API-Key": door}).status_code != 401:
        pass
    pages, cursor = [], "0-0"
    while len(pages) < 12:  # each of these requests becomes a line, too, sooner or later
        answer = server.http.get("/v1/audit", params={"limit": 3, "cursor": cursor}).json()
        assert len(answer["lines"]) <= 3
        pages, cursor = pages + answer["lines"], answer["next_cursor"]
    refused(server.http.get("/v1/audit", params={"cursor": "1-5"}), 422, "invalid")
    refused(server.http.get("/v1/audit", params={"cursor": "1-999999999999999999"}), 422, "invalid")
    assert server.end() == 0
    head, first = verify(folder)
    found = lines(folder)
    assert (head.number, first) == (len(found), 1)
    assert [page["n"] for page in pages] == list(range(1, len(pages) + 1))
    ids = {door.split("_")[1]: "door", desk.split("_")[1]: "desk", "service": "service"}
    told = [(ids[line["key"]], line["do"], line["status"], len(line["subjects"])) for line in found]
    told = [line for line in told if line[1] not in ("GET /v1/audit", "GET /v1/collections")]
    assert told == [
        ("service", "start", 0, 0),
        ("desk", "POST /v1/subjects/{subject_id}/samples", 201, 1),
        ("door", "POST /v1/identify", 200, 1),
        ("door", "POST /v1/subjects/{subject_id}/samples", 403, 1),
        ("desk", "POST /v1/samples", 200, 3),
        ("desk", "POST /v1/subjects/{subject_id}/merge", 200, 2),
        ("desk", "POST /v1/verify", 200, 1),
        ("desk", "DELETE /v1/subjects/{subject_id}", 204, 1),
        ("desk", "DELETE /v1/subjects/{subject_id}", 404, 1),
        ("door", "key revoked", 0, 0),
        ("service", "stop", 0, 0),
    ]
    assert [line["request"] for line in found if line["status"] == 204] == ["the-end"]
    assert len(list(find(folder, "default", "alice"))) == 5
    assert [len(list(find(folder, "default", name))) for name in ("p0", "p1", "p2")] == [2, 2, 1]
    everything = b"".join(path.read_bytes() for path in folder.iterdir()) + "".join(server.output).encode()
    for secret in ("alice", "p2", door[17:], desk[17:], "horse", "bad0bad0"):
        assert secret.encode() not in everything


def test_lines_say_what_was_done(serve, tmp_path):
    folder = tmp_path / "log"
    (tmp_path / "stores").mkdir()
    server = serve(audit=folder, store=tmp_path / "stores")
    http, vector = server.http, unit_vectors(1, dimension=DIMENSION)[0].tolist()
    assert http.post("/v1/collections", json={"name": "staff"}).status_code == 201
    refused(http.post("/v1/collections", json={"name": "Dr. Alice"}), 422, "invalid")
    for name in ("alice", "bob"):
        body = json.dumps({"subject_id": name, "embeddings": [vector]}) + "\n"
        http.post("/v1/collections/staff/samples", content=body, headers={"Content-Type": "application/x-ndjson"})
    assert len(http.get("/v1/collections/staff/subjects").json()["subjects"]) == 2
    job = http.post("/v1/collections/staff/duplicates", json={}).headers["location"]
    while http.get(job).json()["state"] in ("waiting", "running"):
        pass
    assert len(http.get(job, headers={"X-Request-ID": "told"}).json()["pairs"]) == 1
    assert http.delete(job).status_code == 204
    refused(http.post("/v1/verify", json={"probe": vector, "subject_id": "nobody"}), 404, "no_subject")
    refused(http.get(f"/v1/collections/{'Alice' * 4000}/subjects"), 404, "no_collection")
    assert http.delete("/v1/collections/staff").status_code == 204
    assert server.end() == 0
    found = [line for line in lines(folder) if line["do"] != "GET /v1/jobs/{job_id}" or line["request"] == "told"]
    assert [(line["do"], line["collection"], len(line["subjects"])) for line in found] == [
        ("start", "", 0),
        ("POST /v1/collections", "staff", 0),
        ("POST /v1/collections", "?", 0),
        ("POST /v1/collections/{collection}/samples", "staff", 1),
        ("POST /v1/collections/{collection}/samples", "staff", 1),
        ("GET /v1/collections/{collection}/subjects", "staff", 2),
        ("POST /v1/collections/{collection}/duplicates", "staff", 0),
        ("GET /v1/jobs/{job_id}", "staff", 2),
        ("DELETE /v1/jobs/{job_id}", "staff", 0),
        ("POST /v1/verify", "default", 1),
        ("GET /v1/collections/{collection}/subjects", "?", 0),
        ("DELETE /v1/collections/{collection}", "staff", 0),
        ("stop", "", 0),
    ]
    assert len(list(find(folder, "default", "nobody"))) == 1


def test_a_log_that_is_moved_away_lets_nothing_be_done(serve, tmp_path, photos):
    server = serve(audit=tmp_path / "log")
    assert enrol(server, "alice", photos(1)).status_code == 201
    (tmp_path / "log").rename(tmp_path / "elsewhere")
    refused(enrol(server, "bob", photos(2)), 503, "audit_unavailable")
    while "nothing is done" not in refused(enrol(server, "bob", photos(2)), 503, "audit_unavailable")["message"]:
        pass
    (tmp_path / "elsewhere").rename(tmp_path / "log")
    while (answer := enrol(server, "carol", photos(3))).status_code == 503:
        pass
    assert answer.status_code == 201
    server.end()
    verify(tmp_path / "log")


def test_a_full_disk_of_the_log_leaves_the_gallery_as_it_is(serve, tmp_path, photos):
    with small_disk(tmp_path / "disk") as disk:
        server = serve(audit=disk / "log")
        with (disk / "ballast").open("wb", buffering=0) as ballast:
            try:
                while True:
                    ballast.write(bytes(4096))
            except OSError:
                pass
        done = []
        for number in itertools.count():
            answer = enrol(server, f"p{number}", photos(1))
            if answer.status_code != 201:
                break
            done.append(f"p{number}")
            assert number < 500
        error = refused(answer, 503, "audit_unavailable")
        assert "nothing is done" in error["message"]
        refused(identify(server, photos(1)), 503, "audit_unavailable")
        assert server.http.get("/readyz").json()["gallery_size"] == len(done)
        (disk / "ballast").unlink()
        while (answer := enrol(server, "later", photos(1))).status_code == 503:
            pass
        assert answer.status_code == 201
        server.end()
        verify(disk / "log")
        answered = [line for line in lines(disk / "log") if line["status"] == 201]
        assert len(answered) == len(done) + 1


def test_without_a_log_there_is_none(server):
    refused(server.http.get("/v1/audit"), 404, "no_audit")


@pytest.mark.parametrize("cursor", ["", "1", "-1--1", "1-1e9", "9" * 30 + "-0"])
def test_cursors_that_are_none(server, cursor):
    error = refused(server.http.get("/v1/audit", params={"cursor": cursor}), 422, "invalid")
    assert re.search("cursor", error["message"])
