"""What a placement adds to a worker's load until the worker's reports include it."""

from __future__ import annotations

from services.scheduler.policy import PlacementRequest, Query
from services.scheduler.views import Charge, WorkerView


def charge_of(query: Query, chosen: WorkerView) -> Charge:
    """Of the request there, by what is predicted about it."""
    worker_id = chosen.worker_id
    cached = query.cached_tokens.get(worker_id, 0)
    return charge(query.request, chosen, cached, query.shared_tokens.get(worker_id, 0))


def charge(request: PlacementRequest, chosen: WorkerView, cached: int, shared: int = 0) -> Charge:
    """With `cached` prompt tokens there, of which decode steps read `shared` with other rows."""
    num_tokens = request.num_prompt_tokens
    num_uncached = num_tokens - cached
    return Charge(
        num_sequences=request.num_choices,
        num_pages=-(-num_uncached // chosen.worker.page_size),
        num_context_tokens=(num_tokens - shared) * request.num_choices,
        prefill_ns=int(chosen.cost_model.prefill_work_ns(num_uncached, num_tokens)),
    )
