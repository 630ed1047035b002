"""An OTLP collector that keeps what it gets: the other end of an exporter."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

_TIMEOUT_S = 20.0
_KINDS = {
    trace_pb2.Span.SPAN_KIND_INTERNAL: "internal",
    trace_pb2.Span.SPAN_KIND_SERVER: "server",
    trace_pb2.Span.SPAN_KIND_CLIENT: "client",
}


@dataclass(frozen=True, slots=True)
class CollectedSpan:
    """One span as it arrived; ids in hexadecimal, `parent_id` empty for a trace's first."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: str
    start_ns: int
    end_ns: int
    trace_state: str
    failure: str | None
    attributes: dict[str, Any]
    events: list[tuple[str, int, dict[str, Any]]]
    resource: dict[str, Any] = field(repr=False)


class OtlpCollector(trace_service_pb2_grpc.TraceServiceServicer):
    """Owns the spans that came; `port` is where it listens."""

    def __init__(self) -> None:
        self.port = 0
        self._spans: list[CollectedSpan] = []
        self._arrived = threading.Condition()

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def spans(self) -> list[CollectedSpan]:
        with self._arrived:
            return list(self._spans)

    def trace(
        self, trace_id: str, is_whole: Callable[[list[CollectedSpan]], object]
    ) -> list[CollectedSpan]:
        """A trace's spans by their start, once there is all that is wanted of it."""
        deadline = time.monotonic() + _TIMEOUT_S
        while True:
            with self._arrived:
                spans = [span for span in self._spans if span.trace_id == trace_id]
                if is_whole(spans):
                    return sorted(spans, key=lambda span: span.start_ns)
                if not self._arrived.wait(deadline - time.monotonic()):
                    raise TimeoutError(f"of {trace_id} there is only {spans}")

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        with self._arrived:
            for resource_spans in request.resource_spans:
                resource = _attributes(resource_spans.resource.attributes)
                for scope_spans in resource_spans.scope_spans:
                    self._spans += [_collected(resource, span) for span in scope_spans.spans]
            self._arrived.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()


@contextlib.contextmanager
def running_collector() -> Iterator[OtlpCollector]:
    """Collect on a free port until the block ends."""
    collector = OtlpCollector()
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
        collector.port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield collector
        finally:
            server.stop(0).wait()


def _collected(resource: dict[str, Any], span: trace_pb2.Span) -> CollectedSpan:
    failed = span.status.code == trace_pb2.Status.STATUS_CODE_ERROR
    return CollectedSpan(
        service=resource["service.name"],
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        kind=_KINDS[span.kind],
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        trace_state=span.trace_state,
        failure=span.status.message if failed else None,
        attributes=_attributes(span.attributes),
        events=[
            (event.name, event.time_unix_nano, _attributes(event.attributes))
            for event in span.events
        ],
        resource=resource,
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: common_pb2.AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    return getattr(value, str(kind))
