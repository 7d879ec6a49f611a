"""What the launching process has not noted yet, should it die."""

import math
from typing import Any

from trainer.board import Board


def record(kind: str, step: int, **values: float) -> dict[str, Any]:
    return {"kind": kind, "step": step, "values": values}


def test_a_record_counts_as_told_when_the_next_ones_are_asked_for() -> None:
    board = Board(0)
    board.put(record("step", 1, loss=3.0, norm=math.nan))
    board.put({"kind": "note", "text": "not a number of MLflow's"})
    board.put(record("metrics", 1, rank1=0.5))
    first = [record("step", 1, loss=3.0), record("metrics", 1, rank1=0.5)]
    assert board.untold() == first
    taken, _ = board.take()
    assert [one["kind"] for one in taken] == ["step", "note", "metrics"]
    assert math.isnan(taken[0]["values"]["norm"])
    board.put(record("back", 0))
    assert board.untold() == [*first, record("back", 0)]
    board.take()
    assert board.untold() == [record("back", 0)]
    board.take()
    assert board.untold() == []
