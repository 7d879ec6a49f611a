"""Faults of the program itself, and a gallery that is not there yet, in the app without a server around it."""

import asyncio
import contextlib
import threading
import time

import httpx
import pytest

from serving.api import create_app
from serving.search.projection import Stopped
from serving.settings import from_values
from trainer.errors import UserError


@contextlib.asynccontextmanager
async def asking(app):
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        yield http


async def until_loaded(http):
    while (await http.get("/readyz")).status_code == 503:
        await asyncio.sleep(0.01)


@pytest.fixture
def app(embedder, tmp_path):
    return create_app(from_values({"embedder": embedder, "store": tmp_path / "gallery.db"}))


def test_a_fault_is_a_500_in_the_same_shape_without_a_traceback(app, monkeypatch, vectors):
    body = {"embedding": vectors(1)[0].tolist()}

    def fail(*_):
        raise ZeroDivisionError("a secret detail")

    async def run():
        async with asking(app) as http:
            await until_loaded(http)
            with monkeypatch.context() as broken:
                broken.setattr(app.state.service.collections.get("default").gallery, "submit", fail)
                answer = await http.post("/v1/identify", json=body, headers={"X-Request-ID": "job-1"})
            return answer, await http.post("/v1/identify", json=body), (await http.get("/metrics")).text

    answer, after, metrics = asyncio.run(run())
    assert answer.status_code == 500
    message = "the service failed; its log has more under this request id"
    assert answer.json() == {
        "error": {"code": "internal", "message": message, "details": {}},
        "request_id": "job-1",
    }
    assert answer.headers.get_list("x-request-id") == ["job-1"]
    assert after.json()["decision"] == "unknown"
    assert 'hypersphere_requests_total{method="POST",route="/v1/identify",status="500"} 1.0' in metrics


def test_while_the_gallery_loads_the_service_says_so(app, monkeypatch, vectors):
    """The load waits here until it is told to go on, and is half done meanwhile."""
    goes_on = threading.Event()
    gallery = app.state.service.collections.get("default").gallery
    load = gallery.load

    def waiting(**options):
        assert goes_on.wait(30)
        load(**options)

    monkeypatch.setattr(gallery, "load", waiting)
    body = {"embedding": vectors(1)[0].tolist()}

    async def run():
        async with asking(app) as http:
            early = [await http.get(path) for path in ("/healthz", "/readyz", "/metrics", "/v1/subjects")]
            early.append(await http.post("/v1/identify", json=body))
            goes_on.set()
            await until_loaded(http)
            return early, await http.post("/v1/identify", json=body)

    (alive, ready, metrics, _, early), late = asyncio.run(run())
    assert (alive.status_code, metrics.status_code) == (200, 200)
    for answer in (ready, early):
        assert answer.status_code == 503
        error = answer.json()["error"]
        assert (error["code"], error["details"]) == ("loading", {"progress": 0.0})
        assert answer.headers["retry-after"] == "1"
    assert late.status_code == 200


def test_stopping_while_the_gallery_loads_does_not_wait_for_it(app, monkeypatch):
    def endless(*, stopping, **_):
        while not stopping():
            time.sleep(0.001)
        raise Stopped

    monkeypatch.setattr(app.state.service.collections.get("default").gallery, "load", endless)

    async def run():
        async with asyncio.timeout(30), asking(app):
            pass

    asyncio.run(run())


def test_a_store_that_turns_out_damaged_is_told_to_whoever_started_the_app(embedder, tmp_path, monkeypatch):
    told = []
    settings = from_values({"embedder": embedder, "store": tmp_path / "gallery.db"})
    app = create_app(settings, on_fault=told.append)

    def damaged(**_):
        raise UserError("the store is damaged")

    monkeypatch.setattr(app.state.service.collections.get("default").gallery, "load", damaged)

    async def run():
        async with asyncio.timeout(30), asking(app):
            while not told:
                await asyncio.sleep(0.01)

    asyncio.run(run())
    assert [str(error) for error in told] == ["the store is damaged"]
