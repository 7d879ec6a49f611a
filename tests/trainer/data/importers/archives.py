"""WebDataset tars as others write them."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def pack(path: Path, samples: list[dict[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for number, sample in enumerate(samples):
            for suffix, data in sample.items():
                info = tarfile.TarInfo(f"{'long' * 30}/{path.stem}-{number:04d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
