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

from services.worker.engine.batch import LAST_SAMPLED, Runner, SlotAssignment, StepPlan
from services.worker.engine.messages import LogprobSpec, SamplingParams
from services.worker.engine.options import EngineOptions
from services.worker.engine.runner.build import build_runner

_PREFILL_TOKENS = 4096


class StaticBatch:
    """Sequences of equal length that all advance by one token a step."""

    def __init__(self, runner: Runner, *, size: int, page_size: int, max_len: int) -> None:
        self._runner = runner
        self._page_size = page_size
        self._first_pages = np.arange(size, dtype=np.int32) * -(-max_len // page_size)
        self._slots = np.arange(size, dtype=np.int32)
        self._length = 0

    def prefill(self, prompts: np.ndarray, temperature: float) -> None:
        """Compute [B, L] prompts, some at a time."""
        length = prompts.shape[1]
        for rows in np.array_split(self._slots, -(-prompts.size // _PREFILL_TOKENS)):
            count = -(-length // self._page_size)
            indices = np.tile(np.arange(count, dtype=np.int32), len(rows))
            self._runner.forward(
                StepPlan(
                    step_number=0,
                    slots=rows,
                    num_tokens=np.full(len(rows), length, np.int32),
                    start_positions=np.zeros(len(rows), np.int32),
                    token_ids=prompts[rows].ravel().astype(np.int32),
                    sample_rows=np.arange(len(rows), dtype=np.int32),
                    page_slots=np.repeat(rows, count),
                    page_indices=indices,
                    page_ids=np.repeat(self._first_pages[rows], count) + indices,
                    assignments=[_assignment(int(slot), length, temperature) for slot in rows],
                )
            )
            self._runner.sample()
            self._runner.result()
        self._length = length

    def issue(self) -> None:
        """One more token for each."""
        index, offset = divmod(self._length, self._page_size)
        changed = self._slots if offset == 0 else self._slots[:0]
        self._runner.forward(
            StepPlan(
                step_number=1,
                slots=self._slots,
                num_tokens=np.ones(len(self._slots), np.int32),
                start_positions=np.full(len(self._slots), self._length, np.int32),
                token_ids=np.full(len(self._slots), LAST_SAMPLED, np.int32),
                sample_rows=np.arange(len(self._slots), dtype=np.int32),
                page_slots=changed,
                page_indices=np.full(len(changed), index, np.int32),
                page_ids=self._first_pages[changed] + np.int32(index),
            )
        )
        self._runner.sample()
        self._length += 1


def measure(runner: Runner, *, batch: int, vocab_size: int, arguments: Any) -> dict[str, float]:
    """Figures of one batch."""
    random = np.random.default_rng(batch)
    sequences = StaticBatch(
        runner,
        size=batch,
        page_size=arguments.page_size,
        max_len=arguments.context + arguments.warmup + arguments.steps + 1,
    )
    prompts = random.integers(0, vocab_size, (batch, arguments.context))
    sequences.prefill(prompts, arguments.temperature)
    depth = arguments.depth or runner.num_in_flight
    issue_ns, ended_ns = [], []
    gc.collect()
    gc.disable()
    for number in range(arguments.warmup + arguments.steps):
        started = time.perf_counter_ns()
        sequences.issue()
        issue_ns.append(time.perf_counter_ns() - started)
        if number >= depth - 1:
            runner.result()
            ended_ns.append(time.perf_counter_ns())
    for _ in range(depth - 1):
        runner.result()
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
                assignments=[_assignment(int(slots[-1]), num_tokens, arguments.temperature)],
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
        f"batch_{batch}": measure(
            runner, batch=batch, vocab_size=plan.vocab_size, arguments=arguments
        )
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


def _assignment(slot: int, prompt_len: int, temperature: float) -> SlotAssignment:
    return SlotAssignment(
        slot=slot,
        sampling=SamplingParams(temperature=temperature, seed=slot, ignore_eos=True),
        logprobs=LogprobSpec(),
        choice_index=0,
        prompt_len=prompt_len,
        token_ids=[],
    )


if __name__ == "__main__":
    main()
