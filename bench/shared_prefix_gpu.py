"""Decoding over shared prefixes on one GPU: attention alone, and through the engine's loop.

`python -m bench.shared_prefix_gpu attention` times a layer's attention for groups of rows with a
common prefix: rows in random order, in prefix order, and in prefix order with prefixes read once.
`python -m bench.shared_prefix_gpu engine MODEL_DIR` (a directory with a config.json) serves groups
of requests, all there at once and in random order, through the engine without its services, with
prefixes read once or not. Each prints one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flashinfer
import numpy as np
import torch

from services.worker.engine.attention import sharing
from services.worker.engine.attention.backend import AttentionInputs
from services.worker.engine.attention.flashinfer_decode import CascadeCalls, DecodeCalls
from services.worker.engine.attention.page_lists import page_lists
from services.worker.engine.attention.sharing import PrefixFinder, PrefixGroups
from services.worker.engine.kv.pool import PagePool
from services.worker.engine.loop import EngineLoop, build_loop
from services.worker.engine.messages import (
    EngineInput,
    FlushCache,
    Request,
    SamplingParams,
    StepOutput,
)
from services.worker.engine.options import EngineOptions
from services.worker.engine.runner.build import build_runner

# The attention shape of Llama-3.1-8B.
_HEADS, _KV_HEADS, _HEAD_DIM = 32, 8, 128
_LAYERS = 4
_TOKEN_BYTES = 2 * _KV_HEADS * _HEAD_DIM * 2
_WORKSPACE_BYTES = 256 * 1024**2


class AttentionBatch:
    """Rows of groups that share a prefix each, and a pool of random keys and values."""

    def __init__(self, *, rows: int, group: int, prefix: int, own: int, page_size: int) -> None:
        self.rows, self.page_size = rows, page_size
        prefix_pages, own_pages = prefix // page_size, -(-own // page_size)
        num_groups = rows // group
        pages = np.random.default_rng(rows).permutation(
            num_groups * prefix_pages + rows * own_pages
        )
        shared, rest = np.split(pages.astype(np.int32), [num_groups * prefix_pages])
        shared = np.repeat(shared.reshape(num_groups, prefix_pages), group, axis=0)
        self.table = np.concatenate((shared, rest.reshape(rows, own_pages)), axis=1)
        self.positions = np.full(rows, prefix + own - 1, np.int32)
        self.pool = PagePool(
            num_layers=_LAYERS,
            num_pages=len(pages),
            page_size=page_size,
            num_kv_heads=_KV_HEADS,
            head_dim=_HEAD_DIM,
            dtype=torch.bfloat16,
            device=torch.device("cuda"),
        )
        self.pool.tensor.normal_()
        self.q = torch.randn(rows, _HEADS, _HEAD_DIM, dtype=torch.bfloat16, device="cuda")

    def inputs(self, slots: np.ndarray) -> AttentionInputs:
        """A decode step of these slots."""
        return AttentionInputs(
            slots=slots.astype(np.int32),
            num_tokens=np.ones(self.rows, np.int32),
            start_positions=self.positions,
            host_page_table=self.table,
            page_table=torch.empty(0),
        )

    def layer_times(self, call: Any) -> dict[str, float]:
        """Microseconds of a layer on the device, in a graph over all layers, and to launch it."""
        out = torch.empty_like(self.q)

        def run() -> None:
            for layer in range(_LAYERS):
                call.run(self.q, (self.pool.keys(layer), self.pool.values(layer)), out=out)

        run()
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        launched = time.perf_counter() - started
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return {
            "device_us": round(_median_ms(graph.replay) * 1000 / _LAYERS, 1),
            "launch_us": round(launched * 1e6 / _LAYERS, 1),
        }


def _median_ms(work: Callable[[], None], repeats: int = 9) -> float:
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(np.median(times[2:]))


@torch.inference_mode()
def measure_attention(
    *, rows: int, group: int, prefix: int, own: int, page_size: int
) -> dict[str, Any]:
    """Times of one batch in all three ways, with the bytes that each must read at least."""
    batch = AttentionBatch(rows=rows, group=group, prefix=prefix, own=own, page_size=page_size)
    workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    shape = {
        "num_qo_heads": _HEADS,
        "num_kv_heads": _KV_HEADS,
        "head_dim": _HEAD_DIM,
        "page_size": page_size,
        "q_data_type": torch.bfloat16,
        "kv_data_type": torch.bfloat16,
    }
    decode = DecodeCalls(workspace, shape)
    cascade = CascadeCalls(workspace, decode, shape)
    finder = PrefixFinder(page_size=page_size, token_bytes=_TOKEN_BYTES)
    ordered = np.arange(rows)
    shuffled = np.random.default_rng(0).permutation(rows)
    in_order = batch.inputs(ordered)

    def plan_plain() -> Any:
        return decode.plan(page_lists(in_order, slice(0, rows), page_size))

    num_groups = rows // group
    groups = PrefixGroups(
        np.arange(num_groups) * group,
        np.full(num_groups, group),
        np.full(num_groups, prefix // page_size),
    )

    def plan_cascade() -> Any:
        finder.find(in_order.slots, in_order.start_positions, batch.table)
        return cascade.plan(in_order, rows, groups)

    in_random = page_lists(batch.inputs(shuffled), slice(0, rows), page_size)
    figures: dict[str, Any] = {
        "random_order": batch.layer_times(decode.plan(in_random)),
        "prefix_order": batch.layer_times(plan_plain()),
        "cascade": batch.layer_times(plan_cascade()),
        "cascade_is_chosen": (
            finder.find(in_order.slots, in_order.start_positions, batch.table) is not None
        ),
        "read_by_each_mb": round(rows * (prefix + own) * _TOKEN_BYTES / 1e6),
        "read_once_mb": round((rows // group * prefix + rows * own) * _TOKEN_BYTES / 1e6),
    }
    for name, plan in (("plain_plan_us", plan_plain), ("cascade_plan_us", plan_cascade)):
        times = []
        for _ in range(20):
            started = time.perf_counter()
            plan()
            times.append(time.perf_counter() - started)
            torch.cuda.synchronize()
        figures[name] = round(float(np.median(times[2:])) * 1e6, 1)
    return figures


class _Inbox:
    def __init__(self) -> None:
        self.messages: list[EngineInput] = []

    def receive(self, block: bool, timeout_s: float | None = None) -> list[EngineInput]:
        messages, self.messages = self.messages, []
        return messages


class _Outbox:
    def __init__(self) -> None:
        self.num_finished = 0
        self.started: set[int] = set()

    def send(self, message: StepOutput) -> None:
        self.started.update(message.keys)
        self.num_finished += len(message.finishes)


def measure_engine(
    loop: EngineLoop, inbox: _Inbox, outbox: _Outbox, arguments: Any, seed: int
) -> dict[str, float]:
    """Serve all groups, from the first step to the last result."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, arguments.vocab_size, (arguments.groups, arguments.prefix))
    requests = []
    for number in range(arguments.groups * arguments.group):
        own = random.integers(0, arguments.vocab_size, arguments.own)
        prompt = [*ids[number % arguments.groups].tolist(), *own.tolist()]
        key = seed * 100_000 + number
        requests.append(
            Request(
                key=key,
                request_id=str(key),
                token_ids=prompt,
                prompt_len=len(prompt),
                sampling=SamplingParams(
                    temperature=0.0, max_new_tokens=arguments.output, ignore_eos=True
                ),
            )
        )
    random.shuffle(requests)
    inbox.messages += [FlushCache(), *requests]
    outbox.num_finished = 0
    outbox.started.clear()
    gc.collect()
    gc.disable()
    started = time.perf_counter()
    prefilled_s = 0.0
    num_steps = num_mixed = 0
    while outbox.num_finished < len(requests):
        loop.step()
        num_steps += 1
        if not prefilled_s and len(outbox.started) == len(requests):
            prefilled_s, num_mixed = time.perf_counter() - started, num_steps
    seconds = time.perf_counter() - started
    gc.enable()
    return {
        "requests_per_s": round(len(requests) / seconds, 1),
        "until_all_had_a_token_s": round(prefilled_s, 3),
        "steps_until_then": num_mixed,
        "ms_per_step_after": round((seconds - prefilled_s) * 1000 / (num_steps - num_mixed), 2),
    }


