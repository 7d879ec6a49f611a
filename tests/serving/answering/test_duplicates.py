"""Jobs that look for duplicates: what they find, their progress, and their end."""

import threading
import time

import numpy as np
import pytest

from serving.answering.collections import Collection
from serving.answering.duplicates import Pairs, duplicates
from serving.answering.jobs import MOST_KEPT, MOST_UNDER_WAY, Jobs
from serving.errors import ApiError
from serving.storage.changes import IdempotencyKey
from tests.serving.asking import refused
from tests.serving.galleries import open_gallery


def _crowd(vectors, subjects=200, twins=40):
    """Vectors of subjects, of whom the last ones resemble the first ones, and some have two samples."""
    x_ND = vectors(subjects)
    noise_ND = 0.3 * vectors(subjects, seed=1)
    rows = [(f"s{n}", x_ND[n]) for n in range(subjects)]
    for n in range(twins):
        twin_D = x_ND[n] + noise_ND[n]
        rows.append((f"t{n % 20}", twin_D / np.linalg.norm(twin_D)))
    return [name for name, _ in rows], np.asarray([row for _, row in rows], np.float32)


@pytest.fixture
def gallery(tmp_path, vectors):
    opened = open_gallery(tmp_path / "gallery.db")
    names, x_ND = _crowd(vectors)
    opened.enrol_many([(name, row[None]) for name, row in zip(names, x_ND, strict=True)])
    yield opened
    opened.close()


def _as_a_loop(vectors, threshold):
    names, x_ND = _crowd(vectors)
    found = {}
    for one, row_D in zip(names, x_ND, strict=True):
        for another, other_D in zip(names, x_ND, strict=True):
            if one < another and (score := float(row_D @ other_D)) >= threshold:
                found[one, another] = max(score, found.get((one, another), -1))
    return found


@pytest.mark.parametrize("threshold", [0.8, 0.3, -0.2])
def test_all_pairs_at_or_above_the_threshold_are_found(gallery, vectors, threshold):
    expected, pairs = _as_a_loop(vectors, threshold), Pairs()
    duplicates(gallery, threshold, 100_000, pairs, lambda done, total: None)
    assert set(pairs.scores) == set(expected)
    assert len(expected) >= 40
    for pair, score in pairs.scores.items():
        assert score == pytest.approx(expected[pair], abs=1e-5)
    assert not pairs.truncated


def test_of_too_many_pairs_the_best_are_kept(gallery, vectors):
    expected, pairs = _as_a_loop(vectors, -1.0), Pairs()
    duplicates(gallery, -1.0, 30, pairs, lambda done, total: None)
    best = sorted(expected, key=lambda pair: -expected[pair])[:30]
    assert [pair for pair, _ in pairs.best(30)] == best
    assert pairs.truncated
    assert len(pairs.scores) <= 60


def _until_ended(ask):
    end = time.monotonic() + 60
    while (job := ask())["state"] in ("waiting", "running") and time.monotonic() < end:
        time.sleep(0.02)
    return job


def test_a_job_over_http(server, vectors):
    names, x_ND = _crowd(vectors)
    lines = b"".join(
        b'{"subject_id": "%b", "embeddings": [%b]}\n' % (name.encode(), str(row.tolist()).encode())
        for name, row in zip(names, x_ND, strict=True)
    )
    server.http.post("/v1/samples", content=lines, headers={"content-type": "application/x-ndjson"})
    body, key = {"threshold": 0.8, "limit": 25}, {"Idempotency-Key": "one"}
    started = server.http.post("/v1/duplicates", json=body, headers=key)
    assert started.status_code == 202
    path = started.headers["location"]
    job = _until_ended(lambda: server.http.get(path).json())
    expected = _as_a_loop(vectors, 0.8)
    assert (job["state"], job["done"], job["total"]) == ("done", len(names), len(names))
    assert (len(job["pairs"]), job["truncated"]) == (25, True)
    assert all(tuple(pair["subject_ids"]) in expected for pair in job["pairs"])
    again = server.http.post("/v1/duplicates", json=body, headers=key)
    assert (again.json()["job_id"], again.headers["idempotent-replayed"]) == (job["job_id"], "true")
    assert "idempotent-replayed" not in started.headers
    refused(server.http.post("/v1/duplicates", json={"limit": 1}, headers=key), 409, "idempotency_key_reused")
    by_default = server.http.post("/v1/collections/default/duplicates", json={}).json()
    assert (
        by_default["threshold"]
        == server.http.post("/v1/identify", json={"embedding": x_ND[0].tolist()}).json()["threshold"]
    )
    gone = job["pairs"][0]["subject_ids"][0]
    server.http.delete(f"/v1/subjects/{gone}")
    assert gone not in str(server.http.get(path).json()["pairs"])
    assert server.http.delete(path).status_code == 204
    assert server.http.get(path).json()["state"] == "done"
    assert server.http.get("/v1/jobs").json()["jobs"][0]["job_id"] == job["job_id"]
    refused(server.http.get("/v1/jobs/nobody"), 404, "no_job")
    refused(server.http.delete("/v1/jobs/nobody"), 404, "no_job")
    for wrong in ({"threshold": 2}, {"limit": 0}, {"limit": 1e9}, {"more": 1}, {"threshold": "NaN"}):
        refused(server.http.post("/v1/duplicates", json=wrong), 422, "invalid")


