"""What several rooms' tests need: real images, and a small data set."""

import os
from pathlib import Path

import pytest

# One thread of arithmetic a process, for the tests and for what they start. The other cores are taken by tests that run
# at the same time: a second thread then waits for its turn, the first spins, and a product takes ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Without a GPU the head's kernels run in Triton's interpreter. Triton looks whether it should when it is first
# imported, which may be by any test.
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def omniglot_zip() -> Path:
    """The archive of the background set, by OMNIGLOT_ZIP or beside the project; it is never copied into it."""
    path = Path(os.environ.get("OMNIGLOT_ZIP", ROOT.parent / "shared" / "data" / "omniglot" / "images_background.zip"))
    if not path.is_file():
        pytest.skip(f"the Omniglot archive is not at '{path}'; set OMNIGLOT_ZIP to test on it")
    return path
