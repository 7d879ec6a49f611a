"""Processes of a run that are killed, stopped and told to end, at random moments.

The short form has one moment of each kind; FAULTS=long, or `make faults`, has ten.
"""

import random
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.trainer.faults.command import LONG, STEPS, Command
from trainer.run import RunNote

pytestmark = [
    pytest.mark.timeout(3600 if LONG else 1500),
    pytest.mark.filterwarnings("default"),  # MLflow's own
]
TIMES = 10 if LONG else 1
STALL_S = 40  # longer than a start is silent on a busy machine
EVERY = 3  # steps between checkpoints, so that many faults fall into the writing of one
COMMON = (
    f"run.max_steps={STEPS}",
    "schedule.kind=constant",
    f"run.checkpoint_every={EVERY}",
    f"scaling.stall_s={STALL_S}",
    f"scaling.max_failures={3 + TIMES}",  # with another config, steps done again are news to MLflow
)
Start = Callable[..., Command]


@pytest.fixture
def start(data: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts commands on one folder."""
    started: list[Command] = []

    def one(*words: str) -> Command:
        tracking = ("tracking.enabled=true", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db")
        started.append(Command(data, tmp_path / "run", *COMMON, *tracking, *words))
        return started[-1]

    yield one
    for command in started:
        command.stop()


def same(command: Command, undisturbed: dict[int, float], upto: int) -> None:
    """Every step was recorded, and every time with the loss of the run that nothing disturbed; in MLflow once."""
    assert {step for step, _ in command.losses} == set(range(1, upto + 1))
    assert [loss for _, loss in command.losses] == [undisturbed[step] for step, _ in command.losses]
    note = RunNote.read(command.out)
    there = MlflowClient(note.tracking_uri).get_metric_history(note.mlflow_run_id, "loss")
    assert {one.step: one.value for one in there} == {step: undisturbed[step] for step in range(1, upto + 1)}
    assert len(there) == upto
    half = [path.name for path in (command.out / "checkpoints").rglob("*partial*")]
    assert not half


def test_faults_of_processes(start: Start, undisturbed: dict[int, float]) -> None:
    """One run: a worker is killed, a worker is stopped, the command is killed, told to end, and ends."""
    moment = random.Random(seed := time.time_ns())
    print(f"seed {seed}")
    command = start()
    command.until_step(EVERY)
    recovered = []
    for number in range(TIMES):
        for kind in (signal.SIGKILL, signal.SIGSTOP):
            time.sleep(moment.uniform(0, 0.4))
            victim = moment.choice(command.workers())
            at, seconds = command.step, command.until_mended(partial(victim.send_signal, kind))
            recovered.append((kind.name, number, at, seconds))
    for kind, number, at, seconds in recovered:
        print(f"{kind} {number} at step {at}: the next step was recorded after {seconds:.1f} s")
    assert command.printed.count("has died") >= 2 * TIMES
    assert command.printed.count(f"gave no sign of life for {STALL_S} s") >= TIMES
    for _ in range(TIMES):
        time.sleep(moment.uniform(0, 0.4))
        command.process.kill()
        command.ends(-signal.SIGKILL)
        command = start("--resume")
        command.until_step(1)
    time.sleep(moment.uniform(0, 0.4))
    command.process.send_signal(signal.SIGTERM)
    command.ends(75)
    assert "not finished: stopped at step" in command.printed
    reached = int(command.printed.rpartition("stopped at step ")[2].split()[0])
    assert (command.out / "checkpoints" / f"step-{reached:08d}" / "checkpoint.json").exists()
    command = start("--resume")
    command.ends(0)
    assert f"going on from step {reached}" in command.printed
    same(command, undisturbed, STEPS)
