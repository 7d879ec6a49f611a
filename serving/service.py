"""What the process holds: settings, embedders, collections, metrics; and what loads the galleries and watches them."""

import logging
import threading
import time
from collections.abc import Callable

from serving.access.scopes import DEFAULT_COLLECTION
from serving.answering.collections import Collections
from serving.answering.jobs import Jobs
from serving.errors import ApiError, stopping
from serving.gallery import Gallery
from serving.images.models import Model
from serving.search.projection import Stopped
from serving.settings import Settings
from serving.storage.changes import StoreError
from serving.telemetry.metrics import Metrics
from serving.wire import operations
from trainer.errors import UserError

log = logging.getLogger("hypersphere.serving")
WATCH_EVERY_S = 1.0
WATCH_LATE_S = 10.0  # a store that has not answered for so long is not ready


class Service:
    """The opened embedders and collections, and the metrics of what is done with them."""

    def __init__(self, settings: Settings) -> None:
        """Open embedders and stores. A gallery answers once `keep` has loaded it.

        Raises:
            UserError: one of them cannot be used, they belong to different models, or there is no threshold.
        """
        self.settings = settings
        self.metrics = Metrics()
        self.models = [Model(folder, settings, self.metrics) for folder in settings.embedder]
        try:
            self.collections = Collections(settings, self.models, self.metrics)
        except BaseException:
            for model in self.models:
                model.close()
            raise
        self.jobs = Jobs(settings.idempotency_hours)
        self.collections.on_drop = self.jobs.forget
        self._closing = threading.Event()
        self._watched, self._failed = time.monotonic(), set[str]()  # collections of which the log tells
        self.draining = False  # /readyz sends new clients elsewhere

    def close(self) -> None:
        """Stop what is under way, at once where it can be, and close the stores. Idempotent."""
        self.stop()
        self.jobs.close()
        self.collections.close()

    def stop(self) -> None:
        """End loading and decoding; requests that wait for them are refused."""
        self._closing.set()
        for model in self.models:
            model.close()

    def keep(self, on_fault: Callable[[UserError], object]) -> None:
        """Check the stores and build the indexes, then watch the stores until `stop`. Requests to a gallery are refused
        until it is loaded. A damaged collection among several is left out; a damaged store alone ends the service."""
        for collection in self.collections.all():
            try:
                collection.gallery.load(stopping=self._closing.is_set)
            except Stopped:
                return
            except UserError as error:
                if self.collections.folder is None:
                    on_fault(error)
                    return
                log.error("the collection '%s' is not served: %s", collection.name, error)
                self._failed.add(collection.name)
        self.watch()
        while not self._closing.wait(WATCH_EVERY_S):
            self.watch()

    def watch(self) -> None:
        """Ask the stores whether they answer and are in step with their indexes; `ready` tells the outcome, and the log
        when a collection begins to fail."""
        for collection in self.collections.all():
            try:
                collection.gallery.check()
            except StoreError as error:
                if not any(one is collection for one in self.collections.all()):
                    continue  # it was dropped meanwhile
                if collection.name not in self._failed:
                    log.error("the collection '%s' refuses changes: %s", collection.name, error)
                self._failed.add(collection.name)
            else:
                self._failed.discard(collection.name)
        self._watched = time.monotonic()

    def ready(self, trusted: bool, request_id: str) -> operations.ReadyAnswer:
        """Whether the service can answer, from memory alone; counts only for those who may know them.

        Raises:
            ApiError: 503 while a gallery loads, while the service drains, and when the store, or each of several, has
                failed.
        """
        if self.draining:
            raise stopping()
        galleries = {collection.name: collection.gallery for collection in self.collections.all()}
        status = {name: gallery.status() for name, gallery in galleries.items()}
        states = list(status.values())
        if any(state.state == "loading" for state in states):
            raise loading(sum(state.done for state in states), sum(state.total for state in states))
        faults = {name: state.reason for name, state in status.items() if state.state == "failed"}
        # One of several keeps the others from nobody.
        fault = next(iter(faults.values())) if faults and len(faults) == len(states) else ""
        if fault or time.monotonic() - self._watched > WATCH_LATE_S:
            told = fault if trusted and fault else "the store does not answer"
            raise ApiError(503, "store_unavailable", f"{told}; the log says more", headers={"retry-after": "5"})
        if not trusted:
            return operations.ReadyAnswer(request_id=request_id)
        gallery: Gallery | None = galleries.get(DEFAULT_COLLECTION)
        return operations.ReadyAnswer(
            gallery_size=gallery.size if gallery else None,
            samples=gallery.samples if gallery else None,
            revision=gallery.revision if gallery else None,
            model_id=gallery.model_id if gallery else None,
            collections=len(galleries),
            faults=faults or None,
            request_id=request_id,
        )


def loading(done: int, total: int) -> ApiError:
    """503 while a gallery is read; the progress is a share, since the numbers are not everybody's to know."""
    share = round(done / total, 3) if total else 0.0
    message = f"the gallery is loading, {share:.0%} done; ask /readyz, and try again"
    return ApiError(503, "loading", message, {"progress": share}, {"retry-after": "1"})
