"""Which rank of a group holds up the others: told from what each rank says of itself every second.

A process that is stopped, or whose machine is gone, says nothing more. One that hangs still speaks, but does not move;
then the others do not move either, since they wait for it in a collective: the one that is furthest behind is named.
"""

from collections.abc import Callable
from dataclasses import dataclass

_SHOWN = 4  # ranks in a sentence


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rank says: who it is (`member` is another one after a restart), and its `pulse.Pulse`."""

    member: str
    rank: int
    place: str
    step: int
    waits: bool
    doing: str
    moves: int


@dataclass(slots=True)
class _Seen:
    beat: Beat
    heard: float
    moved: float


class Watchdog:
    """Takes the beats of the ranks of one group.

    Args:
        stall_s: how long a rank may be silent, or all of them without a move; 0: for ever.
        clock: in seconds.
    """

    def __init__(self, stall_s: float, clock: Callable[[], float]) -> None:
        self._stall_s, self._clock = stall_s, clock
        self._ranks: dict[int, _Seen] = {}

    def join(self, beat: Beat) -> None:
        """The first beat of a rank, in place of the one that had its number."""
        self._ranks[beat.rank] = _Seen(beat, now := self._clock(), now)

    def beat(self, beat: Beat) -> None:
        """A further one; those of a process that was replaced are not heard."""
        seen = self._ranks.get(beat.rank)
        if seen is None or seen.beat.member != beat.member:
            return
        seen.heard = self._clock()
        if beat.moves != seen.beat.moves:
            seen.moved = seen.heard
        seen.beat = beat

    def leave(self, beat: Beat) -> None:
        """The rank has ended, well or not: nobody waits for it any more."""
        if (seen := self._ranks.get(beat.rank)) is not None and seen.beat.member == beat.member:
            del self._ranks[beat.rank]

    def forget(self) -> None:
        """The group is no more."""
        self._ranks.clear()

    def stalled(self) -> tuple[list[int], str]:
        """The ranks that hold up the group, and a sentence about them; none where it moves.

        It is said once: what is done about it ends the group.
        """
        now, ranks = self._clock(), [self._ranks[rank] for rank in sorted(self._ranks)]
        if not self._stall_s or not ranks:
            return [], ""
        silent = [seen for seen in ranks if now - seen.heard > self._stall_s]
        if not silent and not all(now - seen.moved > self._stall_s for seen in ranks):
            return [], ""
        self.forget()
        held = silent or _furthest_behind(ranks)
        did = "gave no sign of life" if silent else "did not move"
        sentence = f"{_listed(held, True)} {did} for {self._stall_s:g} s"
        if others := _listed([seen for seen in ranks if seen not in held], False):
            sentence += f"; {others}"
        return [seen.beat.rank for seen in held], sentence


def _listed(ranks: list[_Seen], place: bool) -> str:
    shown = [f"rank {seen.beat.rank}{f' on {seen.beat.place}' * place} ({seen.beat.doing})" for seen in ranks[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else "")


def _furthest_behind(ranks: list[_Seen]) -> list[_Seen]:
    """Those of the lowest step that wait for nobody; where all wait, all of that step."""
    last = min(seen.beat.step for seen in ranks)
    behind = [seen for seen in ranks if seen.beat.step == last]
    return [seen for seen in behind if not seen.beat.waits] or behind
