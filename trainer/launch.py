"""Ray: the only door to Ray Train.

`launch` runs `train.run` on the workers that the config asks for, on a cluster that is already there or on one started
here. Rank 0 reports to a small actor; the process that launched reads it, shows progress and writes MLflow, so that the
workers wait for neither. What is done about faults is in `supervision`.
"""

import atexit
import math
import os
import shutil
import signal
import socket
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch

from trainer import memory
from trainer.board import Board
from trainer.config import Config, from_tree
from trainer.distributed import Group
from trainer.errors import UserError
from trainer.lease import held, token_in
from trainer.locks import within
from trainer.plan import rehearse
from trainer.pulse import Wishes
from trainer.rendezvous import Ranks
from trainer.scaling import ScalingConfig
from trainer.storage import Folder
from trainer.supervision import Trainer, heartbeat
from trainer.train import Record, run

_POLL_S = 0.3
_SILENT_S = 15  # workers speak every second
_ANSWER_S = 10
_SIGHT_S = 30  # until a network file system shows to one node what another wrote, or a killed run's ranks are gone
_WRITER = ".writer"  # in run.out: locked by the rank that writes checkpoints there, and seen by the others
_ENVIRONMENT = {  # the processes of a cluster started here inherit it
    "RAY_USAGE_STATS_ENABLED": "0",  # the report would wait for a network that may not be there
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a dead worker is noticed so soon
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    # Ray knows after 15 s or so that a node is gone; a group that counted on it is given up then, not after a minute.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "RAY_worker_niceness": "0",  # 15 by default: any other program, Ray's own too, would go before a rank
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what Ray's next release does by itself
    # glibc gives large blocks back to the system and faults them in again in every step, a third of a CPU step's time.
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
}


class TrainingFailed(RuntimeError):
    """A worker failed by no fault of the input; the message holds its traceback."""


class Interrupted(RuntimeError):
    """The run has ended before its last step, and can go on from its newest checkpoint."""


def launch(
    config: Config, resume: bool, on_record: Callable[[Record], None], stop: threading.Event, *, dry: bool = False
) -> None:
    """Train on Ray workers; returns when the run is done. After a fault they go on from the newest checkpoint.

    Args:
        config: the resolved tree; its paths must mean the same on every node.
        resume: go on from the newest checkpoint in `config.run.out`.
        on_record: called with each record of rank 0.
        stop: once it is set, the workers write a checkpoint and end.
        dry: only rehearse one step; nothing is left in `config.run.out`.

    Raises:
        UserError: what a worker found wrong with the input, or resources that the cluster does not have.
        Interrupted: after `stop`, or because the cluster has had no room for the workers for `scaling.wait_s`.
        TrainingFailed: anything else went wrong in a worker, more often than `scaling.max_failures`.
    """
    scaling = config.scaling
    address = scaling.address or os.environ.get("RAY_ADDRESS")
    if not address:  # before Ray starts its processes: they are as many as the CPUs asked for
        _check_resources(scaling, {"CPU": math.inf, "GPU": torch.cuda.device_count()}, "this machine")
    _connect(scaling, address)
    try:
        _check_resources(scaling, ray.cluster_resources(), "the cluster")
        _train(config, resume, on_record, stop, dry)
    finally:
        ray.shutdown()


def _train(config: Config, resume: bool, on_record: Callable[[Record], None], stop: threading.Event, dry: bool) -> None:
    here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
    board = ray.remote(num_cpus=0, label_selector=here)(Board).remote(config.scaling.stall_s)
    training, records = _Thread(_trainer(config, resume, board, dry).fit), _Records(board, on_record)
    while training.is_alive():
        training.join(_POLL_S)
        silent_s = records.take()
        if stop.is_set():
            board.stop.remote()
            if not records.started or silent_s > _SILENT_S:
                raise Interrupted("stopped while no workers ran; --resume goes on from the newest checkpoint, if any")
        if silent_s > config.scaling.wait_s and training.is_alive():
            raise Interrupted(
                f"the cluster has had no room for {config.scaling.least} workers for {silent_s:.0f} s (scaling.wait_s "
                f"is {config.scaling.wait_s:g}); when it has, --resume goes on from the newest checkpoint"
            )
    records.take()
    if records.errors:
        raise UserError(records.errors[0]) from training.error
    if isinstance(training.error, ray.train.TrainingFailedError):
        more = f"\n{memory.advice(config)}" if "low on memory" in str(training.error) else ""
        raise TrainingFailed(f"{training.error}{more}") from training.error
    if training.error is not None:
        raise training.error
    if records.stopped is not None:
        raise Interrupted(f"stopped at step {records.stopped} with a checkpoint, from which --resume goes on")


def _trainer(config: Config, resume: bool, board: Any, dry: bool) -> Trainer:
    scaling = config.scaling
    return Trainer(
        _worker,
        board=board,
        sizes=config.world_sizes(),
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "resume": resume,
            "board": board,
            "token": uuid.uuid4().hex,
            "dry": dry,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=scaling.workers,
            use_gpu=scaling.use_gpu,
            resources_per_worker={"CPU": scaling.cpus_per_worker} | ({"GPU": 1} if scaling.use_gpu else {}),
            elastic_resize_monitor_interval_s=scaling.grow_s,
        ),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=_rays_folder(config, dry),
            failure_config=ray.train.FailureConfig(max_failures=0 if dry else scaling.max_failures),
        ),
        backend_config=Ranks("nccl" if scaling.use_gpu else "gloo", timeout_s=1800),
    )


