"""What the demo reads of a data set by itself; the rest of it is commands, which have tests of their own."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.data.importers import ImportOptions
from trainer.data.importers.run import run_import

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_demo_reads_its_held_out_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "deploy" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    random = np.random.default_rng(0)
    for person in range(40):
        folder = tmp_path / "source" / f"person {person:02d}"
        folder.mkdir(parents=True)
        for number in range(2):
            Image.fromarray(random.integers(0, 256, (9, 9), dtype=np.uint8)).save(folder / f"{number}.png")
    run_import("folder", str(tmp_path / "source"), tmp_path / "data", ImportOptions(holdout_share=0.6, jobs=1))
    monkeypatch.setattr(demo, "DATA", tmp_path / "data")
    assert demo.split()["identities"] - demo.STRANGERS == 4  # the gallery that it calibrates for
    images = demo.held_out_images()
    assert len(images) == 24
    for person, files in images.items():
        source = tmp_path / "source" / person
        assert sorted(files) == sorted(path.read_bytes() for path in source.iterdir())
