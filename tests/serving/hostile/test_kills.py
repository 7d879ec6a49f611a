"""kill -9 at any moment, again and again on one store: also while it starts and rebuilds, with clients all the time.

The short form of this is beside the other tests of durability; this one runs by HOSTILE=long alone.
"""

import contextlib
import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.serving.conftest import SERVE, Server, unit_vectors
from tests.serving.hostile.site import ENROL, LONG, THRESHOLDS, listed

KILLS, WRITERS = 45, 3
DURING_START = 3  # of each this many lives, one ends while the service loads, and one start before it is cut off
ROWS = unit_vectors(20_000, seed=11, dimension=512)


class _Client(threading.Thread):
    """Enrols, erases and searches over one kept-alive connection until the server is gone."""

    def __init__(self, server: Server, name: str, seed: int) -> None:
        super().__init__()
        self.present: dict[str, int] = {}  # acknowledged as enrolled, with the number of the row
        self.absent: set[str] = set()  # acknowledged as erased
        self.faults: list[str] = []
        self._server, self._name, self._rng = server, name, random.Random(seed)

    def run(self) -> None:
        with self._server.client() as http, contextlib.suppress(httpx.TransportError):
            while not self.faults:
                if self._rng.random() < 0.3:
                    self._enrol_many(http)
                else:
                    self._enrol(http)
                if self._rng.random() < 0.4:
                    self._erase(http)
                if self._rng.random() < 0.5:
                    self._search(http)

    def _enrol(self, http: httpx.Client) -> None:
        number = self._rng.randrange(len(ROWS))
        subject_id = f"{self._name}-{number}"
        if subject_id in self.present or subject_id in self.absent:
            return
        answer = http.request(ENROL, f"/v1/subjects/{subject_id}/samples", json={"embeddings": [ROWS[number].tolist()]})
        if self._settled(answer, 201):
            self.present[subject_id] = number

    def _enrol_many(self, http: httpx.Client) -> None:
        numbers = {f"{self._name}-{number}": number for number in self._rng.sample(range(len(ROWS)), 20)}
        numbers = {name: number for name, number in numbers.items() if name not in self.present.keys() | self.absent}
        head = json.dumps({"subject_ids": list(numbers)}).encode() + b"\n"
        content = head + ROWS[list(numbers.values())].astype("<f4").tobytes()
        answer = http.post("/v1/samples", content=content, headers={"content-type": "application/octet-stream"})
        if self._settled(answer, 200):
            self.present |= numbers

    def _erase(self, http: httpx.Client) -> None:
        if not self.present:
            return
        subject_id = self._rng.choice(list(self.present))
        del self.present[subject_id]  # from the request on it may be either
        if self._settled(http.delete(f"/v1/subjects/{subject_id}"), 204):
            self.absent.add(subject_id)

    def _search(self, http: httpx.Client) -> None:
        if not self.present:
            return
        subject_id, number = self._rng.choice(list(self.present.items()))
        answer = http.post("/v1/identify", json={"embedding": ROWS[number].tolist(), "top_k": 100})
        found = [candidate["subject_id"] for candidate in answer.json().get("candidates", [])]
        if self._settled(answer, 200) and subject_id not in found:
            self.faults.append(f"{subject_id} was enrolled and is not found")
        if self.absent & set(found):
            self.faults.append(f"erased, and found: {self.absent & set(found)}")

    def _settled(self, answer: httpx.Response, expected: int) -> bool:
        if answer.status_code == 503:  # it is loading
            time.sleep(0.01)
        elif answer.status_code != expected:
            self.faults.append(f"{answer.status_code}: {answer.text[:200]}")
        return answer.status_code == expected


def _live(server: Server, life: int, rng: random.Random) -> list[_Client]:
    """One life of the service: some clients, then a kill; every third life is cut off while it starts."""
    clients = [_Client(server, f"life{life}-{n}", rng.randrange(2**32)) for n in range(WRITERS)]
    for client in clients:
        client.start()
    time.sleep(rng.uniform(0, 0.05) if life % DURING_START == 0 else rng.uniform(0.2, 1.5))
    server.kill()
    for client in clients:
        client.join(60)
    return clients


def _stillborn(embedder: Path, store: Path, rng: random.Random) -> None:
    """A start that is cut off before the service listens, or just after."""
    values = json.dumps({"embedder": str(embedder), "store": str(store), **THRESHOLDS})
    process = subprocess.Popen([sys.executable, "-c", SERVE, values], stdout=subprocess.DEVNULL)
    time.sleep(rng.uniform(0.2, 1.2))
    process.kill()
    process.wait()


@pytest.mark.skipif(not LONG, reason="takes some minutes: make hostile")
@pytest.mark.timeout(1800)
def test_no_kill_loses_what_was_acknowledged(serve, embedder, tmp_path):
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    present: dict[str, int] = {}
    absent: set[str] = set()
    for life in range(KILLS):
        if life % DURING_START == 0:
            _stillborn(embedder, tmp_path / "gallery.db", rng)
        for client in _live(serve(**THRESHOLDS), life, rng):
            assert not client.faults, f"seed {seed}, life {life}: {client.faults}"
            present |= client.present
            absent |= client.absent
    server = serve(**THRESHOLDS)
    _until_ready(server)
    found = listed(server)
    assert not set(present) - found, f"seed {seed}: acknowledged enrolments were lost"
    assert not absent & found, f"seed {seed}: erased subjects came back"
    for subject_id, number in present.items():
        body = {"probe": ROWS[number].tolist(), "subject_id": subject_id}
        assert server.http.post("/v1/verify", json=body).json()["score"] == pytest.approx(1, abs=1e-5)
    print(f"{KILLS} kills, {len(present) + 2 * len(absent)} acknowledged writes, none lost, none back")


def _until_ready(server: Server) -> None:
    end = time.monotonic() + 60
    while server.http.get("/readyz").status_code != 200 and time.monotonic() < end:
        time.sleep(0.05)
