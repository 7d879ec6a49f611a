"""The ways of reading a data set that `benchmarks/data.py` compares. Each yields the number of samples of a batch.

All decode with `trainer.data.image.load_image` to 3 x 112 x 112, in batches of 256, shuffled; `processes` is the number
of processes that decode, 0 for none.
"""

import importlib.machinery
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from trainer.data.decode import DecoderPool
from trainer.data.image import Preprocessing, load_image
from trainer.data.manifest import Manifest
from trainer.data.stream import DataConfig, Stream

BATCH, WINDOW = 256, 5_000
PIXELS = Preprocessing(mode="RGB", height=112, width=112)
Contender = Callable[[Path, int], Iterator[int]]


def settings(folder: Path, processes: int, **changes: object) -> DataConfig:
    values = {"path": folder, "batch_size": BATCH, "shuffle_window": WINDOW, "cache": "none"}
    return DataConfig.model_validate(values | {"decode_processes": processes} | changes)


def stream(folder: Path, processes: int, **changes: object) -> Stream:
    return Stream(Manifest.read(folder), "train", settings(folder, processes, **changes), seed=1)


def hypersphere(folder: Path, processes: int) -> Iterator[int]:
    """The stream; without processes, one thread decodes beside the caller's, as one process of the others does."""
    for batch in stream(folder, processes, decode_threads=1).batches(0):
        yield len(batch.keys)


def two_threads(folder: Path, processes: int) -> Iterator[int]:
    """The stream as it is by default: two threads decode."""
    for batch in stream(folder, processes, decode_threads=2).batches(0):
        yield len(batch.keys)


def undecoded(folder: Path, processes: int) -> Iterator[int]:
    """The stream with its checksums and its order, but the files stay as they are."""

    class Undecoded(DecoderPool):
        def decode(self, names, read):  # type: ignore[no-untyped-def]
            for i in range(len(names)):
                read(i)
            return self._decoding.room(len(names)), {}

    found = stream(folder, processes)
    with Undecoded(found._reader._decoding) as pool:
        for step in range(found.steps_per_epoch):
            yield len(found._batch(0, step, pool).keys)


class Steps(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The stream as a data set of whole batches, for torch's DataLoader; each worker opens it."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._steps = folder, stream(folder, 0).steps_per_epoch

    @cached_property
    def _stream(self) -> Stream:
        return stream(self._folder, 0, decode_threads=1)

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        batch = self._stream.batch(0, step)
        return batch.images_BCHW, batch.labels_B


def dataloader(folder: Path, processes: int) -> Iterator[int]:
    """The same batches from worker processes of torch's DataLoader, started clean as beside gloo they must be."""
    context = "forkserver" if processes else None
    for images_BCHW, _ in DataLoader(
        Steps(folder), batch_size=None, num_workers=processes, multiprocessing_context=context
    ):
        yield len(images_BCHW)


def webdataset(folder: Path, processes: int) -> Iterator[int]:
    """Plain WebDataset: shuffled shards, a buffer of as many samples as fit its usual 1000, batches in the workers."""
    import webdataset as wds

    urls = sorted(map(str, folder.glob("train-*.tar")))
    found = (
        wds.WebDataset(urls, shardshuffle=len(urls), seed=1, empty_check=False)
        .shuffle(1000)
        .to_tuple("jpg", "cls")
        .map_tuple(_pixels, int)
        .batched(BATCH, collation_fn=_collate)
    )
    for images_BCHW, _ in wds.WebLoader(found, batch_size=None, num_workers=processes):
        yield len(images_BCHW)


def tars(folder: Path, processes: int) -> Iterator[int]:
    """Plain WebDataset over the same tars, in order, without decoding and without batches."""
    import webdataset as wds

    for _ in wds.WebDataset(sorted(map(str, folder.glob("train-*.tar"))), shardshuffle=False):
        yield 1


def streaming(folder: Path, processes: int) -> Iterator[int]:
    """MosaicML Streaming on its own format, `<folder>/mds`, through its own loader."""
    for images_BCHW, _ in _mosaic().StreamingDataLoader(
        _mosaic_set(folder), batch_size=BATCH, num_workers=processes, collate_fn=_collate
    ):
        yield len(images_BCHW)


CONTENDERS: dict[str, Contender] = {
    "tars": tars, "undecoded": undecoded, "hypersphere": hypersphere, "two_threads": two_threads,
    "dataloader": dataloader, "webdataset": webdataset, "streaming": streaming,
}  # fmt: skip


def write_mosaic(folder: Path) -> None:
    """The files of the tars again, in the format of MosaicML Streaming."""
    split = Manifest.read(folder).split("train")
    with _mosaic().MDSWriter(out=str(folder / "mds"), columns={"image": "bytes", "label": "int"}) as writer:
        for shard in range(len(split.shards)):
            data = split.path(shard).read_bytes()
            for offset, size, label, *_ in split.index(shard).records.tolist():
                writer.write({"image": data[offset : offset + size], "label": label})


def _mosaic() -> types.ModuleType:
    """The package imports torchvision, for sets that are not used here; torchvision has no build for every torch."""
    warnings.simplefilter("ignore")
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules.setdefault(name, module)
    sys.modules["torchvision.datasets"].__dict__.setdefault("VisionDataset", object)
    sys.modules["torchvision.transforms.functional"].__dict__.setdefault("to_tensor", None)
    import streaming

    return streaming


def _mosaic_set(folder: Path) -> Dataset[tuple[torch.Tensor, int]]:
    class Faces(_mosaic().StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: int) -> tuple[np.ndarray, int]:
            sample = super().__getitem__(at)
            return _pixels(sample["image"]), sample["label"]

    found: Dataset[tuple[torch.Tensor, int]] = Faces(
        local=str(folder / "mds"), shuffle=True, batch_size=BATCH, shuffle_seed=1, shuffle_block_size=WINDOW
    )
    return found


def _pixels(data: bytes) -> np.ndarray:
    return load_image(data, PIXELS)


def _collate(samples: list[tuple[np.ndarray, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)
