"""Nodes of a Ray cluster that die, are taken away after a notice, and come back. They take minutes: `make faults`."""

import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.faults.command import LONG, STEPS, Command

pytestmark = [
    pytest.mark.skipif(not LONG, reason="nodes take minutes: make faults"),
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("default"),  # Ray's own
]
COMMON = ("schedule.kind=constant", "run.checkpoint_every=20", f"run.max_steps={100 * STEPS}")
_MEMORY = 100 * 2**20  # of a node's object store


class Nodes:
    """A head without CPUs, where the command runs, and nodes with one each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from ray.cluster_utils import Cluster

        monkeypatch.setenv("RAY_worker_niceness", "0")
        head = {"num_cpus": 0, "object_store_memory": _MEMORY, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.alive: list[Any] = []

    def add(self) -> None:
        self.alive.append(self.cluster.add_node(num_cpus=1, object_store_memory=_MEMORY))

    def kill(self, number: int) -> None:
        self.cluster.remove_node(self.alive.pop(number), allow_graceful=False)

    def announce(self, number: int, seconds: int) -> None:
        """Say that a node will be taken away, as a cloud's notice of preemption is passed on to Ray."""
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = int((time.time() + seconds) * 1000)
        client = GcsClient(address=self.cluster.address)
        assert client.drain_node(self.alive[number].node_id, reason, "taken away", deadline)[0]


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    nodes = Nodes(monkeypatch)
    yield nodes
    nodes.cluster.shutdown()


@pytest.fixture
def start(data: Path, tmp_path: Path, nodes: Nodes) -> Iterator[Callable[..., Command]]:
    started: list[Command] = []

    def one(*words: str) -> Command:
        address = {"RAY_ADDRESS": nodes.cluster.address}
        started.append(Command(data, tmp_path / "run", *COMMON, *words, environment=address))
        return started[-1]

    yield one
    for command in started:
        command.stop()


def check(command: Command, undisturbed: dict[int, float], rel: float = 0.0) -> None:
    recorded = [(step, loss) for step, loss in command.losses if step <= STEPS]
    assert {step for step, _ in recorded} == set(range(1, max(step for step, _ in recorded) + 1))
    expected = [undisturbed[step] for step, _ in recorded]
    assert [loss for _, loss in recorded] == pytest.approx(expected, rel=rel, abs=0)


def test_nodes_that_die(nodes: Nodes, start: Callable[..., Command], undisturbed: dict[int, float]) -> None:
    """There is always one more than is needed."""
    moment = random.Random(seed := time.time_ns())
    print(f"seed {seed}")
    for _ in range(3):
        nodes.add()
    command = start("scaling.max_failures=20")
    command.until_step(20)
    for _ in range(10):
        time.sleep(moment.uniform(0, 0.4))
        seconds = command.until_mended(lambda: nodes.kill(moment.randrange(2)))
        print(f"a node died: the next step was recorded after {seconds:.1f} s")
        nodes.add()
    command.process.send_signal(signal.SIGTERM)
    command.ends(75)
    check(command, undisturbed)


def test_a_run_shrinks_and_grows(nodes: Nodes, start: Callable[..., Command]) -> None:
    nodes.add()
    nodes.add()
    command = start("scaling.workers=[1, 2]", "scaling.grow_s=10")
    command.until_step(20)
    seconds = command.until_mended(lambda: nodes.kill(1))
    print(f"with one node less: the next step was recorded after {seconds:.1f} s")
    assert "scaling.workers is 1 now and was 2" in command.printed
    print(f"with it again: {command.until_mended(nodes.add):.1f} s")
    assert "scaling.workers is 2 now and was 1" in command.printed
    command.process.send_signal(signal.SIGTERM)
    command.ends(75)


def test_a_node_that_is_taken_away_after_a_notice(
    nodes: Nodes, start: Callable[..., Command], undisturbed: dict[int, float]
) -> None:
    nodes.add()
    nodes.add()
    command = start("run.checkpoint_every=1000000", "scaling.wait_s=60")
    command.until_step(20)
    nodes.announce(1, seconds=20)
    command.until(lambda: "will be taken away" in command.printed)
    time.sleep(20)
    nodes.add()
    command.until_mended(lambda: nodes.kill(1))
    assert "going on from step" in command.printed
    nodes.kill(0)
    nodes.kill(0)
    command.ends(75)  # no node comes
    assert "the cluster has had no room for 2 workers" in command.printed
    check(command, undisturbed)
