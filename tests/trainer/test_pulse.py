"""What a process says of itself."""

import threading

from trainer.pulse import PULSE as OWN
from trainer.pulse import Pulse, collective


class Messages:
    @collective
    def all_gather(self, seen: list[str]) -> int:
        seen.append(str(OWN))
        return 7


def test_what_is_done_is_said() -> None:
    pulse = Pulse()
    assert str(pulse) == "step 0, starting"
    pulse.at("forward", 3)
    pulse.collective = "all_gather"
    assert (str(pulse), pulse.moves) == ("step 3, forward, waiting in all_gather", 1)


def test_a_collective_is_named_while_it_runs_in_the_thread_that_trains() -> None:
    seen: list[str] = []
    OWN.at("backward", 4)
    moves = OWN.moves
    assert Messages().all_gather(seen) == 7
    other = threading.Thread(target=Messages().all_gather, args=[seen])
    other.start()
    other.join()
    assert seen == ["step 4, backward, waiting in all_gather", "step 4, backward"]
    assert (OWN.collective, OWN.moves > moves + 2) == ("", True)
