"""The real server in a memory limit, watched while it is attacked, with people enrolled who must outlast it."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.serving.conftest import Server, photo, unit_vectors
from tests.serving.hostile.probe import Cost
from tests.serving.hostile.wire import Address, Attack, address, speak, statuses

LONG = os.environ.get("HOSTILE") == "long"  # everything, with strict limits; otherwise what takes a minute
HEALTH_MS = 100 if LONG else 2000  # loose where other tests run beside: what blocks the service takes seconds
ATTEMPTS = 3  # where only the clock is at odds: what the attack does, it does every time; the machine does not
ROOT = Path(__file__).resolve().parents[3]
REQUEST_CPU_S, REQUEST_MB = 2.0, 200
PROBING = 0.1  # of a second: CPU time that the probes of /healthz may cost the server
SPARE_MIB = 1536  # what the server may grow to beyond its start before the kernel refuses it memory
LOG_LINES = 200
REFUSAL_BYTES = 16_384
ROWS = unit_vectors(4000, seed=7, dimension=512)
ENROL = "POST"
THRESHOLDS = {"verify_threshold": 0.6, "identify_threshold": 0.7}  # the Embedder has no calibration


class Late(AssertionError):
    """/healthz was late, and nothing else was wrong."""


@dataclass
class Outcome:
    """What an attack saw; `faults` are its own findings."""

    answers: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    requests: int = 1  # that cost something
    memory_mb: float = REQUEST_MB
    cost: Cost = field(default_factory=Cost)


class Site:
    """A server under attack."""

    def __init__(self, server: Server, key: str | None = None) -> None:
        self.server = server
        self.address: Address = address(server.url)
        self.table: list[tuple[str, Outcome]] = []
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.enrolled: list[str] = []
        for number in range(4):  # warm, with its children started, before anything is measured
            self._good_work(number)
        _bound_memory(server.process.pid)
        command = [sys.executable, "-m", "tests.serving.hostile.probe", server.url, str(server.process.pid)]
        self._probe = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    @property
    def lives(self) -> bool:
        return self.server.process.poll() is None

    def attack(self, title: str, attacks: Mapping[str, Attack]) -> None:
        """Send requests one after another; look at the answers, the cost of all, and what is left of the service."""
        requests = {name: [attack.request()] for name, attack in attacks.items()}
        for attempt in range(ATTEMPTS):
            try:
                with self.attacked(title) as outcome:
                    for name, pieces in requests.items():
                        heard = speak(self.address, pieces, attacks[name].hang_up)
                        outcome.answers += statuses(heard)
                        outcome.faults += _bad_answer(name, attacks[name], heard)
                return
            except Late:
                if attempt == ATTEMPTS - 1:
                    raise
                self.table.pop()

    @contextmanager
    def attacked(self, name: str) -> Iterator[Outcome]:
        """Measures what happens inside, then asserts that it stayed in the limits and that the service is whole."""
        lines, outcome = len(self.server.output), Outcome()
        self._ask("begin")
        yield outcome
        try:
            outcome.cost = self._ask("end")
        finally:
            self.table.append((name, outcome))
        outcome.faults += self._too_dear(outcome)
        outcome.faults += self._damage(lines)
        cost = outcome.cost
        if cost.worst_ms > HEALTH_MS:
            late = f"/healthz took {cost.worst_ms:.0f} ms, and up to {cost.noise_ms:.0f} ms for want of a processor"
            outcome.faults.append(late)
            if len(outcome.faults) == 1:
                raise Late(f"{name}: {late}")
        assert not outcome.faults, f"{name}: " + "; ".join(outcome.faults)

    def close(self) -> list[str]:
        """SIGTERM; what is wrong with the end, or with what the store holds afterwards, is told."""
        self._probe.kill()
        self._probe.wait()
        for pipe in (self._probe.stdin, self._probe.stdout):
            if pipe is not None:
                pipe.close()
        if not self.lives:
            self.server.kill()
            return [f"the server had died: {''.join(self.server.output[-5:])}"]
        code = self.server.end()
        return [] if code == 0 else [f"it ended with {code}"]

    def lost(self, server: Server) -> set[str]:
        """Enrolments that were acknowledged and are not in `server`, which opened the store anew."""
        return set(self.enrolled) - listed(server, self._headers)

    def _ask(self, word: str) -> Cost:
        assert self._probe.stdin is not None
        assert self._probe.stdout is not None
        try:
            self._probe.stdin.write(f"{word}\n")
            line = self._probe.stdout.readline()
        except BrokenPipeError:
            line = ""  # the probe ends with the server
        assert line, f"the server died with {self.server.process.wait(60)}: {''.join(self.server.output[-5:])[-1000:]}"
        return Cost(**json.loads(line))

    def _too_dear(self, outcome: Outcome) -> Iterator[str]:
        cost = outcome.cost
        if cost.cpu_s > outcome.requests * REQUEST_CPU_S + PROBING:
            yield f"{cost.cpu_s:.2f} s of CPU"
        if cost.growth_mb > outcome.memory_mb:
            yield f"{cost.growth_mb:.0f} MB"

    def _damage(self, lines: int) -> Iterator[str]:
        """What is not as it should be after an attack."""
        if not self.lives:
            yield f"the server died: {''.join(self.server.output[-5:])}"
            return
        new = self.server.output[lines:]
        if len(new) > LOG_LINES or max(map(len, new), default=0) > 2000:
            yield f"the log grew by {len(new)} lines, such as {new[len(new) // 2][:200]!r}"
        if any("Traceback" in line for line in new):
            yield f"a traceback in the log: {''.join(new)[-600:]}"
        yield from self._good_work(len(self.enrolled))

    def _good_work(self, number: int) -> list[str]:
        """Somebody enrols and is found, by picture and by vector; nobody enrolled before is missing."""
        subject_id, faults = f"good-{number}", []
        with self.server.client() as client:
            client.headers.update(self._headers)
            vector = {"embeddings": [ROWS[number].tolist()]}
            answer = client.request(ENROL, f"/v1/subjects/{subject_id}/samples", json=vector)
            if answer.status_code != 201:
                return [f"a good enrolment was answered {answer.status_code}: {answer.text[:200]}"]
            self.enrolled.append(subject_id)
            found = client.post("/v1/identify", json={"embedding": ROWS[number].tolist()})
            if found.status_code != 200 or found.json()["candidates"][0]["subject_id"] != subject_id:
                faults.append(f"a good search was answered {found.status_code}: {found.text[:200]}")
            picture = client.post("/v1/identify", files={"image": ("a.png", photo(number), "image/png")})
            if picture.status_code != 200:
                faults.append(f"a good picture was answered {picture.status_code}: {picture.text[:200]}")
        missing = set(self.enrolled) - listed(self.server, self._headers)
        return [*faults, *([f"lost: {sorted(missing)[:5]}"] if missing else [])]


def listed(server: Server, headers: dict[str, str] | None = None) -> set[str]:
    """All enrolled subjects, page by page."""
    found: set[str] = set()
    with server.client() as client:
        cursor: dict[str, str] = {}
        while True:
            page = client.get("/v1/subjects", params={"limit": "1000", **cursor}, headers=headers).json()
            found |= {subject["subject_id"] for subject in page["subjects"]}
            if page["next_cursor"] is None:
                return found
            cursor = {"cursor": page["next_cursor"]}


def _bad_answer(name: str, attack: Attack, heard: bytes) -> Iterator[str]:
    found = statuses(heard)
    if not set(found) <= attack.allowed:
        yield f"'{name}' was answered {found}, allowed {sorted(attack.allowed)}: {heard[:300]!r}"
    if found[0] >= 400 and len(heard) > REFUSAL_BYTES:
        yield f"'{name}' was refused in {len(heard)} bytes"
    if b"Traceback" in heard:
        yield f"'{name}' was answered with a traceback"


def _bound_memory(pid: int) -> None:
    """Let a server that takes too much fail by itself, before it hurts the machine."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    data = next(int(line.split()[1]) for line in status if line.startswith("VmData")) * 1024
    resource.prlimit(pid, resource.RLIMIT_DATA, (data + SPARE_MIB * 2**20,) * 2)
