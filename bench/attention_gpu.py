"""Attention backends beside each other on one GPU, over pages at random places.

`python -m bench.attention_gpu` prints one JSON object: for each case and backend, microseconds a
layer and GB/s of keys and values (decode) or TFLOP/s (prefill). Layers follow each other in a CUDA
graph, as many as exceed the L2 cache.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from dataclasses import dataclass

import numpy as np
import torch
import triton

from services.worker.engine.attention.backend import (
    AttentionInputs,
    AttentionLayer,
    CapturableAttention,
)
from services.worker.engine.attention.torch_backend import TorchAttention
from services.worker.engine.attention.triton_backend import TritonAttention
from services.worker.engine.kv.pool import PagePool

_CACHE_BYTES = 200 * 10**6
_MAX_LAYERS = 64


@dataclass(frozen=True, slots=True)
class Case:
    """Rows of equal length that compute their last `num_tokens` tokens."""

    num_rows: int
    length: int
    num_tokens: int

    @property
    def name(self) -> str:
        """As it stands in the results."""
        return f"{self.num_rows} x {self.length}, {self.num_tokens} new"

    def flops(self, num_heads: int, head_dim: int) -> float:
        """Both products over the visible keys."""
        seen = self.num_tokens * (2 * self.length - self.num_tokens + 1) / 2
        return 4.0 * self.num_rows * seen * num_heads * head_dim


CASES = [
    *(Case(1, length, 1) for length in (128, 256, 1024, 4096)),
    *(Case(rows, 1024, 1) for rows in (4, 8, 16, 64, 256)),
    Case(8, 4096, 1),
    *(Case(1, length, length) for length in (512, 1024, 4096, 8192)),
    Case(8, 1024, 512),
    Case(64, 512, 8),
]


class Layers:
    """Pages of several layers and one step over them."""

    def __init__(self, case: Case, arguments: argparse.Namespace) -> None:
        self.case, self.arguments = case, arguments
        heads, kv_heads, size = arguments.heads, arguments.kv_heads, arguments.head_dim
        self.kv_bytes = case.num_rows * case.length * kv_heads * size * 4
        self.num_layers = int(np.clip(_CACHE_BYTES // self.kv_bytes, 4, _MAX_LAYERS))
        max_pages = -(-case.length // arguments.page_size)
        device = torch.device("cuda")
        self.pool = PagePool(
            num_layers=self.num_layers,
            num_pages=case.num_rows * max_pages,
            page_size=arguments.page_size,
            num_kv_heads=kv_heads,
            head_dim=size,
            dtype=torch.bfloat16,
            device=device,
        )
        self.pool.tensor.normal_()
        random = np.random.default_rng(0)
        table = random.permutation(case.num_rows * max_pages).astype(np.int32)
        table = table.reshape(case.num_rows, max_pages)
        start = case.length - case.num_tokens
        self.inputs = AttentionInputs(
            slots=np.arange(case.num_rows, dtype=np.int32),
            num_tokens=np.full(case.num_rows, case.num_tokens, np.int32),
            start_positions=np.full(case.num_rows, start, np.int32),
            host_page_table=table,
            page_table=torch.from_numpy(table).to(device),
        )
        num_tokens = case.num_rows * case.num_tokens
        self.q = torch.randn(num_tokens, heads, size, dtype=torch.bfloat16, device=device)
        self.specs = [
            AttentionLayer(index=index, scale=size**-0.5) for index in range(self.num_layers)
        ]

    def backend(self, name: str) -> TorchAttention | CapturableAttention:
        """A backend over the pages, by its name."""
        if name == "torch":
            return TorchAttention(self.pool)
        heads, rows = self.arguments.heads, self.case.num_rows
        ours = TritonAttention(self.pool, num_heads=heads, max_rows=rows, dtype=torch.bfloat16)
        if name == "triton":
            return ours
        from services.worker.engine.attention.flashinfer_backend import FlashInferAttention

        return FlashInferAttention(
            self.pool,
            num_heads=heads,
            others=ours,
            has_other_layers=False,
        )

    def microseconds(self, name: str) -> float:
        """A layer's time, median of several replays."""
        backend = self.backend(name)
        if self.case.num_tokens == 1 and not isinstance(backend, TorchAttention):
            backend.plan_captured(self.inputs)
        else:
            backend.plan(self.inputs)
        for spec in self.specs[:2]:
            backend.run(self.q, spec)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for spec in self.specs:
                backend.run(self.q, spec)
        times = []
        for _ in range(self.arguments.repeats + 2):
            started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            started.record()
            graph.replay()
            ended.record()
            ended.synchronize()
            times.append(started.elapsed_time(ended) * 1e3 / self.num_layers)
        return float(np.median(times[2:]))


@torch.inference_mode()
def main() -> None:
    """Measure every case with every backend and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backends", nargs="+", default=["torch", "flashinfer", "triton"])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for case in CASES:
        layers = Layers(case, arguments)
        figures[case.name] = {}
        for name in arguments.backends:
            if name == "flashinfer" and importlib.util.find_spec("flashinfer") is None:
                continue
            taken = layers.microseconds(name)
            rate = {"GB/s": round(layers.kv_bytes / taken / 1e3)}
            if case.num_tokens > 1:
                flops = case.flops(arguments.heads, arguments.head_dim)
                rate = {"TFLOP/s": round(flops / taken / 1e6)}
            figures[case.name][name] = {"us": round(taken, 2), **rate}
        del layers
    settings = {
        **vars(arguments),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    print(json.dumps({"benchmark": "attention_gpu", "settings": settings, **figures}))


if __name__ == "__main__":
    main()
