"""Time to match and to insert long prompts in the prefix tree.

`python -m bench.radix` prints one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from services.worker.engine.kv.events import CacheEventCollector
from services.worker.engine.kv.radix import Node, RadixTree, page_keys

_NAMESPACE = "bench//"
_OPERATIONS = ("keys", "match_miss", "insert", "match_hit", "lock", "unlock", "evict")

Result = TypeVar("Result")


def measure(*, prompt_len: int, page_size: int, num_prompts: int) -> dict[str, float]:
    """Microseconds a prompt of each operation, in a tree that ends up holding all prompts."""
    events = CacheEventCollector()
    tree = RadixTree(page_size, events)
    random = np.random.default_rng(0)
    prompts = random.integers(0, 128_000, (num_prompts, prompt_len)).tolist()
    num_pages = prompt_len // page_size
    times: dict[str, list[int]] = {
        name: []
        for name in ("keys", "match_miss", "insert", "match_hit", "lock", "unlock", "evict")
    }
    gc.disable()
    for number, prompt in enumerate(prompts):
        keys = _timed(times["keys"], lambda prompt=prompt: page_keys(_NAMESPACE, prompt, page_size))
        _timed(times["match_miss"], lambda keys=keys: tree.match(keys, num_pages))
        pages = list(range(number * num_pages, (number + 1) * num_pages))
        tree.lock(tree.root)
        tail = _timed(times["insert"], lambda keys=keys, pages=pages: _insert(tree, keys, pages))
        events.take()
        tree.unlock(tail)
    for prompt in prompts:
        keys = page_keys(_NAMESPACE, prompt, page_size)
        tail = _timed(times["match_hit"], lambda keys=keys: tree.match(keys, num_pages))
        assert tail.depth == num_pages, "what was inserted is found"
        _timed(times["lock"], lambda tail=tail: tree.lock(tail))
        _timed(times["unlock"], lambda tail=tail: tree.unlock(tail))
    for _ in prompts:
        _timed(times["evict"], lambda: tree.evict(num_pages))
    gc.enable()
    return {
        f"{name}_us": round(float(np.median(values)) / 1000, 1) for name, values in times.items()
    }


def _insert(tree: RadixTree, keys: list[bytes], pages: list[int]) -> Node:
    node = tree.root
    for key, page in zip(keys, pages, strict=True):
        node = tree.insert(node, key, page)
    return node


def _timed(times: list[int], call: Callable[[], Result]) -> Result:
    started = time.perf_counter_ns()
    result = call()
    times.append(time.perf_counter_ns() - started)
    return result


def main() -> None:
    """Measure and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt-len", type=int, default=4096)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=500)
    arguments = parser.parse_args()
    figures = measure(
        prompt_len=arguments.prompt_len,
        page_size=arguments.page_size,
        num_prompts=arguments.prompts,
    )
    settings = {**vars(arguments), "python": platform.python_version()}
    print(json.dumps({"benchmark": "radix", "settings": settings, **figures}, indent=2))


if __name__ == "__main__":
    main()
