"""The service's benchmark, small: two checkouts in turn, and a table of both."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_both_checkouts_are_measured(tmp_path: Path) -> None:
    arguments = ["--against", str(ROOT), "--gallery", "64", "--requests", "8", "--rounds", "2"]
    arguments += ["--json", str(tmp_path / "rows.json")]
    script = ROOT / "benchmarks" / "serving.py"
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    measured = [(row["checkout"], row["vectors enrolled"]) for row in rows]
    assert measured == [("here", "0"), ("against", "0"), ("here", "64"), ("against", "64")]
    for row in rows:
        assert 0 < float(row["p50 ms"]) <= float(row["p95 ms"]) <= float(row["p99 ms"])
        assert row["checkout"] in done.stdout
