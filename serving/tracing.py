"""OpenTelemetry traces, where the operator names a collector: the only file that knows OpenTelemetry.

A request is a span, and goes on with the trace that its `traceparent` header names (W3C Trace Context); the parts of
its work are spans within. Spans carry routes, statuses and request ids: neither subjects nor paths.
"""

import contextlib
import importlib.metadata
from collections.abc import Iterator
from typing import Any

from trainer.errors import UserError

_QUIET = contextlib.nullcontext()
_tracer: Any = None  # None: nobody collects


def start(url: str) -> "contextlib.AbstractContextManager[None]":
    """Send spans to a collector at `url` until the block ends; those that wait are sent at its end.

    Raises:
        UserError: this is no http address, or the extra `tracing` is not installed.
    """
    if not url.startswith(("http://", "https://")):
        raise UserError(f"traces cannot be sent to '{url}'; give an address like http://collector:4318/v1/traces")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise UserError("traces need OpenTelemetry; install it with pip install 'hypersphere[tracing]'") from error
    version = importlib.metadata.version("hypersphere")
    provider = TracerProvider(resource=Resource.create({"service.name": "hypersphere", "service.version": version}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
    return _collecting(provider)


@contextlib.contextmanager
def _collecting(provider: Any) -> Iterator[None]:
    global _tracer
    _tracer = provider.get_tracer("hypersphere")
    try:
        yield
    finally:
        _tracer = None
        provider.shutdown()


def span(name: str) -> "contextlib.AbstractContextManager[Any]":
    """A span within the one of this thread or task; costs nothing where nobody collects."""
    return _QUIET if _tracer is None else _tracer.start_as_current_span(name)


@contextlib.contextmanager
def request(method: str, headers: dict[bytes, bytes], request_id: str) -> Iterator[Any]:
    """The span of a request; None where nobody collects."""
    if _tracer is None:
        yield None
        return
    from opentelemetry.propagate import extract
    from opentelemetry.trace import SpanKind

    sent = {
        name: headers[name.encode()].decode("latin-1")
        for name in ("traceparent", "tracestate")
        if name.encode() in headers
    }
    kind, facts = SpanKind.SERVER, {"http.request.method": method, "hypersphere.request_id": request_id}
    with _tracer.start_as_current_span(method, context=extract(sent), kind=kind, attributes=facts) as found:
        yield found


def answered(found: Any, method: str, route: str, status: int) -> None:
    """What became of a request."""
    if found is not None:
        found.update_name(f"{method} {route}")
        found.set_attributes({"http.route": route, "http.response.status_code": status})
