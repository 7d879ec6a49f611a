"""The benchmark of reading, with few images."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "data.py"


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_compares_contenders(tmp_path: Path) -> None:
    contenders = ["undecoded", "hypersphere", "webdataset"]
    size = ["--images", "1500", "--side", "32", "--processes", "0", "1", "--repeats", "1"]
    run(*size, "--only", *contenders, "--json", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(row["contender"], row["processes"]) for row in found] == [
        ("undecoded", 0), ("hypersphere", 0), ("hypersphere", 1), ("webdataset", 0), ("webdataset", 1),
    ]  # fmt: skip
    assert all(row["samples_s"] > 0 for row in found)
    # The system counts in 10 ms: reading so few takes less, and a process of its own may have ended.
    assert all(row["cpu_us"] > 0 for row in found[1:] if not row["processes"])


def test_it_tells_memory_along_an_epoch() -> None:
    lines = run("--memory", "--tiny", "5000").splitlines()
    assert len(lines) == 10
    assert lines[-1].startswith("5000 samples")
