"""What the scheduler's spans say. Called only for requests that are recorded."""

from __future__ import annotations

from rhizome.scheduler.v1 import scheduler_service_pb2 as pb
from services.common.spans import Span
from services.scheduler.reservations import Reservation


def describe_request(span: Span, message: pb.ScheduleRequest) -> None:
    """What it was asked."""
    span.set(
        request_id=message.request_id,
        attempt=message.attempt,
        model=message.model,
        num_prompt_tokens=message.num_prompt_tokens,
        priority=message.priority,
        tenant=message.tenant or None,
    )


def describe_reservation(span: Span, reservation: Reservation) -> None:
    """What it decided, and why."""
    span.set(
        worker_id=reservation.worker.worker_id,
        policy=reservation.policy,
        num_candidates=reservation.num_candidates,
        predicted_cached_tokens=reservation.predicted_cached_tokens,
        queue_s=reservation.queued_for_s,
    )
