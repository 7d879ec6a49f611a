"""Work of different requests, done together.

Nothing waits for company: a batch is whatever came while the one before it was being worked on. So a single client is
answered at once, and many clients share one pass over the gallery.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Closed(RuntimeError):
    """The batcher has been closed before it came to this item."""


class Batcher(Generic[Item, Result]):
    """One thread that takes all that waits and works on it in one call.

    Args:
        work: items to as many results, in their order; what it raises is raised for each of them.
        most: items of one call.
    """

    def __init__(self, work: Callable[[Sequence[Item]], Sequence[Result]], most: int = 64) -> None:
        self._work, self._most = work, most
        self._waiting: queue.SimpleQueue[tuple[Item, Future[Result]] | None] = queue.SimpleQueue()
        self._lock, self._closed = threading.Lock(), False
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Items that nobody works on yet."""
        return self._waiting.qsize()

    def submit(self, item: Item) -> Future[Result]:
        """The result to come.

        Raises:
            Closed: there will be none.
        """
        result: Future[Result] = Future()
        with self._lock:  # what is put before the end is worked on, and nothing comes after it
            if self._closed:
                raise Closed("the service is being stopped")
            self._waiting.put((item, result))
        return result

    def close(self) -> None:
        """Work on what waits, and end. Idempotent."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch, ending = [first], False
            while len(batch) < self._most and not ending:
                try:
                    found = self._waiting.get_nowait()
                except queue.Empty:
                    break
                ending = found is None
                if found is not None:
                    batch.append(found)
            self._answer([one for one in batch if one[1].set_running_or_notify_cancel()])
            if ending:
                return

    def _answer(self, batch: Sequence[tuple[Item, Future[Result]]]) -> None:
        if not batch:
            return
        try:
            results = self._work([item for item, _ in batch])
            for (_, future), result in zip(batch, results, strict=True):
                future.set_result(result)
        except BaseException as error:  # noqa: BLE001 (whatever it is, somebody waits for it)
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
