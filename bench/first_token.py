"""Time to first token through all services with the built-in model, hop by hop.

Starts `rhizome serve`, asks one question at a time, prints the median and 99th percentile of each
hop in milliseconds as JSON: `python -m bench.first_token [NUM_REQUESTS]`.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

from tests.e2e.system import System, running_system

HOPS = ("tokenize", "schedule", "worker_queue", "prefill_and_text", "first_token", "client")


def main() -> None:
    num_requests = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    with running_system("--log-level", "warning") as system:
        measure(system, 20)
        rows = measure(system, num_requests)
    print(
        json.dumps(
            {
                "requests": num_requests,
                **{hop: _percentiles([row[hop] for row in rows]) for hop in HOPS},
                "per_token": _percentiles([row["per_token"] for row in rows]),
            },
            indent=1,
        )
    )


def measure(system: System, number: int) -> list[dict[str, float]]:
    """One row of hop times in milliseconds a request, each with a prompt of its own."""
    rows = []
    for index in range(number):
        started = time.perf_counter()
        first = 0.0
        trace: dict[str, Any] = {}
        chunks = system.openai.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": f"What is {index % 50} plus {index // 50}?"}],
            temperature=0,
            stream=True,
            extra_headers={"x-rhizome-trace": "1"},
        )
        for chunk in chunks:
            trace = (chunk.model_extra or {}).get("rhizome") or trace
            if not first and chunk.choices and chunk.choices[0].delta.content:
                first = time.perf_counter() - started
        rows.append(_row(trace, first * 1000))
    return rows


def _row(trace: dict[str, Any], client_ms: float) -> dict[str, float]:
    before = trace["tokenize_ms"] + trace["schedule_ms"] + trace["worker_queue_ms"]
    later = max(1, trace["output_tokens"] - 1)
    return {
        "tokenize": trace["tokenize_ms"],
        "schedule": trace["schedule_ms"],
        "worker_queue": trace["worker_queue_ms"],
        "prefill_and_text": trace["first_token_ms"] - before,
        "first_token": trace["first_token_ms"],
        "client": client_ms,
        "per_token": (trace["total_ms"] - trace["first_token_ms"]) / later,
    }


def _percentiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100)
    return {"p50_ms": round(cuts[49], 2), "p99_ms": round(cuts[98], 2)}


if __name__ == "__main__":
    main()
