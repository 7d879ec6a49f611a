"""`hypersphere train` as a process of its own, to be hurt: what it records, its workers, and what it leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[3]
LONG = os.environ.get("FAULTS") == "long"
STEPS = 4000 if LONG else 300  # a second or less between two faults
_MARK = "HYPERSPHERE_TEST"
# The command, which also writes each record as a line of JSON.
_PROGRAM = """
import dataclasses, json, sys
from serving import cli
from serving.cli import terminal

show = terminal.TrainingView.record
path = sys.argv[1]

def record(self, one):
    show(self, one)
    with open(path, "a") as file:
        file.write(json.dumps(dataclasses.asdict(one)) + "\\n")

terminal.TrainingView.record = record
sys.argv = ["hypersphere", *sys.argv[2:]]
cli.main()
"""
SETTINGS = (
    *("data.batch_size=12", "run.epochs=100000", "run.log_every=1", "run.eval_every=0", "backbone.name=convnet"),
    *("backbone.dimension=16", "backbone.width=4", "data.height=24", "data.width=24", "loss.scale=16"),
    *("optimizer.lr=0.05", "tracking.enabled=false"),
)


class Command:
    """A run of the command; several of them may go on with one folder, and then share the records.

    Args:
        out: run.out; what is printed and recorded lies beside it.
        environment: what it has beside this process' own.
    """

    def __init__(self, data: Path, out: Path, *words: str, environment: Mapping[str, str] | None = None) -> None:
        self.out, self._records = out, out.with_suffix(".jsonl")
        self._log, self._mark = out.with_suffix(".log"), uuid.uuid4().hex
        settings = (f"data.path={data}", f"run.out={out}", *SETTINGS)
        own = {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "RAY_worker_niceness": "0", _MARK: self._mark}
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(self._records), "train", *settings, *words],
                env=os.environ | own | (environment or {}), stdout=log, stderr=log,
            )  # fmt: skip

    @property
    def printed(self) -> str:
        return self._log.read_text()

    @property
    def losses(self) -> list[tuple[int, float]]:
        """Of the steps as they were recorded, by all runs of the folder."""
        text = self._records.read_text() if self._records.exists() else ""
        entries = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [(one["step"], one["values"]["loss"]) for one in entries if one["kind"] == "step"]

    @property
    def step(self) -> int:
        """The last one recorded."""
        return ([0] + [step for step, _ in self.losses])[-1]

    def workers(self) -> list[psutil.Process]:
        """The processes of its ranks, where Ray runs on this machine for it alone."""
        return [one for one in psutil.Process(self.process.pid).children(recursive=True) if _is_worker(one)]

    def left(self) -> list[str]:
        """The processes that it, or what it started, has started and that are still there."""
        found = []
        for one in psutil.process_iter():
            try:
                if one.environ().get(_MARK) == self._mark and one.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(one.cmdline()))
            except psutil.Error:
                continue
        return found

    def until(self, done: Callable[[], bool], patience_s: float = 480) -> None:
        """Wait; what was printed is in the error where it takes too long or the command ends."""
        until = time.monotonic() + patience_s
        while not done():
            if self.process.poll() is not None and not done():
                raise AssertionError(f"it ended with {self.process.returncode}:\n{self.printed}")
            assert time.monotonic() < until, f"nothing for {patience_s} s:\n{self.printed}"
            time.sleep(0.02)

    def until_step(self, step: int) -> None:
        """Wait until a step is recorded that is at least this one, after what is recorded now."""
        count = len(self.losses)
        self.until(lambda: any(number >= step for number, _ in self.losses[count:]))

    def until_mended(self, fault: Callable[[], None]) -> float:
        """Cause a fault, and wait until the run has gone on; the seconds from the one to the next step."""
        known, since = self.printed.count("going on from"), time.monotonic()
        fault()
        self.until(lambda: self.printed.count("going on from") > known)
        self.until_step(1)
        return time.monotonic() - since

    def ends(self, code: int, patience_s: float = 480) -> None:
        """Wait for the end, of it and of all that it started."""
        assert self.process.wait(patience_s) == code, self.printed
        until = time.monotonic() + 60
        while (left := self.left()) and time.monotonic() < until:
            time.sleep(0.2)
        assert not left, left

    def stop(self) -> None:
        """End it whatever it does, with all that it started."""
        for one in [*psutil.Process(self.process.pid).children(recursive=True)] if self.process.poll() is None else []:
            try:
                one.send_signal(signal.SIGKILL)
            except psutil.Error:
                continue
        self.process.kill()
        self.process.wait()


def _is_worker(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[:1] == ["ray::RayTrainWorker"] or "RayTrainWorker" in "".join(process.cmdline()[:1])
    except psutil.Error:
        return False
