"""What is answered is on disk: kills without warning, full disks and restarts of the real server."""

import os
import resource
import signal
import socket
import threading
import time

import httpx
import numpy as np
import pytest

from serving.server.process import run
from serving.service import Service
from serving.settings import from_values
from trainer.errors import UserError


def _listed(server):
    found, cursor = {}, None
    while True:
        answer = server.http.get("/v1/subjects", params={"limit": 1000} | ({"cursor": cursor} if cursor else {})).json()
        found |= {subject["subject_id"]: subject["samples"] for subject in answer["subjects"]}
        cursor = answer["next_cursor"]
        if cursor is None:
            return found


class _Writer(threading.Thread):
    """Enrols and deletes subjects of its own until the server is gone; keeps what was acknowledged."""

    def __init__(self, server, name, rows):
        super().__init__()
        self.present, self.absent = {}, set()  # acknowledged as enrolled (number of the row), and as erased
        self.unsure = set()  # asked for, not acknowledged: may be either
        self._http, self._name, self._rows = server.client(), name, rows

    def run(self):
        with self._http:
            for number, row in enumerate(self._rows):
                subject_id = f"{self._name}-{number}"
                self.unsure.add(subject_id)
                try:
                    body = {"embeddings": [row.tolist()]}
                    assert self._http.put(f"/v1/subjects/{subject_id}/samples", json=body).status_code == 201
                    self.unsure.discard(subject_id)
                    self.present[subject_id] = number
                    if number % 3 == 2:
                        victim = f"{self._name}-{number - 1}"
                        self.unsure.add(victim)
                        del self.present[victim]
                        assert self._http.delete(f"/v1/subjects/{victim}").status_code == 204
                        self.unsure.discard(victim)
                        self.absent.add(victim)
                except httpx.TransportError:
                    return


