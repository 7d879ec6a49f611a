import errno
import os
import subprocess
from pathlib import Path

import pytest

from trainer import atomic
from trainer.atomic import DiskFull, Kind, fresh_file, fresh_folder, write_file
from trainer.errors import UserError

SET = Kind("a data set", "manifest.json")


def fill(out: Path, text: str, overwrite: bool = False) -> None:
    with fresh_folder(out, SET, overwrite) as folder:
        (folder / "manifest.json").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_folder_appears_whole(tmp_path: Path):
    out = tmp_path / "deep" / "set"
    with fresh_folder(out, SET) as folder:
        (folder / "manifest.json").write_text("1")
        assert not out.exists()
    assert names(out) == ["manifest.json"]
    assert names(out.parent) == ["set"]


def test_failure_leaves_nothing(tmp_path: Path):
    def interrupted() -> None:
        with fresh_folder(tmp_path / "set", SET) as folder:
            (folder / "train-000000.tar").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == []


def test_finished_set_is_kept_unless_overwritten(tmp_path: Path):
    fill(tmp_path / "set", "1")
    with pytest.raises(UserError, match="--overwrite"):
        fill(tmp_path / "set", "2")
    assert (tmp_path / "set" / "manifest.json").read_text() == "1"
    fill(tmp_path / "set", "2", overwrite=True)
    assert (tmp_path / "set" / "manifest.json").read_text() == "2"
    assert names(tmp_path) == ["set"]


def test_failed_overwrite_keeps_the_old_set(tmp_path: Path):
    fill(tmp_path / "set", "1")

    def failing() -> None:
        with fresh_folder(tmp_path / "set", SET, overwrite=True):
            raise UserError("no")

    with pytest.raises(UserError, match="no"):
        failing()
    assert (tmp_path / "set" / "manifest.json").read_text() == "1"


def test_other_files_are_never_replaced(tmp_path: Path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match="not a data set"):
        fill(tmp_path / "set", "1", overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        fill(tmp_path / "file", "1", overwrite=True)


def test_empty_folder_is_taken(tmp_path: Path):
    (tmp_path / "set").mkdir()
    fill(tmp_path / "set", "1")
    assert names(tmp_path / "set") == ["manifest.json"]


def test_leftovers_of_a_killed_import_are_cleared(tmp_path: Path):
    work = tmp_path / ".set.partial"
    (work / "sub").mkdir(parents=True)
    (work / "train-000000.tar").write_text("half")
    (work / "manifest.json.partial").write_text("half")
    fill(tmp_path / "set", "1")
    assert names(tmp_path) == ["set"]
    assert names(tmp_path / "set") == ["manifest.json"]


def test_set_that_was_being_replaced_comes_back(tmp_path: Path):
    fill(tmp_path / ".set.replaced", "old")  # killed after the old one stepped aside
    with pytest.raises(UserError, match="is a data set already"):
        fill(tmp_path / "set", "new")
    assert (tmp_path / "set" / "manifest.json").read_text() == "old"


@pytest.mark.parametrize("path", ["file/set", "file/deep/set", "x" * 300, "/proc/set"])
def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path, path: str):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"' cannot be made: .*; choose another --out"):
        fill(tmp_path / path, "1")


def test_two_imports_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(atomic, "_PATIENCE", 0)
    with fresh_folder(tmp_path / "set", SET) as folder:
        (folder / "manifest.json").write_text("first")
        with pytest.raises(UserError, match="another process is writing"):
            fill(tmp_path / "set", "second")
    assert (tmp_path / "set" / "manifest.json").read_text() == "first"


def test_resumable_work_stays_after_a_failure_and_is_given_to_the_next(tmp_path: Path):
    def failing() -> None:
        with fresh_folder(tmp_path / "set", SET, resumable=True) as folder:
            (folder / "train-000000.tar").write_text("done")
            raise UserError("the disk is full")

    with pytest.raises(UserError, match="full"):
        failing()
    assert names(tmp_path) == [".set.partial"]
    with fresh_folder(tmp_path / "set", SET, resumable=True) as folder:
        assert names(folder) == ["train-000000.tar"]
        (folder / "manifest.json").write_text("1")
    assert names(tmp_path) == ["set"]
    assert names(tmp_path / "set") == ["manifest.json", "train-000000.tar"]


def test_a_writer_that_ends_soon_is_waited_for(tmp_path: Path):
    with fresh_folder(tmp_path / "set", SET, resumable=True) as folder:
        (folder / "manifest.json").write_text("1")
        orphan = subprocess.Popen(["sleep", "1"], close_fds=False)
    (tmp_path / "set").rename(tmp_path / ".set.partial")  # as if the parent had been killed before it was done
    with orphan:
        fill(tmp_path / "set", "2")
    assert (tmp_path / "set" / "manifest.json").read_text() == "2"


def test_a_child_of_resumable_work_keeps_others_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(atomic, "_PATIENCE", 0)
    with fresh_folder(tmp_path / "set", SET, resumable=True) as folder:
        (folder / "manifest.json").write_text("1")
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    (tmp_path / "set").rename(tmp_path / ".set.partial")  # as if the parent had been killed before it was done
    try:
        with pytest.raises(UserError, match="another process is writing"):
            fill(tmp_path / "set", "2")
    finally:
        child.kill()
        child.wait()
    fill(tmp_path / "set", "2")


def test_a_file_appears_whole_or_the_old_one_stays(tmp_path: Path) -> None:
    write_file(tmp_path / "file.json", "old")

    def failing() -> None:
        with fresh_file(tmp_path / "file.json") as file:
            file.write(b"half")
            assert (tmp_path / "file.json").read_text() == "old"
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=f"the disk of '{tmp_path}' is full, so that 'file.json' was not written"):
        failing()
    assert (tmp_path / "file.json").read_text() == "old"
    assert names(tmp_path) == ["file.json"]
    write_file(tmp_path / "file.json", "n\N{LATIN SMALL LETTER E WITH ACUTE}w")
    assert (tmp_path / "file.json").read_bytes() == b"n\xc3\xa9w"
    assert names(tmp_path) == ["file.json"]


def test_a_full_disk_is_one_sentence_that_still_is_the_system_s_error(tmp_path: Path) -> None:
    def failing(number: int) -> None:
        with fresh_folder(tmp_path / "set", SET) as folder, fresh_file(folder / "manifest.json"):
            raise OSError(number, os.strerror(number), "f")

    for number in (errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(DiskFull, match="free some space") as raised:
            failing(number)
        assert isinstance(raised.value, UserError)
        assert raised.value.errno == number
        assert Path(raised.value.filename).name == "manifest.json"
    with pytest.raises(PermissionError):
        failing(errno.EACCES)
    assert names(tmp_path) == []


def test_a_file_may_be_read_by_whom_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_file(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_content_and_name_are_on_the_disk_before_the_block_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is flushed, in order: a file before it takes its name, then the folder that holds the name."""
    flushed: list[str] = []
    fsync = os.fsync

    def noted(handle: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    write_file(tmp_path / "one", b"1")
    assert [name.startswith(".partial-") for name in flushed] == [True, False]
    assert flushed[1] == tmp_path.name
    flushed.clear()
    fill(tmp_path / "set", "1")
    assert flushed == ["manifest.json", ".set.partial", tmp_path.name]
