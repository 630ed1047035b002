"""The export of spans: what a collector gets, and that one that is down harms nobody."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from services.common.errors import OverloadedError
from services.common.spans import NO_TRACER, SpanKind
from services.common.telemetry import TelemetryFlags, running_tracer
from tests.e2e.system import ROOT, free_port
from tests.fakes.gateway_stack import until
from tests.fakes.otlp_collector import running_collector


def flags(endpoint: str, ratio: float = 1.0) -> TelemetryFlags:
    return TelemetryFlags(otlp_traces_endpoint=endpoint, trace_sample_ratio=ratio)


@pytest.mark.parametrize("scheme", ["", "http://"])
async def test_spans_leave_with_all_they_say_when_the_service_ends(scheme: str) -> None:
    with running_collector() as collector:
        async with running_tracer(flags(scheme + collector.endpoint), "cache_index", "i") as tracer:
            state = "vendor=1"
            parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
            span = tracer.begin("call", parent, state, start_ns=1_000)
            span.set(worker_id="w", share=0.5, ok=True, model="m" * 5_000)
            span.set_standard({"gen_ai.response.finish_reasons": ["stop", "length"]})
            span.add_event("queued", 2_000, position=3)
            inner = span.child("inner", SpanKind.CLIENT, 1_500)
            inner.fail(OverloadedError("full"))
            inner.end(1_700)
            span.end(3_000)
        (inner_span, outer) = sorted(collector.spans, key=lambda span: span.name, reverse=True)
    assert (outer.name, outer.kind, outer.trace_state) == ("call", "server", "vendor=1")
    assert (outer.start_ns, outer.end_ns, outer.failure) == (1_000, 3_000, None)
    assert outer.trace_id == "0af7651916cd43dd8448eb211c80319c"
    assert outer.parent_id == "b7ad6b7169203331"
    assert outer.attributes == {
        "rhizome.worker_id": "w",
        "rhizome.share": 0.5,
        "rhizome.ok": True,
        "rhizome.model": "m" * 1_024,
        "gen_ai.response.finish_reasons": ["stop", "length"],
    }
    assert outer.events == [("queued", 2_000, {"rhizome.position": 3})]
    assert (inner_span.kind, inner_span.parent_id) == ("client", outer.span_id)
    assert inner_span.failure == "full"
    assert inner_span.attributes == {"error.type": "RESOURCE_EXHAUSTED"}
    assert outer.resource["service.name"] == "rhizome-cache-index"
    assert outer.resource["service.instance.id"] == "i"
    assert outer.resource["service.version"]


async def test_an_endpoint_that_is_down_costs_one_log_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    async with running_tracer(flags(f"127.0.0.1:{free_port()}"), "gateway") as tracer:
        # More than the queue holds.
        for _ in range(10_000):
            tracer.begin("call").end()
    await until(lambda: "event=traces_lost" in caplog.text)
    assert caplog.text.count("event=traces_lost") == 1
    assert not [record for record in caplog.records if record.name.startswith("opentelemetry")]


async def test_without_an_endpoint_nothing_is_traced() -> None:
    async with running_tracer(TelemetryFlags(trace_sample_ratio=1.0), "gateway") as tracer:
        assert tracer is NO_TRACER


@pytest.mark.parametrize(
    "module",
    [
        "services.gateway.gateway",
        "services.tokenizer.main",
        "services.scheduler.service",
        "services.cache_index.service",
        "services.worker.service",
    ],
)
def test_a_service_without_an_endpoint_never_loads_the_exporter(module: str) -> None:
    # Redis's client loads the SDK's metrics by itself.
    parts = "('opentelemetry.exporter', 'opentelemetry.sdk.trace')"
    loaded = f"import sys, {module}; print([m for m in sys.modules if m.startswith({parts})])"
    result = subprocess.run(
        [sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
