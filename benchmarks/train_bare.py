"""What training is compared with: a loop as anybody writes it in PyTorch, on the same network, images and head."""

import os
import socket
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from PIL import Image
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from trainer.backbones import build
from trainer.config import Config
from trainer.losses.margins.cosine import ArcFace


class Files(Dataset[tuple[torch.Tensor, int]]):
    """Images of a folder of folders, decoded when they are asked for, or all of them before."""

    def __init__(self, folder: Path, cached: bool) -> None:
        self.paths = sorted(folder.glob("*/*.jpg"))
        names = {name: i for i, name in enumerate(sorted({path.parent.name for path in self.paths}))}
        self.labels = [names[path.parent.name] for path in self.paths]
        self.classes = len(names)
        self.pixels = [self._decode(path) for path in self.paths] if cached else None

    def _decode(self, path: Path) -> torch.Tensor:
        return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self._decode(self.paths[index]) if self.pixels is None else self.pixels[index]
        return image, self.labels[index]


class Dense(nn.Module):
    """The backbone and ArcFace over all classes, on every rank."""

    def __init__(self, config: Config, classes: int, side: int) -> None:
        super().__init__()
        self.backbone = build(config.backbone, 3, side, side)
        self.centres = nn.Parameter(0.01 * torch.randn(classes, config.backbone.dimension))
        assert isinstance(config.loss, ArcFace)
        self.scale, self.margin = config.loss.scale, config.loss.margin

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = functional.normalize(self.backbone(images.float().div_(127.5).sub_(1.0)))
        cosines = functional.linear(x, functional.normalize(self.centres)).clamp(-1 + 1e-7, 1 - 1e-7)
        target = cosines.gather(1, labels[:, None])
        harder = torch.cos(torch.acos(target) + self.margin)
        return functional.cross_entropy(self.scale * cosines.scatter(1, labels[:, None], harder), labels)


def measure(config: Config, images: Path, cached: bool, steps: int, warm: int) -> tuple[float, float]:
    """Samples a second over all ranks, and microseconds of the processor a sample, after `warm` steps."""
    ranks = config.scaling.workers
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = (ranks, port, config, images, cached, steps, warm, answers)
    multiprocessing.start_processes(_rank, given, nprocs=ranks, start_method="spawn")
    rates, times = zip(*[answers.get() for _ in range(ranks)], strict=True)
    return min(rates), sum(times) / ranks


def _rank(
    rank: int, ranks: int, port: int, config: Config, images: Path, cached: bool, steps: int, warm: int,
    answers: "multiprocessing.SimpleQueue[tuple[float, float]]",
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data, batch = Files(images, cached), config.data.batch_size // ranks
    model: nn.Module = Dense(config, data.classes, config.data.height)
    if ranks > 1:
        meeting = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", meeting, timedelta(seconds=300), ranks, rank)
        model = DistributedDataParallel(model)
    chosen = config.optimizer
    optimizer = torch.optim.SGD(model.parameters(), chosen.lr, chosen.momentum, weight_decay=chosen.weight_decay)
    sampler: DistributedSampler[int] = DistributedSampler(data, ranks, rank, drop_last=True)
    loader = DataLoader(
        data, batch, sampler=sampler, drop_last=True,
        num_workers=0 if cached else 1, persistent_workers=not cached,
    )  # fmt: skip
    done, epoch, since, cpu = 0, 0, 0.0, 0.0
    while done < steps:
        sampler.set_epoch(epoch)
        for pixels, labels in loader:
            optimizer.zero_grad()
            loss = model(pixels, labels)
            loss.backward()
            optimizer.step()
            done += 1
            if done % config.run.log_every == 0:
                loss.item()
            if done == warm:
                since, cpu = time.perf_counter(), _processor_seconds()
            if done == steps:
                break
        epoch += 1
    samples = (steps - warm) * batch
    answers.put((ranks * samples / (time.perf_counter() - since), 1e6 * (_processor_seconds() - cpu) / samples))


def _processor_seconds() -> float:
    import psutil

    processes = [psutil.Process(), *psutil.Process(os.getpid()).children(recursive=True)]
    return float(sum(sum(process.cpu_times()[:2]) for process in processes))
