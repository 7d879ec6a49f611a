"""Two runs never hold one folder, on a disk or in a bucket, and a killed one's is free soon."""

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.s3 import environment, s3_bucket
from trainer import lease
from trainer.errors import UserError
from trainer.lease import held, token_in
from trainer.storage import Folder


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket("leases") as address:
        yield address


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.setattr(lease, "BEAT_S", 0.3)
    monkeypatch.setattr(lease, "STALE_S", 3.0)
    monkeypatch.setattr(lease, "SETTLE_S", 0.3)
    monkeypatch.setattr(lease, "_LOOK_S", 0.1)
    if request.param == "s3":
        return Folder.at(f"{request.getfixturevalue('bucket')}/{uuid.uuid4().hex}")
    return Folder.at(tmp_path / "run")


def test_the_second_is_refused_and_the_next_is_not(folder: Folder) -> None:
    with held(folder, ".lock", "one"):
        assert token_in(folder, ".lock") == "one"
        with pytest.raises(UserError, match=r"another run is writing into '.*' now; wait for its end, or choose"):
            held(folder, ".lock", "two").__enter__()
        assert token_in(folder, ".lock") == "one"
    with held(folder, ".lock", "three"):
        assert token_in(folder, ".lock") == "three"


def test_who_is_patient_gets_it_when_the_first_has_ended(folder: Folder) -> None:
    first = held(folder, ".lock", "one")
    first.__enter__()
    threading.Timer(1.0, lambda: first.__exit__(None, None, None)).start()
    with held(folder, ".lock", "two", patience_s=20):
        assert token_in(folder, ".lock") == "two"


HOLDER = """
import sys, time
from trainer import lease
from trainer.storage import Folder
lease.BEAT_S = 0.3
with lease.held(Folder.at(sys.argv[1]), ".lock", "killed"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_that_of_a_killed_process_is_free_soon(folder: Folder) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder.address)], env=environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another run is writing"):
            held(folder, ".lock", "other").__enter__()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with held(folder, ".lock", "other"):
        assert token_in(folder, ".lock") == "other"


def test_of_many_at_once_one_holds_it(folder: Folder) -> None:
    """Also where all find the lease of a dead process."""
    if isinstance(folder.address, str):
        folder.write(".lock", "dead 1 0\n")
    got: list[str] = []
    refused: list[str] = []
    ended = threading.Event()

    def contend(token: str) -> None:
        try:
            with held(folder, ".lock", token):
                got.append(token)
                ended.wait(30)
        except UserError:
            refused.append(token)

    threads = [threading.Thread(target=contend, args=(str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 30
    while len(refused) < 3 and time.monotonic() < until:
        time.sleep(0.05)
    ended.set()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 3)


def test_a_restart_of_the_same_run_does_not_wait(bucket: str) -> None:
    folder = Folder.at(f"{bucket}/{uuid.uuid4().hex}")
    folder.write(".writer", "mine 7 0\n")  # its ranks were killed
    begun = time.monotonic()
    with held(folder, ".writer", "mine"):
        assert time.monotonic() - begun < lease.STALE_S
    assert folder.sizes() == {}


def test_who_was_overtaken_leaves_it_to_the_other(folder: Folder) -> None:
    if isinstance(folder.address, Path):
        pytest.skip("a locked file cannot be overtaken")
    with held(folder, ".lock", "one"):
        folder.write(".lock", "two 1 0\n")
        time.sleep(1)
        assert token_in(folder, ".lock") == "two"
    assert token_in(folder, ".lock") == "two"
