"""Ray Train's workers, watched over: told apart from a hang, started again after a fault, as many as there is room for.

Each rank tells the board every second what it does, and hears from it what is wished. Ray Train starts the group again
when a worker ends in an error; here is said after which errors. Its controller imports this file: no torch, therefore.
"""

import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import ray
import ray.train
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from trainer.errors import UserError
from trainer.pulse import PULSE, Wishes
from trainer.watchdog import Beat

_BEAT_S = 1.0
# Each starts a process, a second of a core. No Ray Data is read; and a placement group ends with the job that made it.
_IDLE = (DatasetsCallback, PlacementGroupCleanerCallback)
_LONGEST_PAUSE_S = 60.0  # before the workers are started again; 0.5 s after the first fault


@contextmanager
def heartbeat(board: Any, wishes: Wishes) -> Iterator[bool]:
    """In a worker: tell the board every second what this rank does, and note what is wished of it.

    Yields whether there was a group of workers before this one.

    The threads are not waited for: they may be in a call that returns when the group is ended.
    """
    context, ended = ray.train.get_context(), threading.Event()
    place = f"{socket.gethostname()}/{ray.util.get_node_ip_address()}"
    nobody = Beat(uuid.uuid4().hex, context.get_world_rank(), place, 0, False, "", 0)

    def beat() -> Beat:
        waits, doing = bool(PULSE.collective), str(PULSE)
        return replace(nobody, step=PULSE.step, waits=waits, doing=doing, moves=PULSE.moves)

    def work() -> None:
        while not ended.wait(_BEAT_S):
            with suppress(ray.exceptions.RayError):  # the launching process has ended, and this one will soon
                wishes.stop = ray.get(board.beat.remote(beat())) or wishes.stop

    def look_out() -> None:
        """Ask Ray Train whether a node will be taken away. All ranks get rank 0's answer, so all of them ask."""
        known: Any = None
        while not ended.wait(_BEAT_S):
            with suppress(ray.exceptions.RayError):
                info = ray.train.get_preemption_info()
                if info is not None and info.preempted_ranks != known:
                    known, wishes.save = info.preempted_ranks, True

    again = ray.get(board.join.remote(beat(), ray.get_runtime_context().current_actor))
    for target in (work, look_out):
        threading.Thread(target=target, name=target.__name__, daemon=True).start()
    try:
        yield again
    finally:
        ended.set()
        board.leave.remote(beat())


class Trainer(DataParallelTrainer):  # type: ignore[misc]  # Ray has no types
    """Ray Train's, with this project's rules for faults and for the number of workers.

    Args:
        board: a handle of the `Board`.
        sizes: the numbers of workers that an elastic group may have.
        given: as for Ray Train.
    """

    def __init__(self, worker: Any, *, board: Any, sizes: Sequence[int], **given: Any) -> None:
        super().__init__(worker, **given)
        self._board, self._sizes = board, sizes

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        given["failure_policy"] = _Faults(self.run_config.failure_config, self._board)
        kept = [callback for callback in given["callbacks"] if not isinstance(callback, _IDLE)]
        given["callbacks"] = [*kept, _Starts(self._board)]
        if self.scaling_config.elasticity_enabled:
            given["scaling_policy"] = _Sizes(self.scaling_config, self._sizes)
        return super()._initialize_and_run_controller(**given)


class _Faults(DefaultFailurePolicy):  # type: ignore[misc]
    """Ray Train's, but for two things: what is wrong with the input will be wrong again; and only faults count between
    which the run came no further. The more of these, the longer the pause."""

    def __init__(self, failure_config: Any, board: Any) -> None:
        super().__init__(failure_config)
        self._board, self._furthest = board, 0

    def make_decision(self, training_failed_error: Exception) -> Any:
        self._board.end.remote()
        failures: Mapping[int, Exception] = getattr(training_failed_error, "worker_failures", {})
        if any(isinstance(error, UserError) for error in failures.values()):
            return FailureDecision.RAISE
        if (furthest := ray.get(self._board.furthest.remote())) > self._furthest:
            self._furthest, self._worker_group_failures = furthest, 0
        decision = super().make_decision(training_failed_error)
        if decision is FailureDecision.RETRY:
            self._note(training_failed_error, failures)
            time.sleep(min(_LONGEST_PAUSE_S, 2.0 ** (self._worker_group_failures - 2)))
        return decision

    def _note(self, error: Exception, failures: Mapping[int, Exception]) -> None:
        died = {rank: one for rank, one in failures.items() if isinstance(one, WorkerHealthCheckFailedError)}
        # When some have died, what the others say of it is no news.
        words = [f"worker {rank} {_death(one)}" for rank, one in sorted(died.items())]
        words = words or [f"worker {rank}: {_first_line(one)}" for rank, one in sorted(failures.items())]
        count = f" (fault {self._worker_group_failures} of {self.failure_config.max_failures})" if failures else ""
        why = "; ".join(words[:4]) or _first_line(getattr(error, "controller_failure", error)).rstrip(".")
        text = f"{why}{count}: the workers are started again"
        self._board.put.remote({"kind": "note", "text": text})


class _Starts(ControllerCallback):  # type: ignore[misc]
    """Tells the board that a group of workers is started."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def on_controller_start_worker_group(self, **given: Any) -> None:
        ray.get(self._board.begin.remote())


class _Sizes(ElasticScalingPolicy):  # type: ignore[misc]
    """Ray Train's, for numbers of workers that share a batch evenly, on nodes that are there: what it goes by may be
    twenty seconds old."""

    def __init__(self, scaling_config: Any, sizes: Sequence[int]) -> None:
        super().__init__(scaling_config)
        self._sizes = sizes

    def _count_possible_workers(self, reserved_resources: Mapping[str, Any]) -> int:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        there = {node: resources for node, resources in reserved_resources.items() if node in alive}
        possible = super()._count_possible_workers(there)
        return max((size for size in self._sizes if size <= possible), default=0)


def _death(error: WorkerHealthCheckFailedError) -> str:
    low = "low on memory" in str(error.health_check_failure)
    return "was ended since its node ran low on memory" if low else "has died"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
