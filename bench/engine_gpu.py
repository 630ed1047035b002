"""Steps of the engine's runner alone on one GPU, with random weights.

`python -m bench.engine_gpu MODEL_DIR` (a directory with a config.json) prints one JSON object: for
each batch, milliseconds a decode step from one result to the next, and the host's time to issue
one. Batches are static; sequences start with `--context` tokens and grow. With `--prefills`, the
same for steps that compute a prompt of so many tokens beside `--beside` decode rows.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from services.bench.engine.static_batch import StaticBatch, assignment
from services.worker.engine.batch import Runner, StepPlan
from services.worker.engine.options import EngineOptions, EnginePlan
from services.worker.engine.runner.build import build_runner


def measure(runner: Runner, plan: EnginePlan, *, batch: int, arguments: Any) -> dict[str, float]:
    """Figures of one batch."""
    random = np.random.default_rng(batch)
    sequences = StaticBatch(
        runner,
        page_size=plan.page_size,
        max_step_tokens=plan.max_step_tokens,
        temperature=arguments.temperature,
    )
    prompts = random.integers(0, plan.vocab_size, (batch, arguments.context), dtype=np.int32)
    sequences.start(prompts, arguments.warmup + arguments.steps + 1)
    depth = arguments.depth or runner.num_in_flight
    issue_ns, ended_ns = [], []
    gc.collect()
    gc.disable()
    for _ in range(arguments.warmup + arguments.steps):
        started = time.perf_counter_ns()
        sequences.issue()
        issue_ns.append(time.perf_counter_ns() - started)
        if sequences.read(depth - 1):
            ended_ns.append(time.perf_counter_ns())
    sequences.read(0)
    gc.enable()
    step_ms = np.diff(np.array(ended_ns))[-arguments.steps + depth :] / 1e6
    return {
        "step_ms_mean": round(float(step_ms.mean()), 4),
        "step_ms_p50": round(float(np.median(step_ms)), 4),
        "step_ms_p99": round(float(np.percentile(step_ms, 99)), 4),
        "issue_ms_p50": round(float(np.median(issue_ns[-arguments.steps :])) / 1e6, 4),
    }


def measure_prefill(
    runner: Runner, *, num_tokens: int, vocab_size: int, arguments: Any
) -> dict[str, float]:
    """Figures of steps with one prompt and `arguments.beside` decode rows, two in flight."""
    random = np.random.default_rng(num_tokens)
    rows = arguments.beside + 1
    page_size = arguments.page_size
    per_row = -(-max(num_tokens, arguments.context + 1) // page_size)
    slots = np.arange(rows, dtype=np.int32)
    lengths = np.ones(rows, np.int32)
    lengths[-1] = num_tokens
    starts = np.full(rows, arguments.context, np.int32)
    starts[-1] = 0
    issue_ns, ended_ns = [], []
    for number in range(arguments.warmup + 20):
        pages = np.tile(np.arange(per_row, dtype=np.int32), rows)
        owners = np.repeat(slots, per_row)
        started = time.perf_counter_ns()
        runner.forward(
            StepPlan(
                step_number=number,
                slots=slots,
                num_tokens=lengths,
                start_positions=starts,
                token_ids=random.integers(0, vocab_size, int(lengths.sum()), dtype=np.int32),
                sample_rows=slots,
                page_slots=owners if number == 0 else owners[:0],
                page_indices=pages if number == 0 else pages[:0],
                page_ids=owners * np.int32(per_row) + pages if number == 0 else pages[:0],
                assignments=[assignment(int(slots[-1]), num_tokens, arguments.temperature)],
            )
        )
        runner.sample()
        issue_ns.append(time.perf_counter_ns() - started)
        if number:
            runner.result()
            ended_ns.append(time.perf_counter_ns())
    runner.result()
    return {
        "step_ms_p50": round(float(np.median(np.diff(ended_ns[-19:]))) / 1e6, 4),
        "issue_ms_p50": round(float(np.median(issue_ns[-20:])) / 1e6, 4),
    }


def main() -> None:
    """Measure every batch and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--prefills", type=int, nargs="+", default=[])
    parser.add_argument("--beside", type=int, default=8)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--depth", type=int, choices=(1, 2), help="steps in flight")
    parser.add_argument("--attention-backend")
    parser.add_argument("--quantization", choices=("fp8",))
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--disable-cuda-graph", action="store_true")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--disable-custom-all-reduce", action="store_true")
    arguments = parser.parse_args()
    switches = {"disable_cuda_graph": True} if arguments.disable_cuda_graph else {}
    started = time.perf_counter()
    runner, plan = build_runner(
        EngineOptions(
            model_path=arguments.model,
            tokenizer_path=arguments.model,
            device="cuda",
            load_format="dummy",
            page_size=arguments.page_size,
            context_length=8192,
            attention_backend=arguments.attention_backend,
            quantization=arguments.quantization,
            kv_cache_dtype=arguments.kv_cache_dtype,
            tp_size=arguments.tp,
            disable_custom_all_reduce=arguments.disable_custom_all_reduce,
            chunked_prefill_size=max(2048, *arguments.prefills, 0) + arguments.beside,
            max_running_sequences=max(256, *arguments.batches),
            **switches,
        ),
        lambda fraction, what: None,
    )
    started_s = time.perf_counter() - started
    figures = {
        f"batch_{batch}": measure(runner, plan, batch=batch, arguments=arguments)
        for batch in arguments.batches
    }
    for num_tokens in arguments.prefills:
        figures[f"prefill_{num_tokens}"] = measure_prefill(
            runner, num_tokens=num_tokens, vocab_size=plan.vocab_size, arguments=arguments
        )
    runner.close()
    settings = {
        **{name: str(value) for name, value in vars(arguments).items()},
        "backend": plan.attention_backend,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "start_s": round(started_s, 1),
    }
    print(json.dumps({"benchmark": "engine_gpu", "settings": settings, **figures}))


if __name__ == "__main__":
    main()
