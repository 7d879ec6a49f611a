"""SIGTERM with a drain: /readyz says no at once, requests go on to be answered, and then the service ends."""

import signal
import time
from collections.abc import Callable

import httpx
import pytest

from serving.settings import from_values
from tests.serving.conftest import Server
from trainer.errors import UserError


def unready(server: Server) -> httpx.Response:
    end = time.monotonic() + 30
    while (answer := server.http.get("/readyz")).status_code == 200:
        assert time.monotonic() < end
        time.sleep(0.02)
    return answer


def test_a_drain_sends_new_clients_away_before_connections_end(serve: Callable[..., Server]) -> None:
    server = serve(drain_seconds=3, shutdown_s=30)
    server.process.send_signal(signal.SIGTERM)
    answer = unready(server)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "stopping")
    with server.client() as other:  # a new connection, too
        assert other.get("/v1/subjects").status_code == 200
        assert other.get("/healthz").status_code == 200
    assert server.process.wait(timeout=60) == 0
    server.end()
    assert "/readyz says 503 from now on" in "".join(server.output)


def test_a_second_signal_ends_the_drain(serve: Callable[..., Server]) -> None:
    server = serve(drain_seconds=600, shutdown_s=900)
    server.process.send_signal(signal.SIGTERM)
    unready(server)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=60) == 0
    server.end()


def test_a_drain_must_leave_time_to_finish() -> None:
    with pytest.raises(UserError, match="a drain of 28 s leaves less than 3 of shutdown_s=30"):
        from_values({"embedder": "e", "store": "s", "drain_seconds": 28})
