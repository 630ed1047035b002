"""The cost of NVIDIA Dynamo's KV router, with its defaults: blocks to prefill and to decode.

Prefill blocks are those waiting at the worker and those of the prompt that its cache lacks; decode
blocks are those that running sequences hold, the new one included. The temperature is 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.scheduler.policy import Query
from services.scheduler.views import WorkerView


def dynamo_blocks(query: Query, workers: Sequence[WorkerView]) -> list[float]:
    """The cost in pages, not nanoseconds: it is the only scorer of its policy."""
    num_tokens = query.request.num_prompt_tokens
    costs = []
    for view in workers:
        size, load = view.worker.page_size, view.load
        missed = num_tokens - query.cached_tokens.get(view.worker_id, 0)
        prefill = (load.num_waiting_uncached_tokens + missed) / size + view.charge.num_pages
        context = load.num_running_context_tokens + view.charge.num_context_tokens + num_tokens
        costs.append(prefill + context / size)
    return costs
