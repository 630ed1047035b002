"""Prefix match: the time to compute what the worker's cache lacks."""

from __future__ import annotations

from collections.abc import Sequence

from services.scheduler.policy import Query
from services.scheduler.views import WorkerView


def prefill_time(query: Query, workers: Sequence[WorkerView]) -> list[float]:
    """Predicted prefill of the prompt's uncached tokens (P_i of E2, arXiv 2407.00023)."""
    num_tokens = query.request.num_prompt_tokens
    cached = query.cached_tokens
    return [
        view.cost_model.prefill_ns(num_tokens - cached.get(view.worker_id, 0), num_tokens)
        for view in workers
    ]
