"""Imports that are killed, or whose disk is full, and go on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from trainer.data.importers import ImportOptions, Read, folder
from trainer.data.importers.run import run_import
from trainer.data.manifest import Manifest
from trainer.data.verify import verify
from trainer.errors import UserError

OPTIONS = {"holdout_share": 0.3, "samples_per_shard": 10, "max_bad": 0.2, "min_samples": 3}
CHANGES = ("replace", "rename", "unlink", "rmdir")  # what changes a folder's list of names


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    """All that makes an import write shards anew: duplicates, unreadable images, an identity with too few others."""
    root = Path(shutil.copytree(image_folder, tmp_path_factory.mktemp("images") / "people"))
    shutil.copy(root / "ada" / "00.png", root / "ada" / "copy.png")
    shutil.copy(root / "ada" / "01.png", root / "bob" / "copy.png")
    for name in ("dot/00.png", "dot/01.png", "dot/02.png", "gus/00.png"):
        (root / name).write_bytes(b"")
    (root / "gus" / "gone.png").symlink_to("nowhere")
    return root


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, people: Path) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("sets") / "set"
    made = run_import("folder", people, out, ImportOptions(**OPTIONS))
    verify(made)
    assert len(made.bad) == 5
    assert made.provenance["duplicates_left_out"] == "1"
    assert made.provenance["identities_left_out"].startswith("1 ")
    return contents(out)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def killed(work: Callable[[], object], moment: int | None) -> int:
    """Do some work in a child that is killed just before its n-th change of a folder; how many changes it made."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            made = [0]
            for name in CHANGES:
                setattr(os, name, counted(getattr(os, name), writing, moment, made))
            work()
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        made_changes = len(file.read())
    os.waitpid(child, 0)
    return made_changes


def counted(change: Callable[..., Any], writing: int, moment: int | None, made: list[int]) -> Callable[..., Any]:
    def changing(*args: Any, **named: Any) -> Any:
        if made[0] == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        made[0] += 1
        os.write(writing, b".")
        return change(*args, **named)

    return changing


