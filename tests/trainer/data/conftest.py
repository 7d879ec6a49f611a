import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.data.importers import ImportOptions
from trainer.data.importers.run import run_import
from trainer.data.manifest import Manifest
from trainer.data.stream import DataConfig

COUNTS = {"ada": 9, "bob": 4, "cy": 7, "dot": 5, "eve": 12, "fay": 4, "gus": 6}  # 47 samples


def _noise(seed: int, side: int = 12) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8))


@pytest.fixture(scope="session")
def noise() -> Callable[..., Image.Image]:
    """An image of random pixels by seed (and side)."""
    return _noise


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder per identity, COUNTS images each."""
    root = tmp_path_factory.mktemp("images") / "people"
    for i, (name, count) in enumerate(COUNTS.items()):
        (root / name).mkdir(parents=True)
        for j in range(count):
            _noise(100 * i + j).save(root / name / f"{j:02d}.png")
    return root


@pytest.fixture(scope="session")
def data_set(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    """The folder imported whole into the train split: 47 samples of 7 classes in 5 shards. Do not change it."""
    out = tmp_path_factory.mktemp("sets") / "people"
    run_import("folder", image_folder, out, ImportOptions(holdout_share=0, samples_per_shard=10))
    return out


@pytest.fixture(scope="session")
def manifest(data_set: Path) -> Manifest:
    return Manifest.read(data_set)


@pytest.fixture
def config() -> DataConfig:
    return DataConfig(height=12, width=12, batch_size=12, shuffle_window=20)


@pytest.fixture(scope="session")
def omniglot_zip() -> Path:
    named = os.environ.get("OMNIGLOT_ZIP")
    root = Path(__file__).parents[3]
    path = Path(named) if named else root.parent / "shared" / "data" / "omniglot" / "images_background.zip"
    if not path.exists():
        pytest.skip("Omniglot is not here: OMNIGLOT_ZIP names no images_background.zip")
    return path