def test_kill_9_loses_nothing_that_was_acknowledged(serve, vectors):
    """At random moments, several times on the same store, with two clients writing."""
    rng = np.random.default_rng()
    rows = vectors(4000)
    present, absent = {}, set()
    for life in range(3):
        server = serve()
        writers = [_Writer(server, f"life{life}-{name}", rows[start::2]) for start, name in enumerate("ab")]
        for writer in writers:
            writer.start()
        end = time.monotonic() + 20
        while sum(len(writer.present) for writer in writers) < 5 and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        server.kill()
        for start, writer in enumerate(writers):
            writer.join(30)
            present |= {subject_id: start + 2 * number for subject_id, number in writer.present.items()}
            absent |= writer.absent
    server = serve()
    listed = _listed(server)
    assert not set(present) - set(listed), "acknowledged enrolments were lost"
    assert not absent & set(listed), "erased subjects came back"
    assert len(present) >= 12
    assert len(absent) >= 3
    for subject_id, number in list(present.items())[:: max(1, len(present) // 40)]:
        body = {"probe": rows[number].tolist(), "subject_id": subject_id}
        assert server.http.post("/v1/verify", json=body).json()["score"] == pytest.approx(1, abs=1e-5)
    ready = server.http.get("/readyz").json()
    assert (ready["gallery_size"], ready["samples"]) == (len(listed), sum(listed.values()))


def test_a_full_disk_is_a_503_and_loses_nothing(serve, vectors, tmp_path):
    """The kernel refuses to let the server's files grow, as a full disk would."""
    server = serve()
    rows = vectors(3000)
    assert server.http.put("/v1/subjects/first/samples", json={"embeddings": [rows[0].tolist()]}).status_code == 201
    limit = (tmp_path / "gallery.db-wal").stat().st_size + 60_000
    before = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    acknowledged = ["first"]
    for number, row in enumerate(rows[1:], 1):
        answer = server.http.put(f"/v1/subjects/s{number}/samples", json={"embeddings": [row.tolist()]})
        if answer.status_code != 201:
            break
        acknowledged.append(f"s{number}")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "store_unavailable"
    assert "Traceback" not in answer.text
    assert list(_listed(server)) == acknowledged
    found = server.http.post("/v1/identify", json={"embedding": row.tolist(), "top_k": 1}).json()
    assert found["decision"] == "unknown"  # the refused one is not in the index either
    assert server.http.get("/readyz").status_code == 200
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, before)
    assert server.http.put("/v1/subjects/after/samples", json={"embeddings": [row.tolist()]}).status_code == 201
    server.kill()
    assert list(_listed(serve())) == [*acknowledged, "after"]


def test_sigterm_finishes_the_request_under_way(serve, vectors):
    server = serve()
    body = {"embeddings": [row.tolist() for row in vectors(32)]}
    answers = []

    def enrol():
        with server.client() as http:
            for number in range(3):
                try:
                    answers.append(http.put(f"/v1/subjects/s{number}-{len(answers)}/samples", json=body).status_code)
                except httpx.TransportError:
                    return

    threads = [threading.Thread(target=enrol) for _ in range(3)]
    for thread in threads:
        thread.start()
    while not answers:
        time.sleep(0.001)
    assert server.end(signal.SIGTERM) == 0
    for thread in threads:
        thread.join(30)
    assert set(answers) == {201}
    assert not os.path.exists(f"{server.store}-wal"), "the store was not closed"


def test_an_enrolment_is_seen_by_the_next_search_of_anybody(serve, vectors):
    """Threads enrol, search for and delete their own people at the same time, and each sees its own changes at once."""
    server = serve()
    rows = vectors(60)
    faults = []

    def live(start):
        with server.client() as http:
            for number in range(start, 60, 4):
                probe = {"embedding": rows[number].tolist(), "top_k": 1}
                http.put(f"/v1/subjects/s{number}/samples", json={"embeddings": [rows[number].tolist()]})
                found = http.post("/v1/identify", json=probe).json()
                if found["decision"] != "match" or found["candidates"][0]["subject_id"] != f"s{number}":
                    faults.append(("not found", number, found))
                http.delete(f"/v1/subjects/s{number}")
                found = http.post("/v1/identify", json=probe).json()
                if f"s{number}" in [candidate["subject_id"] for candidate in found["candidates"]]:
                    faults.append(("still there", number, found))

    threads = [threading.Thread(target=live, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not faults
    assert server.http.get("/readyz").json()["gallery_size"] == 0


def test_the_same_key_at_the_same_time_is_done_once(serve, vectors):
    server = serve()
    body, answers = {"embeddings": [vectors(1)[0].tolist()]}, []

    def enrol():
        with server.client() as http:
            answers.append(http.put("/v1/subjects/a/samples", json=body, headers={"Idempotency-Key": "k"}).json())

    threads = [threading.Thread(target=enrol) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len({answer["samples"][0]["sample_id"] for answer in answers}) == 1
    assert len(answers) == 6
    assert server.http.get("/readyz").json()["samples"] == 1


def test_a_service_that_cannot_start_says_why(embedder, make_embedder, tmp_path):
    def start(**settings):
        service = Service(from_values({"embedder": embedder, "store": tmp_path / "gallery.db", **settings}))
        service.close()

    start()
    with pytest.raises(UserError, match="cannot be compared; serve the embedder that filled the store"):
        start(embedder=make_embedder(seed=1))
    with pytest.raises(UserError, match="has no calibration, so there is no threshold to verify by"):
        start(embedder=make_embedder(calibrated=False))
    start(
        embedder=make_embedder(calibrated=False),
        store=tmp_path / "other.db",
        verify_threshold=0.5,
        identify_threshold=0.5,
    )
    (tmp_path / "gallery.db").write_bytes(b"SQLite format 3\0" + bytes(5000))
    with pytest.raises(UserError, match=r"gallery\.db' cannot be opened"):
        start()


def test_an_address_in_use_is_refused_and_the_store_let_go(embedder, tmp_path):
    settings = from_values({"embedder": embedder, "store": tmp_path / "gallery.db"})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for _ in range(2):  # the second time finds the store free again
            with pytest.raises(UserError, match="cannot listen on"):
                run(settings, "127.0.0.1", taken.getsockname()[1])


def test_settings_are_checked():
    with pytest.raises(UserError) as refused:
        from_values({"embedder": "e", "store": "s", "api_key": "secret", "workers": 0, "speed": 1})
    text = str(refused.value)
    assert all(name in text for name in ("api_key", "workers", "speed"))
    assert "secret" not in text
