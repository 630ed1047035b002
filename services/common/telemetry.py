"""The operator's telemetry flags, and the export of recorded spans over OTLP.

OpenTelemetry's SDK is loaded only where an endpoint is given. It batches, encodes and sends in a
thread of its own; spans are recorded by `spans`.
"""

# NOTE: annotations are not postponed here: the flags are read from `__init__`, whose annotations
# would be looked up in the module of the configuration that holds them.
import asyncio
import contextlib
import logging
import os
import socket
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from services.common.logs import LogFormat
from services.common.spans import NO_TRACER, AttributeValue, RecordedSpan, SpanKind, Tracer

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

logger = logging.getLogger(__name__)

_DISTRIBUTION = "rhizome-llm"
_SCHEMES = ("http", "https")
# Small batches: encoding holds the interpreter's lock, which the event loop waits for.
_MAX_BATCH_SPANS = 128
# Longest text of an attribute or a failure, in characters.
_MAX_TEXT = 1024
# How long the last spans may take to leave when the service ends.
_FLUSH_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TelemetryFlags:
    """Where traces go, how many are taken, and how logs look; the same in every service."""

    otlp_traces_endpoint: str | None = None
    """OTLP gRPC endpoint that gets traces, `host:port` or a URL (`https://` for TLS). Default:
    nothing is traced."""

    trace_sample_ratio: float = 0.1
    """Share of requests traced, of those whose caller has not decided (W3C `traceparent`)."""

    log_format: LogFormat = "text"
    """How log lines look: text for people, or one JSON object each."""

    def __post_init__(self) -> None:
        if not 0 <= self.trace_sample_ratio <= 1:
            raise ValueError(f"trace_sample_ratio must be in [0, 1], got {self.trace_sample_ratio}")
        endpoint = self.otlp_traces_endpoint
        if endpoint is not None and not _is_endpoint(endpoint):
            raise ValueError(
                "otlp_traces_endpoint must be host:port, http://host:port or https://host:port, "
                f"got {endpoint!r}"
            )


def telemetry_arguments(flags: TelemetryFlags) -> tuple[str, ...]:
    """The flags as a service takes them."""
    arguments = ("--log-format", flags.log_format)
    if flags.otlp_traces_endpoint is None:
        return arguments
    return (
        *arguments,
        *("--otlp-traces-endpoint", flags.otlp_traces_endpoint),
        *("--trace-sample-ratio", str(flags.trace_sample_ratio)),
    )


@contextlib.asynccontextmanager
async def running_tracer(
    flags: TelemetryFlags, service: str, instance_id: str | None = None
) -> AsyncIterator[Tracer]:
    """A tracer whose last spans leave when the block ends; it records nothing without an endpoint.

    `service` is a service's module; `instance_id` tells its replicas apart and is drawn from host
    and process where it is absent.
    """
    if flags.otlp_traces_endpoint is None:
        yield NO_TRACER
        return
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    endpoint = flags.otlp_traces_endpoint
    has_scheme = urlsplit(endpoint).scheme in _SCHEMES
    # Without a scheme the exporter would want TLS; with one it goes by that.
    exporter = OTLPSpanExporter(endpoint, insecure=None if has_scheme else True)
    # It reports each failure, and each try again; `_quiet` reports changes.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    processor = BatchSpanProcessor(
        _quiet(exporter, endpoint), max_export_batch_size=_MAX_BATCH_SPANS
    )
    convert = _Conversion(service, instance_id or f"{socket.gethostname()}:{os.getpid()}")
    logger.info("event=tracing endpoint=%s ratio=%g", endpoint, flags.trace_sample_ratio)
    try:
        yield Tracer(lambda span: processor.on_end(convert(span)), flags.trace_sample_ratio)
    finally:
        await asyncio.to_thread(_shut_down, processor, exporter)


