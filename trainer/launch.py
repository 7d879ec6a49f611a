"""Ray: the only door to Ray Train and Ray Jobs.

`launch` runs `train.run` on the workers that the config asks for, on a cluster that is already there or on one started
here. Rank 0 reports to a small actor; the process that launched reads it, shows progress and writes MLflow, so that the
workers wait for neither.
"""

import asyncio
import atexit
import math
import os
import shlex
import shutil
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer

from trainer.config import Config, ScalingConfig, from_tree
from trainer.distributed import Group
from trainer.errors import UserError
from trainer.lease import held, token_in
from trainer.locks import within
from trainer.storage import Folder
from trainer.train import Record, run

_POLL_S = 0.3
_ANSWER_S = 10
_SIGHT_S = 30  # until a network file system shows to one node what another wrote, or a killed run's ranks are gone
_WRITER = ".writer"  # in run.out: locked by the rank that writes checkpoints there, and seen by the others
_ENVIRONMENT = {  # the processes of a cluster started here inherit it
    "RAY_USAGE_STATS_ENABLED": "0",  # the report would wait for a network that may not be there
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what Ray's next release does by itself
    # glibc gives large blocks back to the system and faults them in again in every step, a third of a CPU step's time.
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
}


class TrainingFailed(RuntimeError):
    """A worker failed by no fault of the input; the message holds its traceback."""


class _Board:
    """Where rank 0 leaves its records and the launcher picks them up. An actor without a CPU of its own."""

    def __init__(self) -> None:
        self._records: list[Record] = []

    def put(self, record: Record) -> None:
        self._records.append(record)

    def take(self) -> list[Record]:
        records, self._records = self._records, []
        return records


def launch(config: Config, resume: bool, on_record: Callable[[Record], None]) -> None:
    """Train on Ray workers; returns when the run is done.

    Args:
        config: the resolved tree; its paths must mean the same on every node.
        resume: go on from the newest checkpoint in `config.run.out`.
        on_record: called in this process, from a second thread, with each record of rank 0.

    Raises:
        UserError: what a worker found wrong with the input, or resources that the cluster does not have.
        TrainingFailed: anything else went wrong in a worker.
    """
    scaling = config.scaling
    address = scaling.address or os.environ.get("RAY_ADDRESS")
    if not address:  # before Ray starts its processes: they are as many as the CPUs asked for
        _check_resources(scaling, {"CPU": math.inf, "GPU": torch.cuda.device_count()}, "this machine")
    _connect(scaling, address)
    try:
        _check_resources(scaling, ray.cluster_resources(), "the cluster")
        _train(config, resume, on_record)
    finally:
        ray.shutdown()


def _train(config: Config, resume: bool, on_record: Callable[[Record], None]) -> None:
    scaling, board = config.scaling, ray.remote(num_cpus=0)(_Board).remote()
    resources = {"CPU": scaling.cpus_per_worker} | ({"GPU": 1} if scaling.use_gpu else {})
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "resume": resume,
            "board": board,
            "token": uuid.uuid4().hex,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=scaling.workers, use_gpu=scaling.use_gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name="ray", storage_path=_rays_folder(config), failure_config=ray.train.FailureConfig(max_failures=0)
        ),
        torch_config=TorchConfig(backend="nccl" if scaling.use_gpu else "gloo", timeout_s=1800),
    )
    try:
        with _records(board, on_record) as errors:
            trainer.fit()
    except ray.train.TrainingFailedError as error:
        if errors:
            raise UserError(errors[0]) from error
        raise TrainingFailed(str(error)) from error


