"""Several collections of one service: apart from each other, pinned to their models, made and dropped whole."""

import contextlib
import signal
import sqlite3
import threading
import time

import pytest

from serving.service import Service
from serving.settings import from_values
from serving.telemetry.metrics import TEXT_KEPT_S
from tests.serving.asking import enrol, file, identify, refused
from trainer.embedder import Embedder
from trainer.errors import UserError


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "collections"
    made.mkdir()
    return made


def _names(server):
    return [one["name"] for one in server.http.get("/v1/collections").json()["collections"]]


def test_collections_are_apart(serve, folder, embedder, photos):
    server = serve(store=folder)
    assert _names(server) == ["default"]
    made = server.http.post("/v1/collections", json={"name": "staff"})
    assert made.status_code == 201
    assert made.json() | {"request_id": ""} == {
        **{"name": "staff", "model_id": Embedder.open(embedder).model_id, "dimension": 32, "state": "ready"},
        **{"subjects": 0, "samples": 0, "revision": 0, "request_id": ""},
    }
    assert enrol(server, "alice", photos(1)).status_code == 201
    below = "/v1/collections/staff"
    answer = server.http.post(f"{below}/subjects/bob/samples", files=[file(photos(2), "images")])
    assert answer.status_code == 201
    found = {
        (where, person): server.http.post(f"{where}/identify", files=[file(photos(person, 1))]).json()["decision"]
        for where in ("/v1", "/v1/collections/default", below)
        for person in (1, 2)
    }
    assert [place for place, decision in found.items() if decision == "match"] == [
        *(("/v1", 1), ("/v1/collections/default", 1), (below, 2)),
    ]
    assert server.http.get(below).json()["subjects"] == 1
    text = server.http.get("/metrics").text
    assert 'hypersphere_gallery_subjects{collection="staff"} 1.0' in text
    assert 'route="/v1/collections/{collection}/identify"' in text
    assert server.http.delete(below).status_code == 204
    refused(server.http.get(below), 404, "no_collection")
    refused(server.http.post(f"{below}/identify", files=[file(photos(2, 1))]), 404, "no_collection")
    assert sorted(path.name for path in folder.iterdir()) == [
        f"default.db{end}" for end in ("", "-mark", "-shm", "-wal")
    ]
    time.sleep(TEXT_KEPT_S)
    assert 'collection="staff"' not in server.http.get("/metrics").text
    assert identify(server, photos(1, 1)).json()["decision"] == "match"


def test_collections_come_back_and_each_has_its_model(serve, folder, embedder, make_embedder, photos):
    other = make_embedder(seed=1)
    server = serve(store=folder, embedder=[str(embedder), str(other)])
    model = Embedder.open(other).model_id
    assert server.http.post("/v1/collections", json={"name": "other", "model_id": model}).status_code == 201
    for path in ("/v1", "/v1/collections/other"):
        assert server.http.post(f"{path}/subjects/a/samples", files=[file(photos(1), "images")]).status_code == 201
    vector = server.http.post("/v1/collections/other/embed", files=[file(photos(1), "images")]).json()
    assert vector["model_id"] == model
    wrong = server.http.post("/v1/identify", json={"embedding": vector["embeddings"][0], "model_id": model})
    refused(wrong, 409, "wrong_model")
    server.kill()
    server = serve(store=folder, embedder=[str(embedder), str(other)])
    assert _names(server) == ["default", "other"]
    answer = server.http.post("/v1/collections/other/identify", files=[file(photos(1, 1))]).json()
    assert (answer["decision"], answer["model_id"]) == ("match", model)
    server.end(signal.SIGTERM)
    with pytest.raises(UserError, match=f"holds vectors of model {model} .*serve the embedder that"):
        Service(from_values({"store": folder, "embedder": embedder}))


def test_a_name_is_a_file_in_the_folder_and_nothing_else(serve, folder):
    server = serve(store=folder, max_collections=3)
    for name in ("..", ".", "", "a/b", "A", "-a", "_a", "a" * 64, "ä", "a\n", "a.db", "a\x00", "default ", "%2e%2e"):
        refused(server.http.post("/v1/collections", json={"name": name}), 422, "invalid")
    refused(server.http.post("/v1/collections", json={"name": "a", "more": 1}), 422, "invalid")
    refused(
        server.http.post("/v1/collections", content=b"[" * 5000, headers={"content-type": "application/json"}),
        413,
        "json_too_large",
    )
    refused(server.http.post("/v1/collections", json={"name": "a", "model_id": "0" * 32}), 409, "wrong_model")
    refused(server.http.post("/v1/collections", json={"name": "default"}), 409, "collection_exists")
    for path in (
        "/v1/collections/..%2f..",
        "/v1/collections/%2e%2e/subjects",
        "/v1/collections/a%00b",
        "/v1/collections/nobody",
    ):
        assert server.http.get(path).status_code == 404, path
    assert [server.http.post("/v1/collections", json={"name": n}).status_code for n in "abc"] == [201, 201, 409]
    assert _names(server) == ["a", "b", "default"]


