"""Prometheus metrics of one service. Labels have few values: routes by template, never subjects or addresses."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from serving.gallery import Gallery

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
TEXT_KEPT_S = 0.1  # writing takes some milliseconds of the event loop, and any number of clients may ask
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
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
        self.embedding = Histogram(
            "hypersphere_embed_seconds", "Time to embed the images of a request", buckets=SECONDS, registry=own
        )
        self.images = Counter("hypersphere_embedded_images", "Images embedded", registry=own)
        self._searching = Histogram(
            "hypersphere_search_seconds", "Time of a pass over the gallery", buckets=SECONDS, registry=own
        )
        self._batches = Histogram("hypersphere_search_batch", "Searches of one pass", buckets=BATCHES, registry=own)
        self.decisions = Counter("hypersphere_decisions", "Decisions taken", ["operation", "decision"], registry=own)
        self.scores = Histogram(
            "hypersphere_best_score", "Best score of a search; its drift shows", buckets=SCORES, registry=own
        )
        self._subjects = Gauge("hypersphere_gallery_subjects", "Enrolled subjects", ["collection"], registry=own)
        self._samples = Gauge("hypersphere_gallery_samples", "Enrolled samples", ["collection"], registry=own)
        self._models = Gauge(
            "hypersphere_model_info", "The model of a collection", ["collection", "model_id"], registry=own
        )

    def opened(self, collection: str, gallery: Gallery) -> None:
        """From now on the collection's size is told."""
        self._subjects.labels(collection).set_function(lambda: gallery.size)
        self._samples.labels(collection).set_function(lambda: gallery.samples)
        self._models.labels(collection, gallery.model_id).set(1)

    def dropped(self, collection: str) -> None:
        for gauge in (self._subjects, self._samples, self._models):
            gauge.remove_by_labels({"collection": collection})

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        self._requests.labels(route, method if method in METHODS else "other", str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def searched(self, probes: int, seconds: float) -> None:
        """A pass over the gallery for so many searches."""
        self._searching.observe(seconds)
        self._batches.observe(probes)

    def text(self) -> bytes:
        """The exposition format that Prometheus scrapes, written anew ten times a second at most."""
        now = time.monotonic()
        if now - self._written >= TEXT_KEPT_S:
            self._text, self._written = generate_latest(self._registry), now
        return self._text
