"""Eviction: what a worker would lose by making room for the prompt."""

from __future__ import annotations

from collections.abc import Sequence

from services.scheduler.policy import Query
from services.scheduler.views import WorkerView


def eviction_time(query: Query, workers: Sequence[WorkerView]) -> list[float]:
    """M_i of E2 (arXiv 2407.00023, 3.2): prefill time x request share of the pages that go."""
    num_tokens = query.request.num_prompt_tokens
    cached = query.cached_tokens
    return [eviction_ns(view, num_tokens - cached.get(view.worker_id, 0)) for view in workers]


def eviction_ns(view: WorkerView, num_tokens: int) -> float:
    """By the worker's reported curve, for pages of `num_tokens` beyond its free ones.

    Linear between the curve's points, and beyond its end.
    """
    curve = view.load.eviction_cost_ns
    num_free = view.load.num_free_pages - view.charge.num_pages
    num_pages = -(-num_tokens // view.worker.page_size) - max(0, num_free)
    if num_pages <= 0 or not curve:
        return 0.0
    low = min(num_pages.bit_length(), len(curve)) - 1
    high = min(low + 1, len(curve) - 1)
    below, above = curve[low], curve[high]
    if high == low:
        return below * num_pages / (1 << low)
    return below + (above - below) * (num_pages - (1 << low)) / (1 << low)
