"""How Ray's workers become torch's ranks: a backend of Ray Train.

Ray's own would do, but for its controller, a process between the command and the workers, which imports torch for it:
the workers wait for that. And it leaves gloo to look up the host's name, which is the loopback's on many a machine.
"""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import ray
import ray.train
from ray.train.backend import Backend, BackendConfig

_FAREWELL_S = 30


@dataclass
class Ranks(BackendConfig):  # type: ignore[misc]  # Ray has no types
    """A process group of all workers.

    Args:
        library: what sends, by torch's name: gloo or nccl.
        timeout_s: how long a collective may take.
    """

    library: str
    timeout_s: float

    @property
    def backend_cls(self) -> type[Backend]:
        """What Ray's controller calls when the workers are there, and before it ends them."""
        return _Rendezvous


class _Rendezvous(Backend):  # type: ignore[misc]
    share_cuda_visible_devices = True  # NCCL copies directly between the GPUs of a node that a process sees

    def on_start(self, worker_group: Any, backend_config: Ranks) -> None:
        meeting = worker_group.execute_single(0, _free_address)
        worker_group.execute(_join, meeting, backend_config)

    def on_shutdown(self, worker_group: Any, backend_config: Ranks) -> None:
        ray.wait(leaving := worker_group.execute_async(_leave), num_returns=len(leaving), timeout=_FAREWELL_S)


def _free_address() -> str:
    host = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        port = probe.getsockname()[1]
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _join(meeting: str, ranks: Ranks) -> None:
    """Runs on each worker: make it a rank."""
    import torch.distributed as dist

    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    # As torchrun sets them; DeepSpeed reads them.
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(context.get_local_rank())}
    if (name := _interface(ray.util.get_node_ip_address())) is not None:
        os.environ.setdefault(f"{ranks.library.upper()}_SOCKET_IFNAME", name)
    dist.init_process_group(
        ranks.library, init_method=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=ranks.timeout_s)
    )


def _interface(address: str) -> str | None:
    """The network interface with the address by which Ray knows this node, if any."""
    there = psutil.net_if_addrs().items()
    return next((name for name, own in there if any(one.address == address for one in own)), None)


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
