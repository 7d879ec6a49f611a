"""The audit log: the chain and what breaks it, the folder, a disk that is full."""

import json
import multiprocessing
import shutil
import time

import pytest

from serving.access import audit as module
from serving.access.audit import AuditLog, Event
from serving.access.chain import Place, entries, files, find, page, verify
from serving.errors import ApiError
from tests.disk import small_disk
from trainer.errors import UserError


def event(number=0, subjects=("alice",), **more):
    whole = {"key_id": "k", "do": "POST /x", "collection": "default", "status": 201, "request_id": f"r{number}"}
    return Event(at=time.time(), subjects=subjects, **(whole | more))


def write(folder, count, max_bytes=2**20, **more):
    log = AuditLog(folder, max_bytes)
    with log.running():
        for number in range(count):
            log.keep(event(number, **more)).result(10)
    return log


def lines(folder):
    return [json.loads(text) for _, _, text in entries(folder)]


def test_lines_follow_one_another_over_files_and_starts(tmp_path):
    folder = tmp_path / "log"
    for _ in range(2):
        write(folder, 30, max_bytes=4096)
    assert len(files(folder)) > 3
    head, first = verify(folder)
    assert (head.number, first) == (64, 1)
    found = lines(folder)
    assert [entry["n"] for entry in found] == list(range(1, 65))
    assert [e["request"] for e in found if e["do"] == "POST /x"] == [f"r{n}" for n in range(30)] * 2
    assert [e["do"] for e in found if e["key"] == "service"] == ["start", "stop"] * 2
    files(folder)[0].unlink()  # the oldest may be moved away
    assert verify(folder)[1] > 1
    assert folder.stat().st_mode & 0o777 == 0o700


def test_no_id_stands_in_the_log_and_the_operator_finds_it(tmp_path):
    folder = tmp_path / "log"
    write(folder, 2, subjects=["alice", "bob"])
    write(folder, 1, subjects=["carol"])
    write(folder, 1, subjects=["alice"], collection="cars")
    assert b"alice" not in b"".join(path.read_bytes() for path in folder.iterdir())
    assert len(list(find(folder, "default", "alice"))) == 2
    assert [json.loads(line)["collection"] for line in find(folder, "cars", "alice")] == ["cars"]
    assert list(find(folder, "default", "ALICE")) == []


def test_what_is_about_many_takes_several_lines(tmp_path):
    people = [f"p{number}" for number in range(2500)]
    write(tmp_path / "log", 1, subjects=people)
    bulk = [entry for entry in lines(tmp_path / "log") if entry["do"] == "POST /x"]
    assert [len(entry["subjects"]) for entry in bulk] == [1000, 1000, 500]
    assert {entry["request"] for entry in bulk} == {"r0"}
    assert len(list(find(tmp_path / "log", "default", "p2499"))) == 1


def change(number, what):
    def damage(path):
        every = path.read_bytes().splitlines(keepends=True)
        every[number] = what(every[number])
        path.write_bytes(b"".join(every))

    return damage


def rewrite(path):
    """A whole new chain, as whoever has no key would make it."""
    from serving.access.chain import Head, line

    head, text = Head(), b""
    for old in path.read_bytes().splitlines():
        entry = json.loads(old)
        more, head = line(
            {name: value for name, value in entry.items() if name not in ("n", "prev")} | {"key": "x"}, head
        )
        text += more
    path.write_bytes(text)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (change(3, lambda line: line.replace(b"r2", b"r9")), "line 5 of"),
        (change(3, lambda line: b""), "line 4 of"),
        (change(3, lambda line: line[:-10] + b"\n"), "line 4 of"),
        (change(3, lambda line: b"[" * 100_000 + b"\n"), "line 4 of"),
        (change(3, lambda line: b"\xff\n"), "line 4 of"),
        (change(0, lambda line: line.replace(b"service", b"another")), "line 2 of"),
        (change(-1, lambda line: b""), "was cut"),
        (change(-1, lambda line: line.replace(b"stop", b"rest")), "not the line that the head"),
        (rewrite, "not the line that the head"),
        (lambda path: path.write_bytes(b""), "was cut"),
        (lambda path: path.unlink(), "was cut"),
        (lambda path: (path.parent / "head").write_bytes(b"\0" * 8192), "damaged or forged"),
        (lambda path: (path.parent / "key").write_text("0" * 64), "damaged or forged"),
        (lambda path: (path.parent / "key").unlink(), "'key' is lost"),
    ],
)
def test_the_first_broken_line_is_named(tmp_path, damage, told):
    write(tmp_path / "log", 8)
    damage(files(tmp_path / "log")[0])
    with pytest.raises(UserError, match=told):
        verify(tmp_path / "log")


@pytest.mark.parametrize("damage", [change(-1, lambda line: b""), rewrite, lambda path: path.write_bytes(b"")])
def test_a_log_that_was_cut_is_not_continued(tmp_path, damage):
    write(tmp_path / "log", 3)
    damage(files(tmp_path / "log")[0])
    with pytest.raises(UserError, match="cut or changed"):
        AuditLog(tmp_path / "log", 4096)


def test_a_torn_line_is_cut_off(tmp_path):
    write(tmp_path / "log", 3)
    with files(tmp_path / "log")[0].open("ab") as file:
        file.write(b'{"n":6,"at":"20')
    assert verify(tmp_path / "log")[0].number == 5
    write(tmp_path / "log", 1)
    assert verify(tmp_path / "log")[0].number == 8


