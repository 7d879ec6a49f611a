"""The benchmark of data from afar, small: both tables, and what each way fetches."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_every_way_is_measured(tmp_path: Path) -> None:
    sizes = {"samples": 600, "shard": 100, "window": 100, "batch": 40, "rounds": 1, "steps": 2, "latency": 0.001}
    arguments = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    script = ROOT / "benchmarks" / "data_remote.py"
    command = [sys.executable, script, *arguments, "--rate", "1e9", "--json", tmp_path / "tables.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ways, requests = json.loads((tmp_path / "tables.json").read_text())
    ways_measured = ["folder", "whole shards", "blocks"]
    assert [(row["order"], row["read as"]) for row in ways] == [
        (order, way) for order in ("shuffled", "P x K") for way in ways_measured
    ]
    fetched = [float(row["MB"]) for row in ways]
    assert fetched[0] == fetched[3] == 0 < fetched[5] <= fetched[4]
    assert [row["KiB"] for row in requests] == ["64", "256"]
    assert all(float(row["requests/s"]) > 0 for row in requests)
