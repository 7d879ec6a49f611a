"""What this process is doing, for whoever watches it, and what is wished of it.

There is one in a process, since there is one training; keeping it costs a microsecond.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from threading import get_ident
from typing import Concatenate, ParamSpec, TypeVar

Owner = TypeVar("Owner")
Result = TypeVar("Result")
P = ParamSpec("P")


@dataclass(slots=True)
class Pulse:
    """Attributes:
    step: the step that is being computed.
    phase: what of it, such as "backward"; said by the thread that trains.
    collective: the message to the other ranks that it waits for; "" for none.
    moves: grows with every change of these.
    """

    step: int = 0
    phase: str = "starting"
    collective: str = ""
    moves: int = 0
    thread: int = 0

    def at(self, phase: str, step: int | None = None) -> None:
        """Say what is done from now on."""
        self.phase, self.moves, self.thread = phase, self.moves + 1, get_ident()
        if step is not None:
            self.step = step

    def __str__(self) -> str:
        where = f"{self.phase}, waiting in {self.collective}" if self.collective else self.phase
        return f"step {self.step}, {where}"


PULSE = Pulse()


@dataclass(slots=True)
class Wishes:
    """What the training is to do when it has finished a step; set from another thread.

    Attributes:
        save: a checkpoint.
        stop: end with a checkpoint.
    """

    save: bool = False
    stop: bool = False


def collective(method: Callable[Concatenate[Owner, P], Result]) -> Callable[Concatenate[Owner, P], Result]:
    """A method that sends messages, said to be under way while it runs."""

    @wraps(method)
    def told(self: Owner, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        PULSE.moves += 1
        if PULSE.thread != get_ident():  # one that writes a checkpoint meanwhile
            return method(self, *args, **kwargs)
        before, PULSE.collective = PULSE.collective, method.__name__
        try:
            return method(self, *args, **kwargs)
        finally:
            PULSE.collective = before
            PULSE.moves += 1

    return told
