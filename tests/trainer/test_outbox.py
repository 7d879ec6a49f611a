"""The queue on disk, and who owns it."""

from pathlib import Path

import pytest

from trainer.outbox import Outbox


def test_who_opens_a_folder_takes_it_over(tmp_path: Path) -> None:
    first = Outbox(tmp_path, pytest.fail)
    for number in range(3):
        first.put({"kind": "x", "number": number})
    first.taken(1)
    second = Outbox(tmp_path, pytest.fail)
    assert second.head(9) == [{"kind": "x", "number": 1}, {"kind": "x", "number": 2}]
    assert (first.mine(), second.mine()) == (False, True)
    first.note(run_id="first's")
    second.close()
    first.close()
    third = Outbox(tmp_path, pytest.fail)
    assert (third.state.run_id, len(third)) == ("", 2)
    third.close()


def test_what_was_put_and_not_taken_is_there_again(tmp_path: Path) -> None:
    box = Outbox(tmp_path, pytest.fail)
    for number in range(5):
        box.put({"number": number})
    box.taken(2)
    box.note(run_id="r", ended=False)
    del box  # as a killed process leaves it
    again = Outbox(tmp_path, pytest.fail)
    assert [entry["number"] for entry in again.head(9)] == [2, 3, 4]
    assert (again.state.run_id, again.state.ended) == ("r", False)
    again.taken(3)
    again.close()
    assert (tmp_path / "queue.jsonl").read_bytes() == b""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["queue.jsonl", "state.json"]
