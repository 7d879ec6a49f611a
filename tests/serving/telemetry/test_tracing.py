"""Traces, received by a collector of the test: the real exporter over HTTP, decoded by OpenTelemetry's own messages."""

import gzip
import queue
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from serving.telemetry import tracing
from tests.serving.conftest import Server
from trainer.errors import UserError

service_pb2 = pytest.importorskip(
    "opentelemetry.proto.collector.trace.v1.trace_service_pb2", reason="the extra tracing is not installed"
)
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    def __init__(self) -> None:
        self.bodies: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.bodies.put(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1/traces"

    def spans(self) -> list[object]:
        found = []
        while not self.bodies.empty():
            message = service_pb2.ExportTraceServiceRequest.FromString(self.bodies.get())
            found += [span for one in message.resource_spans for scope in one.scope_spans for span in scope.spans]
        return found


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_a_request_is_a_span_with_its_stages(
    serve: Callable[..., Server], photos: Callable[..., bytes], collector: Collector
) -> None:
    server = serve(traces=collector.url)
    files = {"images": ("a.png", photos(1))}
    sent = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-ID": "request-7"}
    assert server.http.post("/v1/subjects/secret-name/samples", files=files, headers=sent).status_code == 201
    assert server.http.post("/v1/identify", files={"image": ("a.png", photos(1))}).status_code == 200
    assert server.end() == 0  # what waits is sent before the end
    spans = collector.spans()
    (enrolled,) = [span for span in spans if span.name == "POST /v1/subjects/{subject_id}/samples"]
    assert (enrolled.trace_id.hex(), enrolled.parent_span_id.hex()) == (TRACE, PARENT)
    facts = {one.key: one.value for one in enrolled.attributes}
    assert facts["http.response.status_code"].int_value == 201
    assert facts["hypersphere.request_id"].string_value == "request-7"
    parts = {span.name for span in spans if span.parent_span_id == enrolled.span_id}
    assert parts == {"read", "decode", "store"}
    (identified,) = [span for span in spans if span.name == "POST /v1/identify"]
    assert {span.name for span in spans if span.parent_span_id == identified.span_id} == {"read", "decode", "search"}
    assert "secret-name" not in str(spans)


def test_without_a_collector_the_service_goes_on(serve: Callable[..., Server]) -> None:
    server = serve(traces="http://127.0.0.1:9/v1/traces", shutdown_s=5)
    assert server.http.get("/v1/subjects").status_code == 200
    server.end()


@pytest.mark.parametrize("url", ["collector:4317", "ftp://x", "/tmp/x"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="give an address like http"):
        tracing.start(url)