@pytest.fixture
def jobs():
    made = Jobs(hours=1)
    yield made
    made.close()


def _collection(gallery, name="default"):
    return Collection(name, gallery, None, None, None, None)


def test_a_job_is_cancelled_and_others_wait_their_turn(jobs, gallery, monkeypatch):
    goes_on = threading.Event()
    nearest = gallery.nearest

    def waiting(*arguments):
        assert goes_on.wait(30)
        return nearest(*arguments)

    monkeypatch.setattr(gallery, "nearest", waiting)
    first, second, third = (jobs.start(_collection(gallery), 0.8, 10, None)[0] for _ in range(3))
    jobs.cancel(first)
    jobs.cancel(third)
    goes_on.set()
    job = _until_ended(lambda: vars(jobs.get(second.job_id)))
    assert job["state"] == "done"
    assert (first.state, third.state) == ("cancelled", "cancelled")
    assert first.done < second.done


def test_jobs_are_bounded_and_one_key_is_one_job(jobs, gallery, monkeypatch):
    goes_on = threading.Event()
    monkeypatch.setattr(gallery, "pieces", lambda: iter(goes_on.wait(30) and []))
    key = IdempotencyKey("one", b"request")
    started = {jobs.start(_collection(gallery), 0.8, 10, key)[0].job_id for _ in range(5)}
    assert len(started) == 1
    for _ in range(MOST_UNDER_WAY - 1):
        jobs.start(_collection(gallery), 0.8, 10, None)
    with pytest.raises(ApiError, match="as many as are allowed"):
        jobs.start(_collection(gallery), 0.8, 10, None)
    goes_on.set()
    for job in jobs.all():
        _until_ended(lambda job=job: vars(job))
    for _ in range(2 * MOST_KEPT):
        job, _ = jobs.start(_collection(gallery), 0.8, 10, None)
        _until_ended(lambda job=job: vars(job))
    assert len(jobs.all()) == MOST_KEPT


def test_a_job_on_a_closed_gallery_fails_in_words(jobs, gallery):
    gallery.close()
    job, _ = jobs.start(_collection(gallery), 0.8, 10, None)
    _until_ended(lambda: vars(job))
    assert (job.state, "closed" in job.error) == ("failed", True)


def test_jobs_and_keys_of_one_collection_are_nothing_to_another(jobs, gallery, monkeypatch):
    goes_on = threading.Event()
    monkeypatch.setattr(gallery, "pieces", lambda: iter(goes_on.wait(30) and []))
    one, another = _collection(gallery, "one"), _collection(gallery, "another")
    key = IdempotencyKey("one", b"request")
    first, _ = jobs.start(one, 0.8, 10, key)
    for number in range(MOST_UNDER_WAY):
        jobs.start(another, 0.8, 10, IdempotencyKey("one", b"other") if number == 0 else None)
    assert jobs.start(one, 0.8, 10, key) == (first, True)
    jobs.start(one, 0.8, 10, None)
    goes_on.set()
    for job in jobs.all():
        _until_ended(lambda job=job: vars(job))
    for _ in range(MOST_KEPT):
        job, _ = jobs.start(another, 0.8, 10, None)
        _until_ended(lambda job=job: vars(job))
    assert jobs.get(first.job_id) is first


def test_jobs_go_with_their_collection(jobs, gallery, monkeypatch):
    begun, goes_on = threading.Event(), threading.Event()

    def cut_off():
        begun.set()
        assert goes_on.wait(30)
        raise ValueError("Cannot operate on a closed database")

    monkeypatch.setattr(gallery, "pieces", cut_off)
    collection, key = _collection(gallery), IdempotencyKey("one", b"request")
    job, _ = jobs.start(collection, 0.8, 10, key)
    assert begun.wait(30)
    collection.dropped.set()
    jobs.forget(collection)
    goes_on.set()
    _until_ended(lambda: vars(job))
    assert (job.state, job.error, jobs.all()) == ("failed", "the collection was dropped", [])
    with pytest.raises(ApiError, match="no job"):
        jobs.get(job.job_id)
    with pytest.raises(ApiError, match="was dropped"):
        jobs.start(collection, 0.8, 10, None)
    assert not jobs.start(_collection(gallery), 0.8, 10, key)[1]
