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
MOST_UNDER_WAY, MOST_KEPT = 8, 100
NICER = 10  # than the threads that answer


@dataclass
class Job:
    """A search for duplicates. `done` of `total` samples have been searched for."""

    collection: str
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
            told = f"no job '{job_id[:64]}' is known; the last {MOST_KEPT} are kept, until the service ends"
            raise ApiError(404, "no_job", told)
        return found

    def start(self, collection: Collection, threshold: float | None, most: int, key: IdempotencyKey | None) -> Job:
        """Look for duplicates in a collection.

        Args:
            threshold: of the score; None: that of an identification in a gallery of this size.

        Raises:
            ApiError: too many jobs are under way.
        """
        gallery = collection.gallery
        if threshold is None:
            threshold = gallery.identify_rule.at(gallery.size).value
        with self._lock:
            if found := self._jobs.get(self._once.get(key) or ""):
                return found
            under_way = sum(job.state in ("waiting", "running") for job in self._jobs.values())
            if under_way >= MOST_UNDER_WAY:
                told = f"{under_way} jobs are under way, as many as are allowed; wait for one, or cancel it"
                raise ApiError(429, "too_many_jobs", told, headers={"retry-after": "10"})
            job = Job(collection.name, threshold, most)
            finished = [name for name, one in self._jobs.items() if one.state not in ("waiting", "running")]
            for name in finished[: max(0, len(self._jobs) + 1 - MOST_KEPT)]:
                del self._jobs[name]
            self._jobs[job.job_id] = job
            self._once.put(key, job.job_id)
            self._pool.submit(self._run, job, collection)
        return job

    def cancel(self, job: Job) -> None:
        """End a job; one that has ended stays as it is."""
        job.cancel.set()
        if job.state == "waiting":
            job.state = "cancelled"

    def _run(self, job: Job, collection: Collection) -> None:
        def progress(done: int, total: int) -> None:
            if job.cancel.is_set():
                raise Cancelled
            job.done, job.total = done, total

        if job.cancel.is_set():
            job.state = "cancelled"
            return
        job.state, start = "running", time.monotonic()
        try:
            duplicates(collection.gallery, job.threshold, job.most, job.pairs, progress)
            job.state = "done"
        except Cancelled:
            job.state = "cancelled"
        except (StoreError, UserError, GalleryLoading, MemoryError) as error:
            job.error, job.state = str(error) or "there is not enough memory", "failed"
        except Exception as error:
            job.error, job.state = "the service failed; its log has more", "failed"
            log.exception("job %s failed: %s", job.job_id, type(error).__name__)
        log.info("job %s: %s after %.1f s", job.job_id, job.state, time.monotonic() - start)


def _step_back() -> None:
    """Let this thread have the cores only when the others leave them. Linux knows a priority for each thread."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + NICER)
