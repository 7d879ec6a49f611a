"""What is asked for in one step and looked at in a later one, so that neither the host nor a GPU waits for it."""

import math

import torch

from trainer.distributed import Group
from trainer.errors import Diverged
from trainer.pulse import Wishes

_EVERY = 4  # steps


class _Late:
    """Numbers asked for now and read later, so that a GPU need not be waited for."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values, self._event = values, None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def read(self) -> torch.Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._values


class Watch:
    """Looks at the loss of every step when the next one has been sent to the device.

    Always one step late, never when it happens to be ready: all ranks then find a bad loss in the same step.
    """

    def __init__(self) -> None:
        self._loss, self._step = _Late(torch.zeros(())), 0

    def __call__(self, loss: torch.Tensor, step: int) -> None:
        """Look at the loss given last, and take this one."""
        self.look()
        self._step, self._loss = step, _Late(loss)

    def look(self) -> None:
        """Wait for the loss given last.

        Raises:
            Diverged: it is not finite.
        """
        if not math.isfinite(value := float(self._loss.read())):
            raise Diverged(f"the run has diverged: the loss at step {self._step} is {value}")


class Agreement:
    """What any rank was asked for, found by all of them in the same step.

    One message of two bytes a rank every few steps, read when the next one is sent.
    """

    def __init__(self, group: Group, device: torch.device) -> None:
        self._group, self._device = group, device
        self._asked: _Late | None = None

    def __call__(self, step: int, wishes: Wishes) -> tuple[bool, bool]:
        """Whether to save, and whether to stop. A collective."""
        if step % _EVERY:
            return False, False
        before = self._asked
        own = torch.tensor([[wishes.save, wishes.stop]], dtype=torch.uint8, device=self._device)
        self._asked = _Late(self._group.all_gather(own))
        if before is None:
            return False, False
        save, stop = map(bool, before.read().amax(0).tolist())
        if save:  # who learned of it later has asked again just now
            self._asked = None
        return save, stop
