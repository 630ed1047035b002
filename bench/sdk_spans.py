"""What OpenTelemetry's SDK takes to record a request's spans, and ours, without exporting them.

    python -m bench.sdk_spans

A root and three children with five attributes each, sampled and not. Prints microseconds a request,
the best of 15 repeats of 3,000, as JSON.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from services.common.spans import SpanKind, Tracer

_REPEATS, _REQUESTS = 15, 3000
_CHILDREN = ("tokenize", "schedule", "attempt")
_ATTRIBUTES = {
    "http.request.method": "POST",
    "http.route": "/v1/chat/completions",
    "gen_ai.operation.name": "chat",
    "gen_ai.provider.name": "rhizome",
    "gen_ai.request.model": "model",
}


def sdk_request(ratio: float) -> Callable[[], None]:
    tracer = TracerProvider(sampler=ParentBased(TraceIdRatioBased(ratio))).get_tracer("bench")

    def request() -> None:
        root = tracer.start_span("POST")
        context = trace.set_span_in_context(root)
        for name in _CHILDREN:
            child = tracer.start_span(name, context=context)
            if child.is_recording():
                child.set_attributes(_ATTRIBUTES)
            child.end()
        if root.is_recording():
            root.set_attributes(_ATTRIBUTES)
        root.end()

    return request


def our_request(ratio: float) -> Callable[[], None]:
    tracer = Tracer(lambda span: None, ratio)

    def request() -> None:
        root = tracer.begin("POST", "")
        for name in _CHILDREN:
            with root.child(name, SpanKind.CLIENT) as child:
                if child.is_recording:
                    child.set_standard(_ATTRIBUTES)
        if root.is_recording:
            root.set_standard(_ATTRIBUTES)
        root.end()

    return request


def best_us(request: Callable[[], None]) -> float:
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        for _ in range(_REQUESTS):
            request()
        times.append(time.perf_counter() - began)
    return round(min(times) / _REQUESTS * 1e6, 2)


def main() -> None:
    print(
        json.dumps(
            {
                name: {"not sampled": best_us(make(0.0)), "sampled": best_us(make(1.0))}
                for name, make in (("sdk", sdk_request), ("ours", our_request))
            }
        )
    )


if __name__ == "__main__":
    main()
