"""Prometheus metrics of one service. Labels have few values: routes by template, never subjects or addresses."""

import functools
import time
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from serving.gallery import Gallery
from serving.telemetry import logs, tracing
from serving.telemetry.drift import Drift

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
TEXT_KEPT_S = 0.1  # writing takes some milliseconds of the event loop, and any number of clients may ask
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_BY = ["collection"]
QUEUES = ("decode", "embed", "search")
BATCHES = (1, 2, 4, 8, 16, 32, 64)
SCORES = tuple(round(-0.2 + 0.05 * step, 2) for step in range(25))  # -0.2 ... 1.0


class Metrics:
    """A registry of its own, so that two services in one process do not mix."""

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        self._text, self._written = b"", -TEXT_KEPT_S
        ProcessCollector(registry=own)
        self._requests = Counter(
            "hypersphere_requests", "Requests answered", ["route", "method", "status"], registry=own
        )
        self._latency = Histogram(
            "hypersphere_request_seconds", "Time to answer", ["route"], buckets=SECONDS, registry=own
        )
        self._stages = Histogram(
            "hypersphere_stage_seconds",
            "Time of a part of the work: read, decode, detect and store a request's; embed and search a batch's",
            ["stage"],
            buckets=SECONDS,
            registry=own,
        )
        self.images = Counter("hypersphere_embedded_images", "Images embedded", registry=own)
        self.faces = Counter("hypersphere_faces", "Faces found in images and looked at", registry=own)
        self._batches = Histogram(
            "hypersphere_batch_size", "Searches or crops of one call", ["stage"], buckets=BATCHES, registry=own
        )
        waiting = Gauge("hypersphere_queue", "Requests that wait for a stage", ["stage"], registry=own)
        self._queues: dict[str, dict[str, Callable[[], int]]] = {name: {} for name in QUEUES}
        for name, queues in self._queues.items():
            waiting.labels(name).set_function(functools.partial(_sum, queues))
        self.decisions = Counter("hypersphere_decisions", "Decisions taken", ["operation", "decision"], registry=own)
        self.scores = Histogram("hypersphere_best_score", "Best score of a search", buckets=SCORES, registry=own)
        self._stability = Gauge(
            "hypersphere_drift_stability", "Strangers' scores against the calibration: PSI", _BY, registry=own
        )
        self._shift = Gauge(
            "hypersphere_drift_shift", "The same: Kolmogorov-Smirnov, below 0 if they are higher", _BY, registry=own
        )
        self._compared = Gauge("hypersphere_drift_searches", "Searches that drift rests on", _BY, registry=own)
        self._subjects = Gauge("hypersphere_gallery_subjects", "Enrolled subjects", ["collection"], registry=own)
        self._samples = Gauge("hypersphere_gallery_samples", "Enrolled samples", ["collection"], registry=own)
        self._ready = Gauge("hypersphere_collection_ready", "1 where it takes changes, 0 where not", _BY, registry=own)
        self._models = Gauge("hypersphere_model_info", "The model of a collection", [*_BY, "model_id"], registry=own)

    def opened(self, collection: str, gallery: Gallery, drift: Drift) -> None:
        """From now on the collection's size is told, its queue, and how its scores drift."""
        self._queues["search"][collection] = lambda: gallery.waiting
        self._stability.labels(collection).set_function(drift.stability)
        self._shift.labels(collection).set_function(drift.shift)
        self._compared.labels(collection).set_function(lambda: drift.searches)
        self._subjects.labels(collection).set_function(lambda: gallery.size)
        self._samples.labels(collection).set_function(lambda: gallery.samples)
        self._ready.labels(collection).set_function(lambda: gallery.status().state in ("ready", "rebuilding"))
        self._models.labels(collection, gallery.model_id).set(1)

    def dropped(self, collection: str) -> None:
        self._queues["search"].pop(collection)
        by_drift = self._stability, self._shift, self._compared
        for gauge in (self._subjects, self._samples, self._ready, self._models, *by_drift):
            gauge.remove_by_labels({"collection": collection})

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        self._requests.labels(route, method if method in METHODS else "other", str(status)).inc()
        self._latency.labels(route).observe(seconds)
        logs.answered(method, route, status, seconds)

    def searched(self, probes: int, seconds: float) -> None:
        """A pass over the gallery for so many searches."""
        self._batch("search", probes, seconds)

    def embedded(self, crops: int, seconds: float) -> None:
        """A call of the model."""
        self._batch("embed", crops, seconds)

    def detected(self, seconds: float, faces: int) -> None:
        """An image whose faces were looked for."""
        self._stages.labels("detect").observe(seconds)
        self.faces.inc(faces)

    def _batch(self, stage: str, size: int, seconds: float) -> None:
        self._stages.labels(stage).observe(seconds)
        self._batches.labels(stage).observe(size)

    def stage(self, name: str) -> "_Stage":
        """Times a part of a request's work, as a context."""
        return _Stage(name, self._stages.labels(name))

    def queue(self, stage: str, model_id: str, waiting: Callable[[], int]) -> None:
        """From now on it is told how many requests wait for a stage of a model."""
        self._queues[stage][model_id] = waiting

    def text(self) -> bytes:
        """The exposition format that Prometheus scrapes, written anew ten times a second at most."""
        now = time.monotonic()
        if now - self._written >= TEXT_KEPT_S:
            self._text, self._written = generate_latest(self._registry), now
        return self._text


class _Stage:
    """A class, since a generator would take a microsecond more of each request."""

    __slots__ = ("_histogram", "_span", "_start")

    def __init__(self, name: str, histogram: Histogram) -> None:
        self._histogram, self._span = histogram, tracing.span(name)

    def __enter__(self) -> None:
        self._span.__enter__()
        self._start = time.perf_counter()

    def __exit__(self, *raised: Any) -> None:
        self._histogram.observe(time.perf_counter() - self._start)
        self._span.__exit__(*raised)


def _sum(queues: dict[str, Callable[[], int]]) -> int:
    return sum(waiting() for waiting in list(queues.values()))
