"""Long work on a collection, one job after another at low priority, with progress; kept until the service ends."""

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from serving.answering.collections import Collection
from serving.answering.duplicates import Pairs, duplicates
from serving.answering.once import Once
from serving.errors import ApiError
from serving.search.projection import GalleryLoading
from serving.storage.changes import IdempotencyKey, StoreError
from trainer.errors import UserError

log = logging.getLogger("hypersphere.serving")
MOST_UNDER_WAY, MOST_KEPT = 8, 100  # of one collection
FAILED = "the service failed; its log has more"
NICER = 10  # than the threads that answer


@dataclass
class Job:
    """A search for duplicates. `done` of `total` samples have been searched for."""

    of: Collection
    threshold: float
    most: int
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    job_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    state: Literal["waiting", "running", "done", "failed", "cancelled"] = "waiting"
    done: int = 0
    total: int = 0
    pairs: Pairs = field(default_factory=Pairs)
    error: str | None = None
    cancel: threading.Event = field(default_factory=threading.Event)

    @property
    def collection(self) -> str:
        return self.of.name

    @property
    def ended(self) -> bool:
        return self.state not in ("waiting", "running")


class Cancelled(Exception):
    """Nobody wants the job's result any more."""


class Jobs:
    """The jobs of a service. Methods may be called from several threads."""

    def __init__(self, hours: float) -> None:
        """`hours`: how long an idempotency key is remembered."""
        self._jobs = dict[str, Job]()
        self._once, self._lock = Once[str](hours), threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="jobs", initializer=_step_back)

    def close(self) -> None:
        """Cancel what is under way and wait for its end. Idempotent."""
        for job in self.all():
            job.cancel.set()
        self._pool.shutdown()

    def all(self) -> list[Job]:
        """In the order in which they were asked for."""
        with self._lock:
            return list(self._jobs.values())

    def get(self, job_id: str, reaches: Callable[[str], bool] = lambda collection: True) -> Job:
        """Raises ApiError 404, as for a job on a collection that is not reached."""
        with self._lock:
            found = self._jobs.get(job_id)
        if found is None or not reaches(found.collection):
            told = f"no job '{job_id[:64]}' is known; the last {MOST_KEPT} are kept, until their collection is dropped"
            told += " or the service ends"
            raise ApiError(404, "no_job", told)
        return found

    def start(
        self, collection: Collection, threshold: float | None, most: int, key: IdempotencyKey | None
    ) -> tuple[Job, bool]:
        """Look for duplicates in a collection; and whether a request with the same key began it before.

        Args:
            threshold: of the score; None: that of an identification in a gallery of this size.

        Raises:
            ApiError: too many jobs are under way on it, or it was dropped.
        """
        gallery, name = collection.gallery, collection.name
        if threshold is None:
            threshold = gallery.identify_rule.at(gallery.size).value
        with self._lock:
            if collection.dropped.is_set():
                raise ApiError(404, "no_collection", f"the collection '{name}' was dropped")
            if found := self._jobs.get(self._once.get(name, key) or ""):
                return found, True
            its = [job for job in self._jobs.values() if job.collection == name]
            finished = [job for job in its if job.ended]
            if (under_way := len(its) - len(finished)) >= MOST_UNDER_WAY:
                told = f"{under_way} jobs are under way, as many as are allowed; wait for one, or cancel it"
                raise ApiError(429, "too_many_jobs", told, headers={"retry-after": "10"})
            for old in finished[: max(0, len(its) + 1 - MOST_KEPT)]:
                del self._jobs[old.job_id]
            job = Job(collection, threshold, most)
            self._jobs[job.job_id] = job
            self._once.put(name, key, job.job_id)
            self._pool.submit(self._run, job)
        return job, False

    def forget(self, collection: Collection) -> None:
        """End and forget the jobs of a collection that was dropped, so that none is taken for the next one's."""
        with self._lock:
            its = [job for job in self._jobs.values() if job.collection == collection.name]
            self._once.forget(collection.name)
            for job in its:
                del self._jobs[job.job_id]
        for job in its:
            self.cancel(job)

    def cancel(self, job: Job) -> None:
        """End a job; one that has ended stays as it is."""
        job.cancel.set()
        if job.state == "waiting":
            job.state = "cancelled"

    def _run(self, job: Job) -> None:
        def progress(done: int, total: int) -> None:
            if job.cancel.is_set():
                raise Cancelled
            job.done, job.total = done, total

        if job.cancel.is_set():
            job.state = "cancelled"
            return
        job.state, start = "running", time.monotonic()
        try:
            duplicates(job.of.gallery, job.threshold, job.most, job.pairs, progress)
            job.state = "done"
        except Cancelled:
            job.state = "cancelled"
        except Exception as error:
            job.error, job.state = _told(job, error), "failed"
            if job.error == FAILED:
                log.exception("job %s failed: %s", job.job_id, type(error).__name__)
        log.info("job %s: %s after %.1f s", job.job_id, job.state, time.monotonic() - start)


def _told(job: Job, error: Exception) -> str:
    """Why a job failed, for its caller."""
    if job.of.dropped.is_set():  # the store was closed
        return "the collection was dropped"
    if isinstance(error, StoreError | UserError | GalleryLoading | MemoryError):
        return str(error) or "there is not enough memory"
    return FAILED


def _step_back() -> None:
    """Let this thread have the cores only when the others leave them. Linux knows a priority for each thread."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + NICER)
