"""Runs a function on several gloo ranks, each a process of its own."""

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing


def run_on_ranks(size: int, work: Callable[..., None], *arguments: Any) -> None:
    """`work(rank, *arguments)` on each rank, in a process group; an error on any rank is raised here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_rank, args=(size, port, work, arguments), nprocs=size)


def _rank(rank: int, size: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=120))
    work(rank, *arguments)
    dist.destroy_process_group()


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