def _is_endpoint(text: str) -> bool:
    try:
        parts = urlsplit(text if "://" in text else f"//{text}")
        has_port = parts.port is not None
    except ValueError:
        return False
    is_bare = parts.path in ("", "/") and not parts.query
    # A URL may leave the port to a proxy's scheme, host:port may not.
    return (
        bool(parts.hostname)
        and is_bare
        and (parts.scheme in _SCHEMES or (not parts.scheme and has_port))
    )


def _shut_down(processor: "BatchSpanProcessor", exporter: "SpanExporter") -> None:
    """Send what there is; an endpoint that does not answer holds nobody up for long."""
    ending = threading.Thread(target=processor.shutdown, daemon=True)
    ending.start()
    ending.join(_FLUSH_S)
    if ending.is_alive():
        # Ends the try under way, of which the log is told then.
        exporter.shutdown()
        ending.join(_FLUSH_S)


def _quiet(exporter: "SpanExporter", endpoint: str) -> "SpanExporter":
    """The same exporter with one log line when exports begin to fail and one when they succeed."""
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class Quiet(SpanExporter):
        is_failing = False

        def export(self, spans: "Sequence[ReadableSpan]") -> SpanExportResult:
            try:
                result = exporter.export(spans)
            except Exception:
                logger.debug("event=trace_export_failed", exc_info=True)
                result = SpanExportResult.FAILURE
            failed = result is not SpanExportResult.SUCCESS
            if failed and not self.is_failing:
                logger.warning("event=traces_lost endpoint=%s", endpoint)
            elif self.is_failing and not failed:
                logger.info("event=traces_leave_again endpoint=%s", endpoint)
            self.is_failing = failed
            return result

        def shutdown(self) -> None:
            exporter.shutdown()

    return Quiet()


class _Conversion:
    """Turns our spans into the SDK's."""

    def __init__(self, service: str, instance_id: str) -> None:
        from opentelemetry import trace
        from opentelemetry.sdk import trace as sdk
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        version = _version()
        self._trace = trace
        self._sdk = sdk
        self._resource = Resource.create(
            {
                "service.name": f"rhizome-{service.replace('_', '-')}",
                "service.version": version,
                "service.instance.id": instance_id,
            }
        )
        self._scope = InstrumentationScope("rhizome", version)
        self._kinds = {kind: trace.SpanKind[kind.name] for kind in SpanKind}
        self._flags = trace.TraceFlags(trace.TraceFlags.SAMPLED)

    def __call__(self, span: RecordedSpan) -> "ReadableSpan":
        trace, sdk = self._trace, self._sdk
        state = trace.TraceState.from_header([span.tracestate]) if span.tracestate else None
        context = trace.SpanContext(span.trace_number, span.span_number, False, self._flags, state)
        parent = None
        if span.parent_number:
            remote = span.kind is SpanKind.SERVER
            parent = trace.SpanContext(
                span.trace_number, span.parent_number, remote, self._flags, state
            )
        status = trace.Status(trace.StatusCode.UNSET)
        if span.error_type:
            status = trace.Status(trace.StatusCode.ERROR, span.failure[:_MAX_TEXT])
        converted: ReadableSpan = sdk.ReadableSpan(
            span.name,
            context=context,
            parent=parent,
            resource=self._resource,
            attributes=_bounded(span.attributes),
            events=[
                sdk.Event(event.name, _bounded(event.attributes), event.time_ns)
                for event in span.events
            ],
            kind=self._kinds[span.kind],
            status=status,
            start_time=span.start_ns,
            end_time=span.end_ns,
            instrumentation_scope=self._scope,
        )
        return converted


def _bounded(attributes: dict[str, AttributeValue]) -> dict[str, AttributeValue]:
    """Clients write some of the texts."""
    return {
        name: value[:_MAX_TEXT] if isinstance(value, str) else value
        for name, value in attributes.items()
    }


def _version() -> str:
    try:
        return metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "unknown"
