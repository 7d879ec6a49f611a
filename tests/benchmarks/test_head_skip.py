"""The benchmark of what leaving out samples spares, with few classes and steps."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "head_skip.py"


def test_it_tells_shares_and_errors_from_start_to_end() -> None:
    small = ["--classes", "500", "--batch", "64", "--dim", "64", "--repeats", "1", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *small, "--stages", "0", "150"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    start, end = (line.split()[3:] for line in done.stdout.splitlines()[1:])
    assert float(start[1]) == 1  # all are kept, and the gradients are those of the exact step
    assert float(start[-1]) < 1e-6
    assert float(end[0]) < float(start[0])
    assert float(end[1]) < 1
    assert max(float(end[-1]), float(end[-2])) < 1e-3
