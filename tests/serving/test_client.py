"""The client against the real service, and against one that fails in the ways that networks do."""

import asyncio
import itertools
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import pytest

from serving.client import AsyncClient, Client, ServiceError
from tests.serving.asking import identities
from tests.serving.conftest import Server, unit_vectors


@pytest.fixture
def client(server):
    with Client(server.url) as opened:
        yield opened


def test_everything_a_program_needs(client, photos):
    alice, bob = f"alice {next(identities)}", f"bob/{next(identities)}".replace("/", "-")
    face = next(identities)
    done = client.enrol(alice, images=[photos(face, 0), photos(face, 1)])
    assert (done.subject_created, len(done.samples)) == (True, 2)
    found = client.identify(image=photos(face, 2), top_k=3)
    assert (found.decision, found.candidates[0].subject_id) == ("match", alice)
    vectors = np.array(client.embed([photos(face, 3), photos(face, 4)]).embeddings)
    assert client.identify(embedding=vectors[0]).candidates[0].subject_id == alice
    client.enrol(bob, embeddings=-vectors)
    assert client.verify(photos(face, 5), photos(face, 6)).decision == "match"
    assert client.verify(photos(face, 5), alice).subject_id == alice
    assert client.verify(vectors[0], -vectors[0]).decision == "no_match"
    assert client.verify(vectors[0], bob).decision == "no_match"
    assert {alice, bob} <= {subject.subject_id for subject in client.subjects(page=2)}
    client.delete(alice)
    with pytest.raises(ServiceError, match="no subject") as refusal:
        client.verify(vectors[0], alice)
    assert (refusal.value.status, refusal.value.code) == (404, "no_subject")
    assert client.ready().gallery_size


def test_many_are_enrolled_in_several_requests(client, monkeypatch):
    monkeypatch.setattr("serving.client.blocking.A_REQUEST", 4)
    x, names, told = unit_vectors(10, seed=next(identities)), [f"m{next(identities)}" for _ in range(10)], []
    results = list(client.enrol_many(zip(names, x, strict=True), told.append))
    assert [result.subject_id for result in results] == names
    assert told == [4, 8, 10]
    assert client.identify(embedding=x[7]).candidates[0].subject_id == names[7]


@pytest.fixture(scope="module")
def folder(embedder, tmp_path_factory):
    """A server of several collections that keeps images."""
    store = tmp_path_factory.mktemp("collections")
    running = Server(embedder=embedder, store=store, keep_images=True)
    yield running
    running.kill()


def test_a_collection_from_its_making_to_its_end(folder, photos):
    with Client(folder.url) as service, Client(folder.url, collection="staff") as staff:
        assert service.create_collection("staff").name == "staff"
        assert [one.name for one in service.collections()] == ["default", "staff"]
        done = staff.enrol("alice", images=[photos(1, 0), photos(1, 1)], metadata={"site": "north"})
        assert [staff.image("alice", one.sample_id) for one in done.samples] == [photos(1, 0), photos(1, 1)]
        x = unit_vectors(4, seed=next(identities))
        many = [("bob", x[0], {"site": "south"}), ("carol", x[1:3])]
        assert [one.status for one in staff.enrol_many(many)] == ["enrolled"] * 3
        assert [one.subject_id for one in staff.subjects(where={"site": "south"})] == ["bob"]
        assert staff.identify(images=[photos(1, 2), photos(1, 3)]).probe_samples == 2
        assert staff.identify(embedding=x[0], where={"site": "north"}).gallery_size == 1
        found = staff.identify_many(embeddings=np.concatenate([x] * 100), top_k=1)
        assert [one.decision for one in found[:4]] == ["match", "match", "match", "unknown"]
        assert len(found) == 400
        assert [one.decision for one in staff.identify_many(images=[photos(1, 4), photos(2)])] == ["match", "unknown"]
        subject = staff.subject("bob")
        changed = staff.update("bob", {"site": None, "badge": 7}, revision=subject.revision)
        with pytest.raises(ServiceError) as refusal:
            staff.update("bob", {"badge": 8}, revision=subject.revision)
        assert (refusal.value.code, refusal.value.details) == ("revision_conflict", {"revision": changed.revision})
        assert staff.subject("bob").metadata == {"badge": 7}
        assert staff.merge("bob", "carol").subject_samples == 3
        sample = staff.sample("bob", staff.subject("bob").samples[1].sample_id, embedding=True)
        np.testing.assert_allclose(sample.embedding, x[1], atol=1e-6)
        staff.delete_sample("bob", sample.sample_id)
        told = []
        job = staff.duplicates(threshold=-1, progress=lambda done, total: told.append((done, total)))
        assert (job.state, [sorted(pair.subject_ids) for pair in job.pairs]) == ("done", [["alice", "bob"]])
        assert service.identify(embedding=x[0]).gallery_size == 0
        service.drop_collection("staff")
        with pytest.raises(ServiceError, match="no collection 'staff'"):
            staff.subject("bob")