@pytest.mark.parametrize("offset", range(4))
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(
    tmp_path: Path, people: Path, undisturbed: dict[str, bytes], offset: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # the system lives on, and the test is much quicker

    def work() -> object:
        return run_import("folder", people, tmp_path / "set", ImportOptions(**OPTIONS))

    changes = killed(work, None)
    assert changes > 40
    assert contents(tmp_path / "set") == undisturbed
    for moment in range(offset, changes, 4):
        shutil.rmtree(tmp_path / "set")
        killed(work, moment)
        if not (tmp_path / "set").exists():  # else killed in the last tidying up: whole, or not at all
            work()
        assert contents(tmp_path / "set") == undisturbed
        assert [path.name for path in tmp_path.iterdir()] == ["set"]


SLOW = """
import json, sys, time
from pathlib import Path
from trainer.data.importers import ImportOptions
from trainer.data.importers.run import run_import

def show(stage, done, total):
    print(stage, done, flush=True)
    time.sleep(float(sys.argv[4]))

run_import("folder", sys.argv[1], Path(sys.argv[2]), ImportOptions(**json.loads(sys.argv[3])), show)
"""


def start(source: Path, out: Path, seconds: float, **options: object) -> "subprocess.Popen[str]":
    """An import in a process of its own, which waits for some seconds each time that it has told its progress."""
    command = [sys.executable, "-c", SLOW, str(source), str(out), json.dumps(options), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def children(process: "subprocess.Popen[str]", count: int) -> list[psutil.Process]:
    """The program that an import has started, and the processes that this has forked."""
    deadline = time.monotonic() + 60
    while len(found := psutil.Process(process.pid).children(recursive=True)) < 1 + count:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return sorted(found, key=lambda one: one.ppid() != process.pid)


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 images of ten identities: enough for shards of which several are written when the first is told."""
    root = tmp_path_factory.mktemp("images") / "crowd"
    for i in range(600):
        path = root / f"{i % 10}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), i % 256).resize((8 + i // 256, 8)).save(path)
    return root


def test_processes_write_the_bytes_that_one_would(tmp_path: Path, crowd: Path, people: Path, undisturbed: dict):
    run_import("folder", people, tmp_path / "set", ImportOptions(**OPTIONS, jobs=2))
    assert contents(tmp_path / "set") == undisturbed


def test_a_listing_that_fails_ends_the_program_that_waits_for_tasks(
    tmp_path: Path, people: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("trainer.data.importers.run._WORTH_A_PROCESS", 0)
    options, before = ImportOptions(**OPTIONS, jobs=2), set(psutil.Process().children())

    def started() -> set[psutil.Process]:
        return set(psutil.Process().children()) - before

    def interrupted(stage: str, done: int, total: int) -> None:
        """Somebody presses Ctrl-C when the source is listed, and the program runs."""
        if stage == "list":
            assert len(started()) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_import("folder", people, tmp_path / "set", options, interrupted)
    assert not started()
    run_import("folder", people, tmp_path / "set", options)


def test_killed_process_is_one_sentence_and_the_import_goes_on(tmp_path: Path, crowd: Path):
    options = {"samples_per_shard": 100, "jobs": 2}
    with start(crowd, tmp_path / "set", 0.3, **options) as process:
        _, victim, _ = children(process, 2)
        assert process.stdout is not None
        while not process.stdout.readline().startswith("import"):
            pass
        victim.kill()
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    last = said.strip().splitlines()[-1]
    assert "was ended by SIGKILL, most likely since memory ran out (fewer --jobs need less); run the same" in last
    assert not (tmp_path / "set").exists()
    assert_goes_on(tmp_path, crowd, options)


def test_without_the_program_that_forked_them_processes_go_on(tmp_path: Path, crowd: Path):
    options = {"samples_per_shard": 100, "jobs": 2}
    with start(crowd, tmp_path / "set", 0.1, **options) as process:
        program, *writers = children(process, 2)
        program.kill()
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    _, alive = psutil.wait_procs(writers, timeout=30)
    assert not alive
    verify(Manifest.read(tmp_path / "set"))


def test_killed_import_ends_its_processes_and_goes_on(tmp_path: Path, crowd: Path):
    options = {"samples_per_shard": 100, "jobs": 2}
    with start(crowd, tmp_path / "set", 1, **options) as process:
        orphans = children(process, 2)
        assert process.stdout is not None
        while not process.stdout.readline().startswith("import"):
            pass
        process.kill()
        process.communicate(timeout=60)
    _, alive = psutil.wait_procs(orphans, timeout=30)
    assert not alive
    assert_goes_on(tmp_path, crowd, options)


def assert_goes_on(folder: Path, source: Path, options: dict[str, Any]) -> None:
    """What was finished is not written again; the bytes are those of an undisturbed import."""
    partial = folder / ".set.partial"
    # By the names of shards: a file that a killed process left half written is hidden.
    finished = [path.stem for path in (partial / ".work" / "results").glob("[tv]*.json")]
    times = {name: (partial / name).stat().st_mtime_ns for name in finished}
    made = run_import("folder", source, folder / "set", ImportOptions(**options))
    verify(made)
    run_import("folder", source, folder / "other", ImportOptions(**{**options, "jobs": 1}))
    assert contents(folder / "set") == contents(folder / "other")
    kept = {path.name for path in (folder / "set").glob("[tv]*.tar") if times.get(path.name) == path.stat().st_mtime_ns}
    assert kept == times.keys()


def test_other_options_or_another_source_begin_anew(tmp_path: Path, people: Path, undisturbed: dict[str, bytes]):
    source = Path(shutil.copytree(people, tmp_path / "people", symlinks=True))
    out = tmp_path / "set"
    for changed in ({"seed": 1}, {"samples_per_shard": 11}, {"max_side": 9}):
        with pytest.raises(UserError, match="--max-bad"):
            run_import("folder", source, out, ImportOptions(**{**OPTIONS, **changed, "max_bad": 0.05}))
    Image.new("L", (9, 9)).save(source / "ada" / "new.png")
    with pytest.raises(UserError, match="--max-bad"):
        run_import("folder", source, out, ImportOptions(**{**OPTIONS, "max_bad": 0.05}))
    (source / "ada" / "new.png").unlink()
    run_import("folder", source, out, ImportOptions(**OPTIONS))
    assert contents(out) == undisturbed


def test_more_bad_images_allowed_is_no_reason_to_read_any_again(
    tmp_path: Path, people: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    reads: list[str] = []

    def counting(source: str, options: ImportOptions) -> Read:
        read = folder.read_folder(source, options)
        return lambda place: reads.append(place) or read(place)

    monkeypatch.setattr(folder, "IMPORTER", folder.IMPORTER._replace(read=counting))
    with pytest.raises(UserError, match=r"--max-bad: then the import goes on from what '.*\.set\.partial' keeps"):
        run_import("folder", people, tmp_path / "set", ImportOptions(**{**OPTIONS, "max_bad": 0.07}))
    first = len(reads)
    run_import("folder", people, tmp_path / "set", ImportOptions(**OPTIONS))
    assert contents(tmp_path / "set") == undisturbed
    assert len(reads) < first + 49  # of 49 files that are read in an undisturbed import


FULL = """
import json, subprocess, sys
from pathlib import Path
from trainer.data.importers import ImportOptions
from trainer.data.importers.run import run_import
from trainer.errors import UserError

source, disk, options = sys.argv[1], sys.argv[2], ImportOptions(**json.loads(sys.argv[3]))
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "none", disk], check=True)
try:
    run_import("folder", source, Path(disk, "set"), options)
except UserError as error:
    print(error)
subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
run_import("folder", source, Path(disk, "set"), options)
subprocess.run(["cp", "-r", disk + "/set", sys.argv[4]], check=True)
"""


@pytest.mark.parametrize("jobs", [1, 2])
def test_full_disk_is_one_sentence_and_the_import_goes_on(tmp_path: Path, crowd: Path, jobs: int):
    own = ["unshare", "--user", "--map-root-user", "--mount"]  # a space of mounts that ends with the process
    if subprocess.run([*own, "true"], capture_output=True).returncode:
        pytest.skip("the system lets no ordinary user mount")
    (tmp_path / "disk").mkdir()
    options = {"samples_per_shard": 100, "jobs": jobs}
    arguments = [str(crowd), str(tmp_path / "disk"), json.dumps(options), str(tmp_path / "set")]
    done = subprocess.run([*own, sys.executable, "-c", FULL, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    disk = re.escape(str(tmp_path / "disk"))
    assert re.fullmatch(f"the disk of '{disk}' is full; free some space and run the same .*\n", done.stdout)
    run_import("folder", crowd, tmp_path / "other", ImportOptions(samples_per_shard=100))
    assert contents(tmp_path / "set") == contents(tmp_path / "other")
