"""Watches a server: how late /healthz answers, and what CPU time and memory the server's processes take.

    python -m tests.serving.hostile.probe URL PID

A line `begin` on standard input forgets what was seen; `end` waits until the server has come to rest and prints the
costs since `begin` as one line of JSON. This runs in a process of its own: threads of the attack would delay it.
"""

import http.client
import json
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

PROBE_EVERY_S, SAMPLE_EVERY_S, FAMILY_EVERY_S = 0.02, 0.02, 0.1
REST_S, REST_CPU_S = 0.06, 0.02  # at rest: in this time no more than the probes themselves cost, and a clock tick
PATIENCE_S = 60


@dataclass
class Cost:
    """What the server took, its children included, and how it looked from outside."""

    cpu_s: float = 0
    growth_mb: float = 0  # of the resident memory of all, each at its peak, over where it began
    worst_ms: float = 0  # of /healthz, on a connection of its own, without what follows
    noise_ms: float = 0  # the most that a probe waited for a processor: what a busy machine adds
    probes: int = 0


class Health:
    """Asks /healthz all the time. A failure counts until the next success.

    The time in which the server's event loop, or the probe, could have run and had no processor is kept apart: on a
    machine with other work it would tell of that work.
    """

    def __init__(self, address: str, pid: int) -> None:
        self._address, self._pid = address, pid
        self.latencies: list[float] = []
        self.waits: list[float] = []
        threading.Thread(target=self._ask, daemon=True).start()

    def _ask(self) -> None:
        connection = http.client.HTTPConnection(self._address, timeout=PATIENCE_S)
        while True:
            time.sleep(PROBE_EVERY_S)
            start, waited = time.perf_counter(), self._waited()
            while not self._answered(connection):
                connection.close()
                time.sleep(0.001)
            waited = self._waited() - waited
            self.latencies.append(time.perf_counter() - start - waited)
            self.waits.append(waited)

    def _waited(self) -> float:
        """Seconds without a processor until now: the server's main thread and this one."""
        return _run_delay(f"/proc/{self._pid}") + _run_delay(f"/proc/self/task/{threading.get_native_id()}")

    def _answered(self, connection: http.client.HTTPConnection) -> bool:
        try:
            connection.request("GET", "/healthz")
            answer = connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException):
            return False
        return answer.status == 200


class Family:
    """A process and its descendants."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._lock = threading.Lock()
        self.begin()
        threading.Thread(target=self._sample, daemon=True).start()

    @property
    def lives(self) -> bool:
        return self._root.is_running() and self._root.status() != psutil.STATUS_ZOMBIE

    def begin(self) -> None:
        """Forget the peaks of memory, in the kernel's books too."""
        with self._lock:
            self._find()
            for pid in self._pids:
                try:
                    Path(f"/proc/{pid}/clear_refs").write_text("5")
                except (ProcessLookupError, FileNotFoundError):
                    continue  # it ended meanwhile
            self._base = {pid: _status(pid, "VmRSS") for pid in self._pids}
            self._growth = 0
        self._cpu = self.cpu()

    def cpu(self) -> float:
        """Seconds of all, those of children that have ended included."""
        total = 0.0
        for process in (self._root, *self._root.children(recursive=True)):
            try:
                total += sum(process.cpu_times()[:4])
            except psutil.NoSuchProcess:
                continue  # its time is with its parent now
        return total

    def cost(self) -> tuple[float, float]:
        """CPU seconds and MB of growth since `begin`."""
        with self._lock:
            self._measure()
            return self.cpu() - self._cpu, self._growth * 1024 / 1e6

    def _find(self) -> None:
        self._parents = {child.pid: child.ppid() for child in self._root.children(recursive=True)}
        self._pids = [self._root.pid, *self._parents]

    def _sample(self) -> None:
        looked = time.monotonic()
        while self.lives:
            with self._lock:
                if time.monotonic() - looked > FAMILY_EVERY_S:
                    self._find()
                    looked = time.monotonic()
                self._measure()
            time.sleep(SAMPLE_EVERY_S)

    def _measure(self) -> None:
        growth = 0
        for pid in self._pids:
            peak = _status(pid, "VmHWM")  # 0 once it has ended
            # A process that was forked meanwhile shares its parent's pages.
            base = self._base.setdefault(pid, min(peak, _status(self._parents.get(pid, pid), "VmRSS")))
            growth += max(0, peak - base)
        self._growth = max(self._growth, growth)


def _run_delay(task: str) -> float:
    """Seconds that a thread was ready to run and had to wait; 0 where the kernel does not count."""
    try:
        return int(Path(f"{task}/schedstat").read_text().split()[1]) / 1e9
    except (FileNotFoundError, ProcessLookupError):
        return 0.0


def _status(pid: int, name: str) -> int:
    """A line of the kernel's account of a process, in KiB; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), 0)


def _rest(family: Family) -> None:
    """Wait until the server does nothing any more: what an attack leaves behind counts as its cost."""
    end = time.monotonic() + PATIENCE_S
    while family.lives and time.monotonic() < end:
        before = family.cpu()
        time.sleep(REST_S)
        if family.cpu() - before <= REST_CPU_S:
            return


def main(url: str, pid: int) -> None:
    health, family = Health(url.removeprefix("http://"), pid), Family(pid)
    for word in sys.stdin:
        if word.strip() == "begin":
            family.begin()
            health.latencies.clear()
            health.waits.clear()
            print("{}", flush=True)
            continue
        answered = len(health.latencies)
        _rest(family)
        end = time.monotonic() + PATIENCE_S
        while family.lives and len(health.latencies) < answered + 2 and time.monotonic() < end:
            time.sleep(PROBE_EVERY_S)  # the probe that is under way counts, too
        if not family.lives:
            sys.exit("the server died")
        cpu_s, growth = family.cost()
        worst, noise = max(health.latencies, default=PATIENCE_S), max(health.waits, default=0)
        cost = Cost(cpu_s, growth, worst * 1000, noise * 1000, len(health.latencies))
        print(json.dumps(asdict(cost)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
