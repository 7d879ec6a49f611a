"""The benchmark of how many classes fit, with few of them."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "head_scale.py"


@pytest.mark.parametrize("formats", [("fp32", "fp32"), ("bf16", "int8")])
def test_it_trains_and_tells_its_memory(formats: tuple[str, str]) -> None:
    weights, state = formats
    arguments = ["--classes", "3000", "--batch", "8", "--dim", "32", "--lr", "0.1"]
    arguments += ["--weights", weights, "--state", state]
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("loss") == 3
    assert "bytes a class" in done.stdout


def test_too_many_classes_are_refused_before_memory_is_taken() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--classes", "100000000000"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "choose fewer classes" in done.stderr