def test_a_job_is_cancelled_where_its_progress_is_not_wanted(folder):
    class Enough(Exception):
        pass

    def stop(done, total):
        raise Enough

    with Client(folder.url) as client:
        client.enrol("alice", embeddings=unit_vectors(1))
        with pytest.raises(Enough):
            client.duplicates(progress=stop)


def test_both_clients_have_the_same_methods():
    both = [{name for name in vars(one) if not name.startswith("_")} for one in (Client, AsyncClient)]
    assert both[0] == both[1]


def test_all_of_it_awaited(folder, photos):
    async def run():
        x = unit_vectors(3, seed=next(identities))
        async with AsyncClient(folder.url) as service, AsyncClient(folder.url, collection="awaited") as client:
            await service.create_collection("awaited")
            await client.enrol("alice", images=[photos(3)], metadata={"a": 1})
            assert [one.status async for one in client.enrol_many([("bob", x)])] == ["enrolled"] * 3
            assert [one.subject_id async for one in client.subjects(where={"a": 1})] == ["alice"]
            await client.update("bob", {"b": 2}, revision=(await client.subject("bob")).revision)
            assert (await client.identify(embedding=x[0], where={"b": 2})).gallery_size == 1
            assert [one.decision for one in await client.identify_many(embeddings=x)] == ["match"] * 3
            job = await client.duplicates(threshold=-1)
            assert (job.state, len(job.pairs)) == ("done", 1)
            assert (await client.merge("bob", "alice")).subject_samples == 4
            samples = (await client.subject("bob")).samples
            assert photos(3) in [await client.image("bob", one.sample_id) for one in samples if one.image]
            await client.delete_sample("bob", samples[0].sample_id)
            await client.delete("bob")
            await service.drop_collection("awaited")
            assert "awaited" not in [one.name for one in await service.collections()]

    asyncio.run(run())


def test_the_same_when_awaited(server):
    async def run():
        x, names = unit_vectors(5, seed=next(identities)), [f"a{next(identities)}" for _ in range(5)]
        async with AsyncClient(server.url) as client:
            results = [result async for result in client.enrol_many(zip(names, x, strict=True))]
            assert [result.status for result in results] == ["enrolled"] * 5
            found = await asyncio.gather(*(client.identify(embedding=row) for row in x))
            assert [answer.candidates[0].subject_id for answer in found] == names
            await client.delete(names[0])
            listed = {subject.subject_id async for subject in client.subjects(page=100)}
            assert set(names[1:]) == listed & set(names)

    asyncio.run(run())


def test_images_or_embeddings_but_not_both(client):
    for nothing in ({}, {"images": [b"x"], "embeddings": unit_vectors(1)}):
        with pytest.raises(ValueError, match="either images or embeddings"):
            client.enrol("a", **nothing)


class Failing:
    """A service that fails so many times, in a way of its own, and then answers; `keys` are those it was sent."""

    def __init__(self, *failures):
        self.keys, self.asked = [], 0
        todo = itertools.chain(failures, itertools.repeat(None))
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_DELETE(self):
                outer.asked += 1
                outer.keys.append(self.headers["idempotency-key"])
                failure = next(todo)
                if failure == "gone":
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                self.send_response(failure or 204)
                if failure:
                    self.send_header("retry-after", "0")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.mark.parametrize("failures", [(503,), ("gone",), (429, "gone", 502, 504)])
def test_a_change_is_repeated_under_its_key(failures):
    failing = Failing(*failures)
    with Client(failing.url) as client:
        client.delete("alice")
    assert failing.asked == len(failures) + 1
    assert len(set(failing.keys)) == 1


def test_what_goes_on_failing_is_told():
    with Client(Failing(*[503] * 9).url, retries=2) as client, pytest.raises(ServiceError) as refusal:
        client.delete("alice")
    assert (refusal.value.status, refusal.value.code) == (503, "")
    failing = Failing(*["gone"] * 9)
    with Client(failing.url, retries=2) as client, pytest.raises(httpx.TransportError):
        client.delete("alice")
    assert failing.asked == 3


def test_what_is_refused_is_not_repeated():
    failing = Failing(404)
    with Client(failing.url) as client, pytest.raises(ServiceError):
        client.delete("alice")
    assert failing.asked == 1
