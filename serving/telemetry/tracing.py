"""OpenTelemetry traces, where the operator names a collector: the only file that knows OpenTelemetry.

A request is a span, and goes on with the trace that its `traceparent` header names (W3C Trace Context); the parts of
its work are spans within. Spans carry routes, statuses and request ids: neither subjects nor paths.
"""

import contextlib
import importlib.metadata
from collections.abc import Iterator
from typing import Any

from trainer.errors import UserError

_CONTEXT = (b"traceparent", b"tracestate")
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


class Traced:
    """ASGI middleware: each request that the Guard lets in is a span."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or _tracer is None:
            await self._app(scope, receive, send)
            return
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        sent = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in _CONTEXT}
        facts = {"http.request.method": scope["method"], "hypersphere.request_id": scope["state"]["request_id"]}
        with _tracer.start_as_current_span("request", extract(sent), SpanKind.SERVER, facts) as found:

            async def answer(message: Any) -> None:
                if message["type"] == "http.response.start":
                    found.set_attribute("http.response.status_code", message["status"])
                await send(message)

            try:
                await self._app(scope, receive, answer)
            finally:
                route = getattr(scope.get("route"), "path", "none")
                found.update_name(f"{scope['method']} {route}")
                found.set_attribute("http.route", route)
