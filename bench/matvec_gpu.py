"""Products of few tokens with a decoder's weights on one GPU: our kernels beside cuBLAS.

`python -m bench.matvec_gpu MODEL_DIR` (a directory with a config.json) prints a line for each
product and number of tokens, then one JSON object. Each figure is the median over replays of a
CUDA graph that walks over copies of the weights, more than the L2 cache holds; a chain is the four
products of a layer in turn. Our figures include the norm before qkv and gate_up (one token), the
gated activation and the residual's addition; cuBLAS's are products alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import triton

from services.worker.engine.kernels.matvec import gated_matvec, matvec, takes
from services.worker.engine.models.registry import load_model_config

_ROTATED_BYTES = 300e6
_REPLAYS = 9
_LAUNCHES = 12
_EPS = 1e-5

Launch = Callable[[int], object]


class Product:
    """One linear layer of the model: copies of its weights, and inputs for up to 256 tokens."""

    def __init__(self, name: str, num_rows: int, size: int, copies: int) -> None:
        self.name, self.copies = name, copies
        self.num_bytes = num_rows * size * 2
        self._weights = [_randn(num_rows, size) * 0.02 for _ in range(copies)]
        self._gains = torch.ones(size, dtype=torch.bfloat16, device="cuda")
        self._x, self._residual = _randn(256, size), _randn(256, num_rows)

    def taken(self, num_tokens: int) -> bool:
        """Whether the engine computes it by our kernels."""
        return takes(self._x[:num_tokens], self._weights[0], gated=self.name == "gate_up")

    def cublas(self, num_tokens: int) -> Launch:
        x = self._x[:num_tokens]
        return lambda index: F.linear(x, self._weights[index % self.copies])

    def ours(self, num_tokens: int) -> Launch:
        """As the engine launches it: cuBLAS where our kernels do not take it."""
        if not self.taken(num_tokens):
            return self.cublas(num_tokens)
        x, residual = self._x[:num_tokens], self._residual[:num_tokens]
        norm = {"norm_weight": self._gains, "eps": _EPS} if num_tokens == 1 else {}

        def launch(index: int) -> object:
            weight = self._weights[index % self.copies]
            if self.name == "gate_up":
                return gated_matvec(x, weight, **norm)
            if self.name == "head":
                return matvec(x, weight, out_dtype=torch.float32)
            if self.name == "qkv":
                return matvec(x, weight, **norm)
            return matvec(x, weight, residual=residual if num_tokens == 1 else None)

        return launch


def measure(launches: list[Launch], count: int) -> float:
    """Microseconds of one turn of the launches, in a graph of `count` turns."""

    def run() -> None:
        for index in range(count):
            for launch in launches:
                launch(index)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(_REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / count)
    return statistics.median(times)


def main() -> None:
    """Measure every product, then the layer's chain."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 8, 16, 32])
    arguments = parser.parse_args()
    config = load_model_config(arguments.model)
    heads = config.num_heads * config.head_dim
    shapes = {
        "qkv": (heads + 2 * config.num_kv_heads * config.head_dim, config.hidden_size),
        "output": (config.hidden_size, heads),
        "gate_up": (2 * config.intermediate_size, config.hidden_size),
        "down": (config.hidden_size, config.intermediate_size),
        "head": (config.vocab_size, config.hidden_size),
    }
    layer_bytes = sum(2 * rows * size for name, (rows, size) in shapes.items() if name != "head")
    figures: dict[str, dict[str, float]] = {}
    chained = []
    for name, (rows, size) in shapes.items():
        copies = max(
            2, int(_ROTATED_BYTES / layer_bytes) + 1, int(_ROTATED_BYTES / rows / size / 2)
        )
        product = Product(name, rows, size, copies if name != "head" else 2)
        _report(figures, name, product.num_bytes, [product], arguments.tokens)
        if name != "head":
            chained.append(product)
    _report(figures, "chain", layer_bytes, chained, arguments.tokens)
    settings = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "model": arguments.model.name,
    }
    print(json.dumps({"benchmark": "matvec_gpu", "settings": settings, **figures}))


def _report(
    figures: dict[str, dict[str, float]],
    name: str,
    num_bytes: int,
    products: list[Product],
    tokens: list[int],
) -> None:
    count = max(_LAUNCHES, min(product.copies for product in products))
    for num_tokens in tokens:
        cublas = measure([product.cublas(num_tokens) for product in products], count)
        ours = measure([product.ours(num_tokens) for product in products], count)
        figures[f"{name}_{num_tokens}"] = {"cublas_us": round(cublas, 2), "ours_us": round(ours, 2)}
        taken = "" if all(p.taken(num_tokens) for p in products) else " (some by cuBLAS)"
        print(
            f"{name:8s} tokens {num_tokens:2d} cuBLAS {cublas:8.2f} us "
            f"{num_bytes / cublas / 1e3:5.0f} GB/s, ours {ours:8.2f} us "
            f"{num_bytes / ours / 1e3:5.0f} GB/s{taken}"
        )


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


if __name__ == "__main__":
    main()