def test_of_two_who_create_a_collection_at_once_one_does(serve, folder):
    server, answers = serve(store=folder), []

    def create():
        with server.client() as http:
            answers.append(http.post("/v1/collections", json={"name": "staff"}).status_code)

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [201, *[409] * 7]


def test_one_file_is_one_collection(server):
    assert _names(server) == ["default"]
    refused(server.http.post("/v1/collections", json={"name": "staff"}), 409, "one_collection")
    refused(server.http.delete("/v1/collections/default"), 409, "one_collection")


def test_a_store_whose_name_ends_with_a_slash_is_a_folder(serve, tmp_path, embedder):
    server = serve(store=f"{tmp_path}/made/")
    assert server.http.post("/v1/collections", json={"name": "staff"}).status_code == 201
    assert (tmp_path / "made" / "staff.db").exists()
    (tmp_path / "file").touch()
    for wrong in ("file/", "missing/made/"):
        with pytest.raises(UserError, match="cannot be made"):
            from_values({"store": f"{tmp_path}/{wrong}", "embedder": embedder})


def test_what_a_kill_left_of_a_drop_goes_with_the_next_start(serve, folder, photos):
    server = serve(store=folder)
    server.http.post("/v1/collections", json={"name": "staff"})
    server.http.post("/v1/collections/staff/subjects/a/samples", files=[file(photos(1), "images")])
    server.kill()
    (folder / "staff.db").rename(folder / "staff.db.dropped")  # the first step of a drop
    server = serve(store=folder)
    assert _names(server) == ["default"]
    assert not list(folder.glob("staff*"))


def test_a_damaged_collection_is_left_out_and_said(serve, folder, photos):
    server = serve(store=folder)
    server.http.post("/v1/collections", json={"name": "staff"})
    server.http.post("/v1/collections/staff/subjects/somebody/samples", files=[file(photos(1), "images")])
    server.end(signal.SIGTERM)
    path = folder / "staff.db"
    path.write_bytes(path.read_bytes().replace(b"somebody", b"somebodY"))
    server = serve(store=folder)
    states = {one["name"]: one["state"] for one in server.http.get("/v1/collections").json()["collections"]}
    assert states == {"default": "ready", "staff": "failed"}
    assert server.http.get("/readyz").status_code == 200
    refused(server.http.post("/v1/collections/staff/identify", files=[file(photos(1))]), 503, "store_unavailable")
    assert identify(server, photos(1)).status_code == 200
    assert "the collection 'staff' is not served" in "".join(server.output)


def test_a_collection_that_refuses_changes_is_told(serve, folder, vectors):
    server, mark = serve(store=folder), folder / "staff.db-mark"
    server.http.post("/v1/collections", json={"name": "staff"})
    assert "faults" not in server.http.get("/readyz").json()
    mark.rename(folder.parent / "mark")
    body = {"embeddings": vectors(1).tolist()}
    refused(server.http.post("/v1/collections/staff/subjects/a/samples", json=body), 503, "store_unavailable")
    time.sleep(2.5)
    answer = server.http.get("/readyz")
    assert answer.status_code == 200
    assert set(answer.json()["faults"]) == {"staff"}
    assert "staff.db-mark' was removed" in answer.json()["faults"]["staff"]
    assert server.http.get("/v1/collections/staff").json()["state"] == "failed"
    assert 'hypersphere_collection_ready{collection="staff"} 0.0' in server.http.get("/metrics").text
    assert 'hypersphere_collection_ready{collection="default"} 1.0' in server.http.get("/metrics").text
    assert "".join(server.output).count("the collection 'staff' refuses changes") == 1


def test_thresholds_by_hand_are_of_one_model(embedder, make_embedder, folder):
    with pytest.raises(UserError, match="a threshold given by hand is one model's"):
        from_values({"store": folder, "embedder": [embedder, make_embedder(seed=1)], "verify_threshold": 0.5})


def test_a_creation_that_was_cut_off_leaves_nothing(serve, folder):
    server = serve(store=folder)
    server.kill()
    (folder / "staff.db").touch(0o600)
    server = serve(store=folder)
    assert _names(server) == ["default"]
    assert server.http.post("/v1/collections", json={"name": "staff"}).status_code == 201


def test_a_store_that_was_lost_is_noticed_in_a_folder_too(serve, folder, embedder):
    server = serve(store=folder)
    server.http.post("/v1/collections", json={"name": "staff"})
    server.end(signal.SIGTERM)
    (folder / "staff.db").rename(folder.parent / "elsewhere.db")
    with pytest.raises(UserError, match="is missing or empty, but its mark"):
        Service(from_values({"store": folder, "embedder": embedder}))


