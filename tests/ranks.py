"""Runs functions on several gloo ranks, each a process of its own that stays for the next call.

Starting a rank means importing torch and DeepSpeed, seconds of a core; most of these tests compute for a tenth of that.
"""

import os
import pickle
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

_ranks: list["_Ranks"] = []  # those of the last call, at most one set


def run_on_ranks(size: int, work: Callable[..., None], *arguments: Any) -> None:
    """`work(rank, *arguments)` on each rank, in a process group; an error on any rank is raised here.

    The ranks are used again by the next call of the same size from the same file, unless one of them failed. Another
    file gets new ones: what its tests do to a process stays among them.
    """
    if _ranks and _ranks[0].used_by != (size, work.__module__):
        _ranks.pop().stop()
    if not _ranks:
        _ranks.append(_Ranks(size, work.__module__))
    try:
        _ranks[0].run(work, arguments)
    except BaseException:
        _ranks.pop().stop()
        raise


class _Ranks:
    """The processes of one group, each at the other end of a pipe."""

    def __init__(self, size: int, module: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.used_by = (size, module)
        self._context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            here, there = self._context.Pipe()
            process = self._context.Process(target=_rank, args=(rank, size, port, there), daemon=True)
            process.start()
            there.close()  # so that a process that dies is noticed as the end of its pipe
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((work, arguments)))
        waiting = list(self._pipes)
        while waiting:
            for pipe in wait(waiting):
                assert isinstance(pipe, Connection)
                rank = self._pipes.index(pipe)
                try:
                    trouble = pipe.recv()
                except EOFError:
                    raise RuntimeError(f"rank {rank} has died") from None
                if trouble:
                    raise RuntimeError(f"on rank {rank}:\n{trouble}")
                waiting.remove(pipe)

    def stop(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            process.kill()
            process.join()
            process.close()
            pipe.close()


def _rank(rank: int, size: int, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=120))
    while True:
        try:
            work, arguments = pickle.loads(pipe.recv_bytes())  # noqa: S301  the tests' own functions
        except EOFError:  # the tests have ended
            return
        try:
            work(rank, *arguments)
            pipe.send("")
        except BaseException:
            pipe.send(traceback.format_exc())
            raise


def folder_of_shapes(folder: Path, identities: int = 6, samples: int = 5) -> Path:
    """A data set in the layout that `--kind folder` reads: each identity is a rectangle of its own, jittered."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for identity in range(identities):
        place = folder / f"person{identity:02d}"
        place.mkdir(parents=True)
        top, left = divmod(identity, 3)
        for sample in range(samples):
            pixels = generator.integers(200, 256, (24, 24), dtype=np.uint8)
            y, x = 2 + 8 * (top % 3) + generator.integers(0, 2), 2 + 7 * left + generator.integers(0, 2)
            pixels[y : y + 3 + identity % 4, x : x + 4] = 20
            Image.fromarray(pixels, "L").save(place / f"{sample}.png")
    return folder
