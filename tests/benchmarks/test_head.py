"""The head's benchmark runs, with torch and numpy alone, and writes the form that its readers expect."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A None in sys.modules makes Python believe that the package is not installed.
RUN = """
import runpy, sys
sys.modules |= dict.fromkeys({missing!r})
sys.argv = ["head.py", *{arguments!r}]
runpy.run_path("benchmarks/head.py", run_name="__main__")
"""


def run(missing: list[str], *arguments: str) -> str:
    small = ["--classes", "3000", "--batch", "8", "--dim", "16", "--threads", "1", "--repeats", "1", *arguments]
    code = RUN.format(missing=missing, arguments=small)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(path: Path) -> dict[str, dict[str, Any]]:
    return {row["contender"]: row for row in json.loads(path.read_text())["rows"]}


def test_one_rank_in_bf16_without_more_than_torch_and_numpy(tmp_path: Path) -> None:
    out = tmp_path / "head.json"
    printed = run(["pydantic", "yaml", "pytorch_metric_learning"], "--dtype", "bf16", "--json", str(out))
    assert "pml is not installed: left out" in printed
    found = rows(out)
    assert list(found) == ["floor", "store", "recompute", "dense", "insightface_ops"]
    for row in found.values():
        assert row["step_s"] > 0
        assert row["step_with_optimizer_s"] > 0
        assert row["collectives"] == 0
    for name in ("store", "recompute"):
        assert found[name]["rel_error_dx"] < 1e-2
        assert found[name]["rel_error_dw"] < 1e-2
    assert found["insightface_ops"]["rel_error_dx"] > 0.01  # the factor that its margin leaves out
    written = json.loads(out.read_text())
    assert written["floor_fp32_s"] > 0
    assert f"times the floor in fp32, {written['floor_fp32_s']:.4f} s: floor " in printed
    config = written["config"]
    assert (config["classes"], config["batch"], config["dim"], config["ranks"]) == (3000, 8, 16, 1)


def test_two_ranks(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_metric_learning")
    out = tmp_path / "head.json"
    run([], "--ranks", "2", "--threads", "2", "--json", str(out))
    found = rows(out)
    assert list(found) == ["floor", "store", "recompute", "dense", "pml", "insightface_ops"]
    assert {name: row["collectives"] for name, row in found.items()} == {
        "floor": 0,
        "store": 3,
        "recompute": 3,
        "dense": 1,
        "pml": 1,
        "insightface_ops": 7,
    }
    for name in ("store", "recompute", "dense", "pml"):
        assert found[name]["rel_error_dx"] < 1e-5
        assert found[name]["rel_error_dw"] < 1e-5
