"""Which evaluation is the best, by metrics of which more or less is better, also after a resume."""

from pathlib import Path

import pytest

from tests.trainer.checkpoint.test_write import write
from trainer.checkpoint import Best, Shelf
from trainer.checkpoint.keep import BEST, mark_best, prune
from trainer.distributed import Group
from trainer.errors import UserError
from trainer.storage import Folder

GREATER = {"val/rank1": True, "val/fnir": False}


def test_more_is_better_or_less() -> None:
    rank1, fnir = Best("val/rank1", GREATER), Best("val/fnir", GREATER)
    course = [0.5, 0.7, 0.6, float("nan"), 0.7, 0.8]
    assert [rank1({"val/rank1": value}) for value in course] == [True, True, False, False, False, True]
    assert [fnir({"val/fnir": value}) for value in course] == [True, False, False, False, False, False]
    assert not fnir({"val/rank1": 0.1})  # it could not be measured this time
    assert not Best(None, GREATER)({"val/rank1": 1.0})


def test_what_is_not_measured_is_named() -> None:
    with pytest.raises(UserError, match=r"run\.keep_best=val/acc is not measured in this run; name one of val/fnir,"):
        Best("val/acc", GREATER)
    with pytest.raises(UserError, match=r"not measured in this run; set run\.eval_every and data\.val_split, or leave"):
        Best("val/rank1", {})


def test_the_best_stays_until_there_is_a_better_one(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for step in range(10, 60, 10):
        write(tmp_path, step, keep=1)
        if step in (20, 40):
            mark_best(folder, step, "val/fnir", 0.5 / step)
            assert Shelf.of(folder).best() == (step, {"val/fnir": 0.5 / step})
            assert len(list(tmp_path.glob(f"*/{BEST}"))) == 1
    assert Shelf.of(folder).whole == [10, 40, 50]  # 10 will be trusted next
    prune(folder, 1, 50)
    assert Shelf.of(folder).whole == [10, 40, 50]


def test_a_resumed_run_compares_with_the_best_before_it(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for step in (10, 20):
        write(tmp_path, step)
    mark_best(folder, 20, "val/fnir", 0.25)
    again, earlier, other = (Best("val/fnir", GREATER), Best("val/fnir", GREATER), Best("val/rank1", GREATER))
    again.resume(folder, 20, Group())
    earlier.resume(folder, 10, Group())  # the best is of a course that was left
    other.resume(folder, 20, Group())
    assert not again({"val/fnir": 0.25})
    assert again({"val/fnir": 0.2})
    assert earlier({"val/fnir": 0.9})
    assert other({"val/rank1": 0.0})
    (tmp_path / "step-00000020" / BEST).write_text("?")  # somebody has edited it
    again.resume(folder, 20, Group())
    write(tmp_path, 30)