def _rays_folder(config: Config) -> str:
    """Where Ray keeps what it knows of the run. Nothing of it is needed to go on, so a run.out in a bucket, for which
    Ray would want credentials in a way of its own, gets one of this machine."""
    if isinstance(config.run.out, Path):
        return str(config.run.out)
    folder = tempfile.mkdtemp(prefix="hypersphere-ray-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _connect(scaling: ScalingConfig, address: str | None) -> None:
    """Join the cluster at the address; where there is none, start one on this machine."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    cpus = max(os.cpu_count() or 1, math.ceil(scaling.workers * scaling.cpus_per_worker))
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
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot reach the Ray cluster '{address or 'local'}': {str(error).splitlines()[0]}; start one with "
            "'ray start --head', or leave scaling.address and RAY_ADDRESS empty to train on this machine"
        ) from error


def _check_resources(scaling: ScalingConfig, there: Mapping[str, float], where: str) -> None:
    """Ray would wait for ever for workers that do not fit; what a machine or a fixed cluster has is known: say so."""
    wanted = {"CPU": scaling.workers * scaling.cpus_per_worker, "GPU": scaling.workers * float(scaling.use_gpu)}
    for resource, amount in wanted.items():
        if amount > there.get(resource, 0.0):
            raise UserError(
                f"{scaling.workers} workers want {amount:g} {resource}s, {where} has {there.get(resource, 0):g}; lower "
                f"scaling.workers{', set scaling.use_gpu=false' if resource == 'GPU' else ''}, or name a cluster that "
                "has them in scaling.address"
            )


def _worker(settings: dict[str, Any]) -> None:
    """Body of one Ray worker: the process group is up; run the one training loop."""
    board = settings["board"]
    config = from_tree(settings["config"])
    context = ray.train.get_context()

    def report(record: Record) -> None:
        if context.get_world_rank() == 0 or record.kind == "error":
            board.put.remote(record)

    try:
        with sole_writer(Folder.at(config.run.out), settings["token"], Group.current()):
            run(config, resume=settings["resume"], report=report, local_rank=context.get_local_rank())
    except UserError as error:
        ray.get(board.put.remote(Record(kind="error", text=str(error))))
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


@contextmanager
def _records(board: Any, on_record: Callable[[Record], None]) -> Iterator[list[str]]:
    """Take records off the board in a thread, and the rest at the end; yields what was wrong with the input."""
    errors: list[str] = []
    stopped = threading.Event()

    def drain() -> None:
        for record in ray.get(board.take.remote()):
            if record.kind == "error":
                errors.append(record.text)
            else:
                on_record(record)

    def work() -> None:
        while not stopped.wait(_POLL_S):
            drain()

    thread = threading.Thread(target=work, name="records", daemon=True)
    thread.start()
    try:
        yield errors
    finally:
        stopped.set()
        thread.join()
        with suppress(ray.exceptions.RayError):  # the board may be gone with the cluster, and is not what went wrong
            drain()


@dataclass(frozen=True)
class Job:
    """A training run on a cluster. Stopping this process leaves it running."""

    identity: str
    client: Any

    def follow(self, write: Callable[[str], object]) -> str:
        """Write its log as it grows; returns, when it has ended, Ray's name for how, such as SUCCEEDED."""

        async def log() -> None:
            async for part in self.client.tail_job_logs(self.identity):
                write(str(part))

        asyncio.run(log())
        while not (status := self.client.get_job_status(self.identity)).is_terminal():
            time.sleep(0.5)
        return str(status.value)


def submit(address: str, config: Config, command: str, resume: bool) -> Job:
    """Send a training run to a cluster through Ray Jobs.

    Args:
        address: of the cluster's dashboard, http://HEAD:8265.
        config: the resolved tree, sent along as a file.
        command: the program on the cluster that runs it, usually `hypersphere`.

    Raises:
        UserError: nothing answers at the address.
    """
    from ray.job_submission import JobSubmissionClient  # the workers, which import this file too, do without

    words = [command, "train", "--config", "config.yaml", *(["--resume"] if resume else [])]
    with tempfile.TemporaryDirectory() as folder:  # becomes the job's working directory on the cluster
        Path(folder, "config.yaml").write_text(config.to_yaml())
        try:
            client = JobSubmissionClient(address)
            identity = client.submit_job(
                entrypoint=shlex.join(words),
                runtime_env={"working_dir": folder},
                metadata={"project": "hypersphere", "experiment": config.tracking.experiment},
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(
                f"the Ray cluster at '{address}' did not take the job: {str(error).splitlines()[0]}; give its "
                "dashboard's address, such as http://HEAD:8265, and its token in RAY_AUTH_TOKEN if it wants one"
            ) from error
    return Job(str(identity), client)
