"""Stall: the time that those already on a worker lose by a newcomer."""

from __future__ import annotations

from collections.abc import Sequence

from services.scheduler.policy import Query
from services.scheduler.views import WorkerView


def stall_time(query: Query, workers: Sequence[WorkerView]) -> list[float]:
    """Each active sequence waits for the newcomer's prefill, and its steps get longer by its rows.

    With the newcomer's own time this is what the choice adds to the sum of everybody's latency.
    """
    request = query.request
    num_tokens, cached = request.num_prompt_tokens, query.cached_tokens
    num_rows = request.num_choices * query.num_output_tokens
    return [
        view.num_active
        * (
            view.cost_model.prefill_work_ns(num_tokens - cached.get(view.worker_id, 0), num_tokens)
            + num_rows
            * (
                view.cost_model.decode_sequence_ns
                + view.cost_model.decode_context_ns * query.num_read_tokens(view.worker_id)
            )
        )
        for view in workers
    ]
