"""A new margin is one file and its line in the list of losses: the rest of the project takes it from there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FILE = '''
"""A margin that grows with the angle."""

from typing import ClassVar, Literal

from torch import Tensor

from trainer.losses.margins import Margin, Positives, Scale, angle


class Slanted(Margin):
    formula = "s (cos(theta) - m theta)"
    source = "Nobody 2026, A margin for a test"
    title = "Slanted"
    demo: ClassVar = {"scale": 16.0}
    demo_in_plane: ClassVar = {"margin": 0.05}

    name: Literal["slanted"] = "slanted"
    scale: Scale = 64.0
    margin: float = 0.1

    def target(self, positives: Positives) -> Tensor:
        return self.scale * (positives.cos_B - self.margin * angle(positives.cos_B))
'''
USE = """
import json, sys
from pathlib import Path
import torch
from benchmarks.margins import LOSSES as RECIPES
from trainer.config import load
from trainer.figures import digits, draw
from trainer.figures.margins import boundary_rows, curve_groups
from trainer.losses import table

torch.set_num_threads(1)
config = load(None, ["loss=slanted", "loss.margin=0.2"])
trained = digits.train(digits.settings("slanted", 2, 60), 60, 0, digits.load(0))
written = draw.geometry(Path("figures"), ["slanted"], [2], steps=3, seed=0, show=lambda *_: None)
recipe = next(one for one in RECIPES if one.name == "slanted").config(Path("data"), Path("out"), 1, 0)
groups = curve_groups(angles=9)
print(json.dumps({
    "row": next(row for row in table() if row["name"] == "slanted"),
    "margin": config.loss.margin,
    "falls": trained.losses[-1] < trained.losses[0],
    "curves": [(g.name, c.label) for g in groups for c in g.curves if c.name == "slanted"],
    "boundaries": [(r.label, r.text, r.tex) for r in boundary_rows() if r.name == "slanted"],
    "caption": draw.psi_caption(groups),
    "figures": sorted(path.name for path in written.files),
    "recipe": [recipe.loss.scale, recipe.head.optimizer.lr],
}))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The project with one file more, and one more in the list of losses."""
    for folder in ("trainer", "serving", "benchmarks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "trainer/losses/margins/slanted.py").write_text(FILE)
    listed = tmp_path / "trainer/losses/__init__.py"
    text = listed.read_text().replace(" Range),\n)", " Range),\n    Slanted,\n)")
    listed.write_text(
        text.replace("\n# In the order", "from trainer.losses.margins.slanted import Slanted\n\n# In the order", 1)
    )
    return tmp_path


def test_one_file_and_the_list_make_a_margin_known_everywhere(checkout: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["row"] == {
        "name": "slanted",
        "family": "margin",
        "formula": "s (cos(theta) - m theta)",
        "defaults": {"scale": 64.0, "margin": 0.1},
        "source": "Nobody 2026, A margin for a test",
    }
    assert found["margin"] == 0.2
    assert found["falls"]
    assert found["curves"] == [["additive", "Slanted"]]
    assert found["boundaries"] == [
        [
            "Slanted",
            "s (cos(theta_1) - m theta_1) = s cos(theta_2)",
            r"s (\cos (\theta_1) - m \theta_1) = s \cos (\theta_2)",
        ]
    ]
    assert {"geometry_margin_2d.png", "angles_margin_2d.png", "psi.png", "boundaries.png"} <= set(found["figures"])
    assert found["recipe"] == [16.0, 2.0]
