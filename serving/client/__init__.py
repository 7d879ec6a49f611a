"""A client of the service, for programs: typed answers, and requests that are safe to repeat are repeated.

    with Client("http://127.0.0.1:8000", key="...") as gallery:
        gallery.enrol("alice", images=[Path("alice.png").read_bytes()])
        answer = gallery.identify(image=photo)
        if answer.decision == "match": ...

`AsyncClient` has the same methods, to be awaited. It needs httpx, pydantic and numpy alone (`pip install
'hypersphere[client]'`).

A change carries an Idempotency-Key of its own, so that it is done once however often it is sent. What is repeated:
requests that got no answer, and those that were answered 429, 502, 503 or 504, after the time that the service names or
else after longer and longer pauses of random length (Brooker, Exponential backoff and jitter, 2015).
"""

from serving.client.awaiting import AsyncClient
from serving.client.blocking import Client
from serving.client.requests import ServiceError

__all__ = ["AsyncClient", "Client", "ServiceError"]
