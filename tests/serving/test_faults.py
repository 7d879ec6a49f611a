"""Faults of the program itself, in the app without a server around it."""

import asyncio

import httpx

from serving.api import create_app
from serving.settings import from_values


def _post(app, **request):
    async def send():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.post("/v1/identify", **request)

    return asyncio.run(send())


def test_a_fault_is_a_500_in_the_same_shape_without_a_traceback(embedder, tmp_path, monkeypatch, vectors):
    app = create_app(from_values({"embedder": embedder, "store": tmp_path / "gallery.db"}))
    service = app.state.service

    def fail(*_):
        raise ZeroDivisionError("a secret detail")

    monkeypatch.setattr(service.gallery, "identify", fail)
    body = {"embedding": vectors(1)[0].tolist()}
    answer = _post(app, json=body, headers={"X-Request-ID": "job-1"})
    assert answer.status_code == 500
    assert answer.json() == {
        "error": {
            "code": "internal",
            "message": "the service failed; its log has more under this request id",
            "details": {},
        },
        "request_id": "job-1",
    }
    assert answer.headers.get_list("x-request-id") == ["job-1"]
    monkeypatch.undo()
    assert _post(app, json=body).json()["decision"] == "unknown"
    text = service.metrics.text().decode()
    assert 'hypersphere_requests_total{method="POST",route="/v1/identify",status="500"} 1.0' in text
    service.close()
    closed = _post(app, json={"embedding": body["embedding"], "top_k": 1})
    assert closed.status_code == 200  # a search needs no disk
    app.state.pool.shutdown()
