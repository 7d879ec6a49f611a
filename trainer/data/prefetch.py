"""What the coming steps read is on its way before they come. Runs without torch.

A window of shuffled samples is fetched by whole shards, of which every part is needed; a P x K batch by the blocks in
which its samples lie, as one sample in a shard would cost all of it (measured: docs/data_remote.md).
"""

from collections.abc import Callable, Sequence

from trainer.data.split import Split
from trainer.errors import UserError

_STEPS = 8  # batches whose samples lie anywhere, fetched ahead
_SHARE = 0.9  # of the cache that is filled ahead of use, so that what is in use is never removed for it


def steps_ahead(parts: Sequence[Split], batch_size: int, window: int | None) -> int:
    """How many steps before its use a batch is fetched; 0 where nothing lies elsewhere.

    Args:
        parts: what is read, of one data set or several.
        batch_size: of all ranks together.
        window: samples of each part among which the order is shuffled; None: the samples of a batch lie anywhere.

    Raises:
        UserError: the cache is too small for the windows of a batch.
    """
    parts = [part for part in parts if not all(part.store.is_local(entry.file) for entry in part.shards)]
    if not parts or window is None:
        return _STEPS if parts else 0
    limit = parts[0].store.cache_limit
    if (need := sum(_window_bytes(part, 2 * window) for part in parts)) > limit:
        raise UserError(
            f"data.cache_bytes {limit} is less than the {need} bytes of the two windows of {window} samples that a "
            "batch can reach into; raise it, or lower data.shuffle_window"
        )
    sample = sum(entry.bytes for part in parts for entry in part.shards) / sum(part.samples for part in parts)
    shard = max(entry.samples for part in parts for entry in part.shards)
    room = int((_SHARE * limit - need / 2) / sample)  # samples that fit beside the window in use
    return max(1, min(max(window, shard), room) // batch_size)


def _window_bytes(part: Split, samples: int) -> int:
    """Of the shards in which so many samples lie that follow each other, at most."""
    sizes = sorted((entry.bytes for entry in part.shards), reverse=True)
    return sum(sizes[: -(-samples * len(sizes) // part.samples) + 1])


class Prefetch:
    """Asks for the samples of each step, `steps` steps before it comes, in later epochs too; may be called by threads.

    Args:
        steps: 0: never.
        steps_per_epoch: the number of steps of each epoch.
        want: has what a step (epoch, step) reads fetched in the background.
    """

    def __init__(self, steps: int, steps_per_epoch: int, want: Callable[[int, int], None]) -> None:
        self._steps, self._steps_per_epoch, self._want = steps, steps_per_epoch, want
        self._next = 0  # the first step that is not asked for, counted through all epochs

    def __call__(self, epoch: int, step: int) -> None:
        """This step is about to be read."""
        now = epoch * self._steps_per_epoch + step
        stop = now + 1 + self._steps
        going_on = now <= self._next <= stop + self._steps  # rather than beginning anew at some step
        first = self._next if going_on else now
        self._next = max(first, stop)
        for wanted in range(first, stop if self._steps else first):
            self._want(*divmod(wanted, self._steps_per_epoch))