def test_a_store_that_was_put_there_meanwhile_is_not_taken_for_a_new_one(serve, folder):
    server = serve(store=folder)
    (folder / "put.db").write_bytes(b"something")
    refused(server.http.post("/v1/collections", json={"name": "put"}), 409, "collection_exists")
    assert (folder / "put.db").read_bytes() == b"something"


def test_a_collection_is_created_and_dropped_once_under_one_key(serve, folder):
    server, key = serve(store=folder), {"Idempotency-Key": "one"}
    for replayed in (False, True):
        answer = server.http.post("/v1/collections", json={"name": "staff"}, headers=key)
        assert (answer.status_code, "idempotent-replayed" in answer.headers) == (201, replayed)
    other = {"name": "staff", "model_id": None}
    refused(server.http.post("/v1/collections", json=other, headers=key), 409, "idempotency_key_reused")
    assert server.http.post("/v1/collections", json={"name": "others"}, headers=key).status_code == 201
    for replayed in (False, True):
        answer = server.http.delete("/v1/collections/staff", headers={"Idempotency-Key": "two"})
        assert (answer.status_code, "idempotent-replayed" in answer.headers) == (204, replayed)
    anew = server.http.post("/v1/collections", json={"name": "staff"}, headers=key)
    assert (anew.status_code, "idempotent-replayed" in anew.headers) == (201, False)


def test_a_collection_is_dropped_under_those_who_use_it(serve, folder, vectors):
    """Every request is answered as before, or that there is no such collection."""
    server, answers = serve(store=folder), []
    body = {"embedding": vectors(1)[0].tolist()}

    def use(number):
        with server.client() as http:
            for n in range(40):
                enrolled = http.post(
                    f"/v1/collections/staff/subjects/{number}-{n}/samples", json={"embeddings": [body["embedding"]]}
                )
                found = http.post("/v1/collections/staff/identify", json=body)
                answers.extend(
                    (answer.status_code, answer.json().get("error", {}).get("code")) for answer in (enrolled, found)
                )

    for _ in range(3):
        assert server.http.post("/v1/collections", json={"name": "staff"}).status_code == 201
        threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        assert server.http.delete("/v1/collections/staff").status_code == 204
        for thread in threads:
            thread.join()
    assert set(answers) <= {(201, None), (200, None), (404, "no_collection")}, set(answers)
    assert not list(folder.glob("staff*"))


def test_no_file_that_the_service_did_not_make_is_removed(folder, embedder):
    with contextlib.closing(sqlite3.connect(folder / "notes.db")) as notes:
        notes.execute("CREATE TABLE notes (text TEXT)")
    (folder / "cut.db").touch()
    with pytest.raises(UserError, match=r"notes\.db' is another program's database"):
        Service(from_values({"store": folder, "embedder": embedder}))
    assert sorted(path.name for path in folder.iterdir()) == ["cut.db", "notes.db"]


def test_a_store_in_the_place_of_a_dropped_one_is_not_taken_for_it(serve, folder, embedder):
    serve(store=folder).kill()
    (folder / "default.db.dropped").touch()
    with pytest.raises(UserError, match="was dropped, but is there again"):
        Service(from_values({"store": folder, "embedder": embedder}))
    assert (folder / "default.db").stat().st_size


def test_a_drop_takes_only_the_files_of_the_store(serve, folder):
    server = serve(store=folder)
    server.http.post("/v1/collections", json={"name": "staff"})
    kept = {folder / f"staff.db{end}" for end in ("-backup-2026.sqlite", "-keys")}
    for path in kept:
        path.touch()
    assert server.http.delete("/v1/collections/staff").status_code == 204
    assert set(folder.glob("staff*")) == kept


def test_nothing_of_a_dropped_collection_is_taken_for_the_next_ones(serve, folder, vectors):
    server, key, below = serve(store=folder), {"Idempotency-Key": "one"}, "/v1/collections/staff"
    lives = []
    for _ in range(2):
        assert server.http.post("/v1/collections", json={"name": "staff"}).status_code == 201
        assert server.http.get("/v1/jobs").json()["jobs"] == []
        sent = {"embeddings": [vectors(1)[0].tolist()]}
        enrolled = server.http.post(f"{below}/subjects/alice/samples", json=sent)
        job = server.http.post(f"{below}/duplicates", json={}, headers=key)
        assert (job.status_code, "idempotent-replayed" in job.headers) == (202, False)
        lives.append((enrolled.headers["etag"], job.json()["job_id"]))
        if len(lives) == 1:
            assert server.http.delete(below).status_code == 204
    (old, job_id), (new, _) = lives
    refused(server.http.get(f"/v1/jobs/{job_id}"), 404, "no_job")
    path = f"{below}/subjects/alice"
    refused(server.http.delete(path, headers={"If-Match": old}), 412, "revision_conflict")
    assert server.http.delete(path, headers={"If-Match": new}).status_code == 204
