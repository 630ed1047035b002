"""Load: the time a request spends behind and beside others."""

from __future__ import annotations

from collections.abc import Sequence

from services.scheduler.policy import Query
from services.scheduler.views import WorkerView


def load_time(query: Query, workers: Sequence[WorkerView]) -> list[float]:
    """Predicted wait for the prefills ahead, and decoding in a batch with what runs there."""
    request = query.request
    num_new, num_output = request.num_choices, query.num_output_tokens
    return [
        view.queued_prefill_ns
        + num_output
        * (
            view.decode_step_ns
            + view.cost_model.decode_sequence_ns * num_new
            + view.cost_model.decode_context_ns * query.num_read_tokens(view.worker_id)
        )
        for view in workers
    ]