def run_engine(arguments: Any) -> dict[str, Any]:
    """Requests a second with prefixes read once and without, in turn."""
    runner, plan = build_runner(
        EngineOptions(
            model_path=arguments.model,
            tokenizer_path=arguments.model,
            device="cuda",
            load_format="dummy",
            context_length=8192,
            max_running_sequences=arguments.max_running_sequences,
            chunked_prefill_size=arguments.chunked_prefill_size,
        ),
        lambda fraction, what: None,
    )
    inbox, outbox = _Inbox(), _Outbox()
    loop = build_loop(runner, plan, inbox, outbox)
    arguments.vocab_size = plan.vocab_size
    least = sharing.MIN_GAINED_BYTES
    figures: dict[str, list[dict[str, float]]] = {"cascade": [], "prefix_order": []}
    for run in range(arguments.runs + 1):
        for name, measured in figures.items():
            sharing.MIN_GAINED_BYTES = least if name == "cascade" else 1 << 62
            figure = measure_engine(
                loop, inbox, outbox, arguments, seed=2 * run + (name == "cascade")
            )
            # The first of each warms up.
            if run:
                measured.append(figure)
    runner.close()
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("attention", "engine"))
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 512])
    parser.add_argument("--groups", type=int, default=32)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--prefix", type=int, default=2048)
    parser.add_argument("--own", type=int, default=128)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--max-running-sequences", type=int, default=512)
    parser.add_argument("--chunked-prefill-size", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    settings = {
        **{name: str(value) for name, value in vars(arguments).items()},
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "flashinfer": flashinfer.__version__,
        "python": platform.python_version(),
    }
    if arguments.what == "engine":
        if arguments.model is None:
            parser.error("engine needs a model directory")
        figures: dict[str, Any] = run_engine(arguments)
    else:
        figures = {
            f"rows_{rows}": measure_attention(
                rows=rows,
                group=arguments.group,
                prefix=arguments.prefix,
                own=arguments.own + arguments.output // 2,
                page_size=arguments.page_size,
            )
            for rows in arguments.rows
        }
    print(json.dumps({"benchmark": "shared_prefix_gpu", "settings": settings, **figures}))


if __name__ == "__main__":
    main()