def _killed(folder, started):
    log = AuditLog(folder, 4096)
    with log.running():
        number = 0
        while True:
            log.keep(event(number)).result(10)
            started.send(number)
            number += 1


def test_what_was_kept_survives_a_kill(tmp_path):
    context = multiprocessing.get_context("fork")
    for _ in range(5):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_killed, args=(tmp_path / "log", there))
        process.start()
        there.close()
        kept = -1
        end = time.monotonic() + 0.3
        while time.monotonic() < end or kept < 0:
            kept = here.recv()
        process.kill()
        process.join()
        while here.poll():
            try:
                kept = here.recv()
            except EOFError:
                break
        verify(tmp_path / "log")
        assert f"r{kept}" in [entry["request"] for entry in lines(tmp_path / "log")[-3:]]


def test_two_services_do_not_write_one_log(tmp_path):
    log = AuditLog(tmp_path / "log", 4096)
    with log.running(), pytest.raises(UserError, match="another process"):
        AuditLog(tmp_path / "log", 4096)


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "letter.txt").write_text("x")
    with pytest.raises(UserError, match="not an audit log"):
        AuditLog(tmp_path / "log", 4096)
    with pytest.raises(UserError, match="cannot be used"):
        AuditLog(tmp_path / "log" / "letter.txt" / "log", 4096)


def test_pages(tmp_path):
    write(tmp_path / "log", 40, max_bytes=4096)
    place, found = Place(), []
    while True:
        some, place = page(tmp_path / "log", place, 7)
        found += some
        if not some:
            break
        assert len(some) <= 7
    assert [entry["n"] for entry in found] == list(range(1, 43))
    for wrong in (Place(1, 3), Place(2, 10**9), Place(1, 10**18 - 1)):
        with pytest.raises(ValueError, match="no line"):
            page(tmp_path / "log", wrong, 7)


def admitted(log):
    try:
        log.admit()
    except ApiError as error:
        return (error.status, error.code) != (503, "audit_unavailable")
    return True


def test_a_full_disk_refuses_what_is_new_and_keeps_what_is_under_way(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SPARE_BYTES", 2**16)
    with small_disk(tmp_path / "disk") as disk:
        log = AuditLog(disk / "log", 2**20)
        with log.running():
            log.admit()
            with (disk / "ballast").open("wb", buffering=0) as ballast:
                try:
                    while True:
                        ballast.write(bytes(4096))
                except OSError:
                    pass
            number = 0
            while admitted(log):
                log.keep(event(number)).result(10)  # whatever was let in is kept
                number += 1
                assert number < 1000
            assert number > 0
            log.note(event(number))
            (disk / "ballast").unlink()
            end = time.monotonic() + 5
            while not admitted(log):
                assert time.monotonic() < end
                time.sleep(0.05)
            log.keep(event(number + 1)).result(10)
        verify(disk / "log")
        requests = [entry["request"] for entry in lines(disk / "log") if entry["do"] == "POST /x"]
        assert requests == [f"r{n}" for n in range(number + 2)]


def test_after_a_failed_flush_nothing_is_done_any_more(tmp_path, monkeypatch):
    """Nobody can know then what is on the disk (fsync reports a lost page once)."""
    log = AuditLog(tmp_path / "log", 4096)

    def fails(file):
        raise OSError(5, "Input/output error")

    with log.running():
        log.keep(event()).result(10)
        with monkeypatch.context() as patched:
            patched.setattr("os.fdatasync", fails)
            with pytest.raises(OSError, match="Input/output"):
                log.keep(event()).result(10)
        time.sleep(0.6)
        assert not admitted(log)


@pytest.mark.parametrize(
    "away",
    [
        lambda path: path.rename(path.parent.parent / "elsewhere"),
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-40]),
        lambda path: path.parent.rename(path.parent.parent / "elsewhere"),
        lambda path: path.write_bytes(shutil.move(path, path.with_name("old")).read_bytes()),
    ],
    ids=["moved", "removed", "truncated", "cut", "folder", "copied"],
)
def test_a_file_that_is_not_there_any_more_takes_no_change(tmp_path, caplog, away):
    log = AuditLog(tmp_path / "log", 2**20)
    with log.running():
        log.keep(event()).result(10)
        away(files(tmp_path / "log")[0])
        with pytest.raises(OSError, match="000001"):
            log.keep(event(1)).result(10)
        time.sleep(0.6)
        assert not admitted(log)
    assert ["cannot be written" in record.message for record in caplog.records] == [True]  # once


def test_a_file_that_is_moved_back_is_continued(tmp_path):
    log, path = AuditLog(tmp_path / "log", 2**20), tmp_path / "log" / "000001.jsonl"
    with log.running():
        log.keep(event()).result(10)
        path.rename(tmp_path / "elsewhere")
        end = time.monotonic() + 5
        while admitted(log):  # found out without a change
            assert time.monotonic() < end
        log.note(event(1))
        (tmp_path / "elsewhere").rename(path)
        while not admitted(log):
            assert time.monotonic() < end
        log.keep(event(2)).result(10)
    assert verify(tmp_path / "log")[0].number == 5
