"""Which rank is said to hold up the others."""

from dataclasses import replace

import pytest

from trainer.watchdog import Beat, Watchdog


class Ranks:
    """Two ranks, a clock, and who is watched."""

    def __init__(self, stall_s: float = 10) -> None:
        self.now = 0.0
        self.watchdog = Watchdog(stall_s, lambda: self.now)
        self.beats = [Beat(f"first-{rank}", rank, f"node{rank}", 5, False, "step 5, forward", 1) for rank in (0, 1)]
        for beat in self.beats:
            self.watchdog.join(beat)

    def say(self, rank: int, *, moves: int, waits: bool = False, doing: str = "step 5, forward", step: int = 5) -> None:
        beat = replace(self.beats[rank], step=step, waits=waits, doing=doing, moves=moves)
        self.watchdog.beat(beat)


def test_a_rank_that_says_nothing_is_named() -> None:
    ranks = Ranks()
    for second in range(1, 11):
        ranks.now = second
        ranks.say(0, moves=2, waits=True, doing="step 6, forward, waiting in all_gather")
        assert ranks.watchdog.stalled() == ([], "")
    ranks.now = 10.5
    assert ranks.watchdog.stalled() == (
        [1],
        "rank 1 on node1 (step 5, forward) gave no sign of life for 10 s; "
        "rank 0 (step 6, forward, waiting in all_gather)",
    )
    ranks.now = 30
    assert ranks.watchdog.stalled() == ([], "")  # it is said once


@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        ((6, True), (5, False), [1]),
        ((5, True), (5, False), [1]),
        ((5, True), (5, True), [0, 1]),
        ((5, False), (6, True), [0]),
    ],
)
def test_of_ranks_that_do_not_move_the_one_behind_is_named(
    first: tuple[int, bool], second: tuple[int, bool], named: list[int]
) -> None:
    ranks = Ranks()
    for now in range(12):
        ranks.now = now
        for rank, (step, waits) in enumerate((first, second)):
            ranks.say(rank, moves=2, step=step, waits=waits)
        found, sentence = ranks.watchdog.stalled()
        assert found == (named if now == 11 else [])
    assert "did not move for 10 s" in sentence


def test_one_that_moves_while_the_others_wait_is_no_stall() -> None:
    ranks = Ranks()
    for now in range(100):
        ranks.now = now
        ranks.say(0, moves=now)
        ranks.say(1, moves=2, waits=True)
        assert ranks.watchdog.stalled() == ([], "")


def test_nothing_is_expected_of_those_that_have_ended_or_were_replaced() -> None:
    ranks = Ranks()
    ranks.watchdog.leave(ranks.beats[0])
    again = replace(ranks.beats[1], member="second-1")
    ranks.watchdog.join(again)
    for now in range(1, 30):
        ranks.now = now
        ranks.watchdog.beat(replace(again, moves=now))
        ranks.say(1, moves=7)  # of the first one, late
        assert ranks.watchdog.stalled() == ([], "")
    ranks.watchdog.leave(ranks.beats[1])  # late, too
    ranks.now = 100
    assert ranks.watchdog.stalled()[0] == [1]


def test_none_is_watched_with_0() -> None:
    ranks = Ranks(stall_s=0)
    ranks.now = 1e9
    assert ranks.watchdog.stalled() == ([], "")