def _rays_folder(config: Config, dry: bool) -> str:
    """Where Ray keeps what it knows of the run. Nothing of it is needed to go on, so a rehearsal, and a run.out in a
    bucket, for which Ray would want credentials in a way of its own, get one of this machine."""
    if isinstance(config.run.out, Path) and not dry:
        return str(config.run.out)
    folder = tempfile.mkdtemp(prefix="hypersphere-ray-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _connect(scaling: ScalingConfig, address: str | None) -> None:
    """Join the cluster at the address; where there is none, start one on this machine."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    cpus = max(os.cpu_count() or 1, math.ceil(scaling.most * scaling.cpus_per_worker))
    # Without "local" Ray would join whatever cluster this machine started last, and refuse num_cpus there.
    own = {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    where: dict[str, Any] = {"address": address} if address else own
    try:
        host, _, port = (address or "").removeprefix("ray://").rpartition(":")
        if host and port.isdecimal():  # Ray itself would try for minutes; "auto" and the like are left to it
            socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
        on_sigterm = signal.getsignal(signal.SIGTERM)
        ray.init(**where, log_to_driver=False, logging_level="ERROR")
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray has put one of its own there
    except Exception as error:  # Ray raises this very class where its processes start too slowly
        raise UserError(
            f"cannot reach the Ray cluster '{address or 'local'}': {str(error).partition(chr(10))[0]}; start one with "
            "'ray start --head', or leave scaling.address and RAY_ADDRESS empty to train on this machine"
        ) from error


def _check_resources(scaling: ScalingConfig, there: Mapping[str, float], where: str) -> None:
    """Ray would wait for ever for workers that do not fit; what a machine or a fixed cluster has is known: say so."""
    wanted = {"CPU": scaling.least * scaling.cpus_per_worker, "GPU": scaling.least * float(scaling.use_gpu)}
    for resource, amount in wanted.items():
        if amount > there.get(resource, 0.0):
            raise UserError(
                f"{scaling.least} workers want {amount:g} {resource}s, {where} has {there.get(resource, 0):g}; lower "
                f"scaling.workers{', set scaling.use_gpu=false' if resource == 'GPU' else ''}, or name a cluster that "
                "has them in scaling.address"
            )


def _worker(settings: dict[str, Any]) -> None:
    """Body of one Ray worker: the process group is up; run the one training loop."""
    board = settings["board"]
    config = from_tree(settings["config"])
    context = ray.train.get_context()

    def report(record: Record) -> None:
        if context.get_world_rank() == 0:
            # Sent again where the node was cut off for a while; MLflow's sender drops what comes twice.
            board.put.options(max_task_retries=-1).remote(asdict(record))

    def untold() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = ray.get(board.untold.options(max_task_retries=-1).remote())
        return found

    wishes, local_rank = Wishes(), context.get_local_rank()
    try:
        with heartbeat(board, wishes) as again:
            if settings["dry"]:
                rehearse(config, report, local_rank)
                return
            with sole_writer(Folder.at(config.run.out), settings["token"], Group.current()):
                resume = again or settings["resume"]
                run(config, resume=resume, report=report, local_rank=local_rank, wishes=wishes, untold=untold)
    except UserError as error:
        ray.get(board.put.remote(asdict(Record(kind="error", text=str(error)))))
        raise


@contextmanager
def sole_writer(folder: Folder, token: str, group: Group, patience_s: float = _SIGHT_S) -> Iterator[None]:
    """Hold a run's folder for the ranks of `group` while the block runs. A collective: two barriers.

    Rank 0 holds a file there and writes the token into it; the others look for it.

    Args:
        token: the same on every rank, and no other group's.
        patience_s: how long the file may stay locked by another group, or unseen.

    Raises:
        UserError: the folder cannot be written, is not shared with this rank, or another run writes there.
    """
    with ExitStack() as stack:
        if group.rank == 0:
            stack.enter_context(held(folder, _WRITER, token, patience_s))
        group.barrier()
        if not within(patience_s, lambda: token_in(folder, _WRITER) == token):
            raise UserError(
                f"rank {group.rank} on {socket.gethostname()} does not see in run.out '{folder}' what rank 0 writes "
                "there; choose a folder that all nodes share, or train on one node"
            )
        group.barrier()
        yield


class _Thread(threading.Thread):
    """Runs Ray Train, so that the main thread is there for signals."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(name="ray-train", daemon=True)
        self._work = work
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except Exception as error:  # noqa: BLE001  it is raised in the main thread
            self.error = error


class _Records:
    """Takes records off the board.

    Attributes:
        errors: what was wrong with the input.
        started: whether the training has begun.
        stopped: the step at which the ranks have ended because they were to.
    """

    def __init__(self, board: Any, on_record: Callable[[Record], None]) -> None:
        self._board, self._on_record = board, on_record
        self.errors: list[str] = []
        self.started = False
        self.stopped: int | None = None

    def take(self) -> float:
        """Hand over what has come; for how many seconds no rank has been heard."""
        try:
            values, silent_s = ray.get(self._board.take.remote())
        except ray.exceptions.RayActorError as error:
            raise TrainingFailed("the process that watches the workers has died; go on with --resume") from error
        for record in (Record(**one) for one in values):
            if record.kind == "error":
                self.errors.append(record.text)
            elif record.kind == "stopped":
                self.stopped = record.step
            else:
                self.started = True  # the workers have something to tell
                self._on_record(record)
        return float(silent_s)
