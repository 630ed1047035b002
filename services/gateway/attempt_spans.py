"""What the spans of a request's placements and attempts say. Called only for recorded requests."""

from __future__ import annotations

from collections.abc import Sequence

from rhizome.scheduler.v1.scheduler_service_pb2 import Placement
from services.common.spans import Span
from services.gateway.generation import Choice


def describe_placement(span: Span, placement: Placement) -> None:
    """What a scheduler answered."""
    span.set(
        worker_id=placement.worker_id,
        policy=placement.policy,
        predicted_cached_tokens=placement.predicted_cached_tokens,
        queue_s=placement.queued_for.ToNanoseconds() / 1e9,
    )


def describe_attempt(
    span: Span, placement: Placement, number: int, choices: Sequence[Choice]
) -> None:
    """What became of choices on one worker."""
    span.set(
        attempt=number,
        worker_id=placement.worker_id,
        address=placement.address,
        num_choices=len(choices),
        cached_tokens=choices[0].cached_tokens,
    )
