"""Sessions: a follow-up prefers the worker that served its session last."""

from __future__ import annotations

from collections.abc import Sequence

from services.scheduler.policy import Query
from services.scheduler.views import WorkerView


def away_from_home(query: Query, workers: Sequence[WorkerView]) -> list[float] | None:
    """Prefill of what nobody is known to hold, but at the session's worker; None outside a session.

    Stands for what the session left in its worker's cache that no match shows (yet).
    """
    home = query.home_worker_id
    if home is None:
        return None
    num_tokens = query.request.num_prompt_tokens
    unknown = num_tokens - max(query.cached_tokens.values(), default=0)
    return [
        0.0 if view.worker_id == home else view.cost_model.prefill_ns(unknown, num_tokens)
        for view in workers
    ]
