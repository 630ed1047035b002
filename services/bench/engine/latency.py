"""`rhizome bench latency`: prefill and decode times of static batches."""

from __future__ import annotations

import gc
import itertools
import json
import statistics
from dataclasses import replace
from typing import Any

import numpy as np

from services.bench.engine.breakdown import measure_breakdown
from services.bench.engine.config import LatencyConfig
from services.bench.engine.startup import BuiltEngine, build_engine, describe_engine
from services.bench.engine.static_batch import BatchTimes, StaticBatch
from services.bench.figures import distribution, number, table

# Enough steps to load every kernel; the shapes are the measured batch's own.
_WARMUP_OUTPUT_LEN = 8
# Every device runs so many rows without being asked.
_SURE_ROWS = 256


def bench_latency(config: LatencyConfig) -> None:
    """Measure every batch, print, write JSON. Raises ValueError for batches that do not fit."""
    options = config.engine.engine_options()
    # A batch is static: all of its rows run.
    if options.max_running_sequences is not None or max(config.batch_size) > _SURE_ROWS:
        rows = max(options.max_running_sequences or 0, *config.batch_size)
        options = replace(options, max_running_sequences=rows)
    engine = build_engine(config.engine, options)
    cases = list(itertools.product(config.batch_size, config.input_len, config.output_len))
    try:
        for size, input_len, output_len in cases:
            _check_fits(engine, size, input_len + output_len)
        figures = [_measure(engine, config, *case) for case in cases]
    finally:
        engine.runner.close()
    print(_summary(figures))
    if config.output_file is not None:
        report = {
            "benchmark": "latency",
            "engine": describe_engine(engine, config.engine),
            "temperature": config.temperature,
            "cases": figures,
        }
        config.output_file.write_text(json.dumps(report, indent=1) + "\n")


def _measure(
    engine: BuiltEngine, config: LatencyConfig, size: int, input_len: int, output_len: int
) -> dict[str, Any]:
    plan = engine.plan
    batch = StaticBatch(
        engine.runner,
        page_size=plan.page_size,
        max_step_tokens=plan.max_step_tokens,
        temperature=config.temperature,
    )
    source = np.random.default_rng(size)
    prompts = source.integers(0, plan.vocab_size, (size, input_len), dtype=np.int32)
    batch.run(prompts, min(output_len, _WARMUP_OUTPUT_LEN))
    gc.collect()
    gc.disable()
    try:
        times = batch.run(prompts, output_len)
    finally:
        gc.enable()
    figures = _figures(times, size, input_len, output_len)
    print(_case_lines(figures), flush=True)
    if config.breakdown:
        breakdown = measure_breakdown(engine, size, input_len, config.temperature)
        figures["breakdown"] = breakdown.as_json()
        print(breakdown.as_text(), flush=True)
    return figures


def _figures(times: BatchTimes, size: int, input_len: int, output_len: int) -> dict[str, Any]:
    median_s = statistics.median(times.decode_s)
    steps = distribution([1e3 * step for step in times.decode_s])
    assert steps is not None, "an output has two tokens at least"
    return {
        "batch_size": size,
        "input_len": input_len,
        "output_len": output_len,
        "prefill_ms": round(1e3 * times.prefill_s, 4),
        "prefill_tokens_per_s": round(size * input_len / times.prefill_s, 1),
        "decode_ms": steps.as_json(),
        "decode_median_tokens_per_s": round(size / median_s, 1),
        "total_s": round(times.total_s, 4),
        "total_tokens_per_s": round(size * (input_len + output_len) / times.total_s, 1),
    }


def _check_fits(engine: BuiltEngine, size: int, length: int) -> None:
    plan = engine.plan
    if length > plan.context_length:
        raise ValueError(
            f"{length} tokens a sequence exceed the context length {plan.context_length}"
        )
    needed = size * -(-length // plan.page_size)
    if needed > plan.num_pages:
        raise ValueError(
            f"a batch of {size} x {length} tokens needs {needed} pages, "
            f"the key/value cache has {plan.num_pages}: lower --batch-size or the lengths"
        )


def _case_lines(figures: dict[str, Any]) -> str:
    steps = figures["decode_ms"]
    return (
        f"batch {figures['batch_size']}, input {figures['input_len']}, "
        f"output {figures['output_len']}\n"
        f"Prefill. latency: {figures['prefill_ms'] / 1e3:8.5f} s, "
        f"throughput: {figures['prefill_tokens_per_s']:10.2f} token/s\n"
        f"Decode.  median latency: {steps['p50'] / 1e3:8.5f} s, "
        f"median throughput: {figures['decode_median_tokens_per_s']:10.2f} token/s\n"
        f"Total.   latency: {figures['total_s']:8.3f} s, "
        f"throughput: {figures['total_tokens_per_s']:10.2f} token/s"
    )


def _summary(cases: list[dict[str, Any]]) -> str:
    header = ["batch", "in", "out", "prefill ms", "tok/s", "decode p50 ms", "p99 ms", "tok/s"]
    rows = [
        [
            *(str(case[name]) for name in ("batch_size", "input_len", "output_len")),
            number(case["prefill_ms"]),
            number(case["prefill_tokens_per_s"]),
            number(case["decode_ms"]["p50"]),
            number(case["decode_ms"]["p99"]),
            number(case["decode_median_tokens_per_s"]),
        ]
        for case in cases
    ]
    return "\n" + table(header, rows)
