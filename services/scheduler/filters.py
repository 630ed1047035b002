"""Which workers may have a request at all, and which have room for it now."""

from __future__ import annotations

from collections.abc import Sequence

from services.scheduler.policy import PlacementRequest
from services.scheduler.views import WorkerRole, WorkerState, WorkerView

# A worker's own queue stays this short: backlog waits in the scheduler.
MAX_QUEUED_PREFILL_NS = 200e6


def eligible(request: PlacementRequest, workers: Sequence[WorkerView]) -> list[WorkerView]:
    """Ready, prefilling, not excluded, with a context the prompt fits in."""
    excluded = request.excluded_worker_ids
    return [
        view
        for view in workers
        if view.takes_prompts
        and view.worker.context_length > request.num_prompt_tokens
        and view.worker_id not in excluded
    ]


def may_become_eligible(request: PlacementRequest, workers: Sequence[WorkerView]) -> bool:
    """Whether a worker is eligible, or would be if it were not suspected just now."""
    return any(
        view.takes_prompts or view.state is WorkerState.SUSPECT
        for view in workers
        if view.worker.role is not WorkerRole.DECODE
        and view.worker.context_length > request.num_prompt_tokens
        and view.worker_id not in request.excluded_worker_ids
    )


def with_room(request: PlacementRequest, workers: Sequence[WorkerView]) -> list[WorkerView]:
    """A short queue, free sequences and pages for the prompt; an idle worker always has room.

    Pages of a cached prefix are counted as needed: they may be locked or not, and the worker's
    admission is the truth.
    """
    return [view for view in workers if has_room(request, view)]


def has_room(request: PlacementRequest, view: WorkerView) -> bool:
    """Whether `with_room` keeps the worker."""
    return view.num_active == 0 or (
        view.queued_prefill_ns < MAX_QUEUED_PREFILL_NS
        and view.num_free_sequences >= request.num_choices
        and view.num_available_tokens >= request.num_prompt_tokens
    )
