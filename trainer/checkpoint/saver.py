"""Checkpoints written behind the training's back.

Training waits while a rank copies its share of the state into host memory of its own, which is used again by the next
checkpoint: as many bytes as the rank writes, its class rows with their moments and 1/world_size of the backbone's
state. On a GPU that memory is pinned. A thread then hashes and writes it, agrees with the other ranks' threads over a
group that nobody else uses, and commits.

How that ended has to be known in the same step on every rank, or one would stop while the others wait for it. While a
checkpoint is under way, each `look` therefore takes one all-reduce of 4 bytes, which is waited for in the next one.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.checkpoint.files import CheckpointManifest, in_parts
from trainer.checkpoint.keep import mark_best
from trainer.checkpoint.together import on_all
from trainer.checkpoint.write import save
from trainer.distributed import Group
from trainer.errors import UserError
from trainer.storage import Folder

_LONGEST = timedelta(hours=12)  # that a rank waits for the others to write their part


class _Job:
    """A piece of work in a thread of its own."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.error: BaseException | None = None
        self._work = work
        self.thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001  it is raised where the training can see it
            self.error = error

    @property
    def done(self) -> bool:
        """On this rank; a fault of the program, or of the network, is raised at once: the others cannot know of it."""
        if self.error is not None and not isinstance(self.error, UserError):
            raise self.error
        return not self.thread.is_alive()


class Saver:
    """One for a run, on every rank. At most one checkpoint is under way: the next one waits for it.

    All calls but `close` are collectives; what a checkpoint in the background ends with is raised by the next of them.

    Args:
        folder: of the run's checkpoints, the same on every rank.
        keep: as for `save`.

    Raises (each method):
        Diverged, UserError: as `save`, on every rank in the same step.
    """

    def __init__(self, folder: Folder, keep: int, group: Group) -> None:
        self.folder, self._keep = folder, keep
        self._group, self._behind = _of_texts(group), _alone(group)
        self._copies: dict[tuple[str, str], Tensor] = {}
        self._job: _Job | None = None
        self._next: list[Callable[[], None]] = []
        self._flag: tuple[Tensor, dist.Work | None] | None = None

    def save(
        self,
        manifest: CheckpointManifest,
        files: Mapping[str, Mapping[str, Tensor]],
        shared: Iterator[tuple[str, Tensor]],
    ) -> None:
        """Copy the state; it may change when this returns.

        Args:
            files: of this rank, as for `save`, wherever its tensors are.
            shared: names and tensors of the backbone, the same on every rank; each rank writes a part of them.
        """
        self.finish()
        copies: dict[str, dict[str, Tensor]] = {}
        for name, tensors in files.items():
            copies[name] = {key: self._copy(name, key, tensor) for key, tensor in tensors.items()}
        parts = set()
        for number, name, key, tensor in in_parts("backbone", shared):
            parts.add(name)
            if number % self._group.size == self._group.rank:
                copies.setdefault(name, {})[key] = self._copy(name, key, tensor)
        if any(tensor.is_pinned() for tensor in self._copies.values()):
            torch.cuda.synchronize()
        self._start(lambda: save(self.folder, manifest, copies, self._keep, self._behind, parts))

    def mark_best(self, step: int, metric: str, value: float) -> None:
        """Mark the checkpoint of `step`, given to `save` before, as the best one, when it is written."""

        def mark() -> None:
            first = self._behind.rank == 0
            on_all(self._behind, self.folder, lambda: mark_best(self.folder, step, metric, value) if first else None)

        self._next.append(mark)
        if self._job is None:
            self._go_on()

    def look(self) -> None:
        """After every step."""
        if self._job is None:
            return
        done = self._job.done
        if self._flag is not None:
            flag, work = self._flag
            if work is not None:
                work.wait()
            self._flag = None
            if flag:
                self._settle()
                return
        flag = torch.tensor(int(done), dtype=torch.int32)
        alone = self._group.size == 1
        work = None if alone else dist.all_reduce(flag, dist.ReduceOp.MIN, group=self._group.handle, async_op=True)
        self._flag = flag, work

    def finish(self) -> None:
        """Wait for what is under way."""
        while self._job is not None:
            if self._flag is not None and self._flag[1] is not None:
                self._flag[1].wait()
            self._flag = None
            self._job.thread.join()
            assert self._job.done
            self._group.barrier()  # so that all raise
            self._settle()

    def close(self, patience_s: float = 10.0) -> None:
        """Not a collective: when a rank has failed, leave it so long to the thread to end what it does."""
        if self._job is not None:
            self._job.thread.join(patience_s)
            if self._job.thread.is_alive():
                return
        for group in {self._group.handle, self._behind.handle} - {dist.group.WORLD, None}:
            with suppress(RuntimeError):
                dist.destroy_process_group(group)

    def _copy(self, name: str, key: str, tensor: Tensor) -> Tensor:
        own = self._copies.get((name, key))
        if own is None or own.shape != tensor.shape or own.dtype != tensor.dtype:
            own = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._copies[name, key] = own
        return own.copy_(tensor.detach(), non_blocking=True)

    def _start(self, work: Callable[[], None]) -> None:
        self._job, self._flag = _Job(work), None

    def _settle(self) -> None:
        """The work has ended on all ranks."""
        assert self._job is not None
        (error, self._job) = self._job.error, None
        if error is not None:
            self._next.clear()
            raise error
        self._go_on()

    def _go_on(self) -> None:
        if self._next:
            self._start(self._next.pop(0))


def _alone(group: Group) -> Group:
    """The same ranks, with messages of their own."""
    if group.size == 1:
        return Group()
    return Group(group.rank, group.size, dist.new_group(backend="gloo", timeout=_LONGEST))


def _of_texts(group: Group) -> Group:
    """The same ranks, with messages between host memories."""
    if group.size == 1 or dist.get_backend(group.handle) == "gloo":
        return group
    return _alone(group)
