"""Between protobuf messages and the scheduler's own records; limits are checked here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import grpc
from google.protobuf.duration_pb2 import Duration

from rhizome.common.v1.pool_identity_pb2 import PoolIdentity as PoolIdentityMessage
from rhizome.common.v1.worker_role_pb2 import (
    WORKER_ROLE_DECODE,
    WORKER_ROLE_MIXED,
    WORKER_ROLE_PREFILL,
)
from rhizome.scheduler.v1 import scheduler_service_pb2 as pb
from services.common.errors import InvalidRequestError, OverloadedError, RhizomeError
from services.scheduler.accounting import Outcome
from services.scheduler.costs import DEFAULT_COST_MODEL, CostModel
from services.scheduler.endpoints import PoolLimits, WorkerTable
from services.scheduler.policy import PlacementRequest
from services.scheduler.pool_load import PoolLoad
from services.scheduler.pools import Mismatch, PoolIdentity, PoolSet, ProtocolRange
from services.scheduler.reservations import Reservation
from services.scheduler.views import Load, Worker, WorkerRole, WorkerState, WorkerView

_ROLES = {
    WORKER_ROLE_MIXED: WorkerRole.MIXED,
    WORKER_ROLE_PREFILL: WorkerRole.PREFILL,
    WORKER_ROLE_DECODE: WorkerRole.DECODE,
}
_ROLE_MESSAGES = {role: message for message, role in _ROLES.items()}
_STATES = {
    WorkerState.READY: pb.WORKER_STATE_READY,
    WorkerState.DRAINING: pb.WORKER_STATE_DRAINING,
    WorkerState.SUSPECT: pb.WORKER_STATE_SUSPECT,
    WorkerState.HUNG: pb.WORKER_STATE_SUSPECT,
}
# google.rpc codes of attempts that ended for the worker's sake: unknown, internal, aborted,
# unavailable, and no room.
_WORKER_FAILURES = frozenset(
    status.value[0]
    for status in (
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    )
)
_NO_ROOM = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]


def placement_request(
    message: pb.ScheduleRequest, exemplar: dict[str, str] | None = None
) -> PlacementRequest:
    """Raises InvalidRequestError."""
    if not message.request_id:
        raise InvalidRequestError("request_id must not be empty", "request_id")
    if len(message.prefix_hashes) > message.num_prompt_tokens:
        raise InvalidRequestError(
            "there are more prefix_hashes than prompt tokens", "prefix_hashes"
        )
    return PlacementRequest(
        request_id=message.request_id,
        attempt=message.attempt,
        model=message.model,
        # The message's own container: copying it into a question to the index costs nothing.
        prefix_hashes=message.prefix_hashes,
        num_prompt_tokens=message.num_prompt_tokens,
        max_new_tokens=message.max_new_tokens,
        num_choices=max(1, message.num_choices),
        tenant=message.tenant,
        priority=message.priority,
        num_losses=message.num_losses,
        excluded_worker_ids=frozenset(message.excluded_worker_ids),
        session=(message.tenant, message.session_id) if message.session_id else None,
        exemplar=exemplar,
    )


def remaining_s(message: pb.ScheduleRequest) -> float | None:
    return _seconds(message.remaining) if message.HasField("remaining") else None


def age_s(message: pb.ScheduleRequest, wall_now: float) -> float:
    """How long the request has been under way; what lies in the future counts as now."""
    if not message.HasField("first_arrival"):
        return 0.0
    arrival = message.first_arrival.seconds + message.first_arrival.nanos / 1e9
    return max(0.0, wall_now - arrival)


def placed_response(reservation: Reservation) -> pb.ScheduleResponse:
    worker = reservation.worker
    return pb.ScheduleResponse(
        placed=pb.Placement(
            worker_id=worker.worker_id,
            address=worker.address,
            epoch=worker.epoch,
            reservation_id=reservation.reservation_id,
            predicted_cached_tokens=reservation.predicted_cached_tokens,
            policy=reservation.policy,
            queued_for=_duration(reservation.queued_for_s),
        )
    )


def schedule_failure(error: RhizomeError) -> pb.ScheduleFailure:
    failure = pb.ScheduleFailure(code=error.code, message=error.message)
    if isinstance(error, InvalidRequestError) and error.param is not None:
        failure.param = error.param
    if isinstance(error, OverloadedError):
        failure.retry_after.CopyFrom(_duration(error.retry_after_s))
    return failure


def queued_response(position: int) -> pb.ScheduleResponse:
    return pb.ScheduleResponse(queued=pb.Queued(position=position))


def outcomes(message: pb.ReportRequestsRequest) -> list[Outcome]:
    return [
        Outcome(
            outcome.reservation_id,
            outcome.num_prompt_tokens,
            outcome.cached_tokens,
            outcome.output_tokens,
            outcome.code == 0,
            outcome.code in _WORKER_FAILURES,
            outcome.code == _NO_ROOM,
            outcome.worker_id,
        )
        for outcome in message.outcomes
    ]


def pool_identity(message: PoolIdentityMessage) -> PoolIdentity:
    return PoolIdentity(
        served_model_name=message.served_model_name,
        model_revision=message.model_revision,
        tokenizer_digest=message.tokenizer_digest,
        template_digest=message.template_digest,
        page_size=message.page_size,
        hash_version=message.hash_version,
    )


def protocol_range(message: pb.WorkerDescription) -> ProtocolRange:
    return ProtocolRange(message.protocol.min_revision, message.protocol.max_revision)


def worker(message: pb.WorkerDescription) -> Worker:
    """Raises InvalidRequestError, naming the field."""
    for name in ("worker_id", "address", "max_running_sequences", "context_length"):
        if not getattr(message, name):
            raise InvalidRequestError(f"a worker must have a {name}", name)
    for name in ("served_model_name", "page_size"):
        if not getattr(message.identity, name):
            raise InvalidRequestError(f"a worker's identity must have a {name}", name)
    return Worker(
        worker_id=message.worker_id,
        address=message.address,
        epoch=message.epoch,
        role=_ROLES.get(message.role, WorkerRole.MIXED),
        num_pages=message.num_pages,
        max_running_sequences=message.max_running_sequences,
        context_length=message.context_length,
        vocab_size=message.vocab_size,
        page_size=message.identity.page_size,
    )


def load(message: pb.LoadReport) -> Load:
    has_model = message.HasField("cost_model")
    return Load(
        num_free_pages=message.num_free_pages,
        num_evictable_pages=message.num_evictable_pages,
        num_running=message.num_running,
        num_waiting=message.num_waiting,
        num_waiting_uncached_tokens=message.num_waiting_uncached_tokens,
        num_running_context_tokens=message.num_running_context_tokens,
        draining=message.draining,
        engine_busy=message.engine_busy,
        engine_step_number=message.engine_step_number,
        predicted_step_ns=message.predicted_step_ns,
        eviction_cost_ns=tuple(message.eviction_cost_ns),
        cost_model=_cost_model(message.cost_model) if has_model else None,
    )


def accepted_response(protocol_revision: int, lease_s: float) -> pb.RegisterWorkerResponse:
    return pb.RegisterWorkerResponse(
        accepted=pb.Accepted(protocol_revision=protocol_revision, lease=_duration(lease_s))
    )


def refused_response(mismatches: Iterable[Mismatch]) -> pb.RegisterWorkerResponse:
    return pb.RegisterWorkerResponse(
        refused=pb.Refused(
            mismatches=[
                pb.Mismatch(
                    field=mismatch.field,
                    worker_value=mismatch.worker_value,
                    pool_value=mismatch.pool_value,
                )
                for mismatch in mismatches
            ]
        )
    )


def drain_response(reason: str) -> pb.RegisterWorkerResponse:
    return pb.RegisterWorkerResponse(drain=pb.Drain(reason=reason))


def table_response(table: WorkerTable, pools: PoolSet) -> pb.WatchWorkersResponse:
    """The whole table. A pool appears once its identity is known, also while it is empty;

    until then a declared one is named as awaited.
    """
    return pb.WatchWorkersResponse(
        table_version=table.version,
        pools=[
            _pool(pool.identity, table.limits(pool), table.snapshot(pool))
            for pool in pools.pools
            if pool.identity is not None
        ],
        awaited_models=[
            pool.name for pool in pools.pools if pool.identity is None and pool.name is not None
        ],
    )


def pool_load_message(load: PoolLoad) -> pb.PoolLoad:
    """What is not known is left unset."""
    return pb.PoolLoad(
        model=load.model,
        num_queued=load.num_queued,
        oldest_queued=_duration(load.oldest_queued_s),
        saturation=load.saturation,
        kv_used_ratio=load.kv_used_ratio,
        workers=[
            pb.WorkerLoad(
                worker_id=view.worker_id,
                state=_STATES[view.state],
                num_running=view.load.num_running,
                num_waiting=view.load.num_waiting,
                num_promised=view.charge.num_sequences,
            )
            for view in load.workers
        ],
    )


def _pool(identity: PoolIdentity, limits: PoolLimits, views: Sequence[WorkerView]) -> pb.Pool:
    return pb.Pool(
        identity=PoolIdentityMessage(
            served_model_name=identity.served_model_name,
            model_revision=identity.model_revision,
            tokenizer_digest=identity.tokenizer_digest,
            template_digest=identity.template_digest,
            page_size=identity.page_size,
            hash_version=identity.hash_version,
        ),
        context_length=limits.context_length,
        vocab_size=limits.vocab_size,
        workers=[
            pb.WorkerEntry(
                worker_id=view.worker_id,
                address=view.worker.address,
                epoch=view.worker.epoch,
                state=_STATES[view.state],
                role=_ROLE_MESSAGES[view.worker.role],
                num_pages=view.worker.num_pages,
                max_running_sequences=view.worker.max_running_sequences,
                num_running=view.load.num_running,
                num_waiting=view.load.num_waiting,
                num_used_pages=max(
                    0,
                    view.worker.num_pages
                    - view.load.num_free_pages
                    - view.load.num_evictable_pages,
                ),
            )
            for view in views
        ],
    )


def _cost_model(message: pb.CostModel) -> CostModel:
    """A fit that has not seen one kind of step yet takes the defaults for it."""
    has_prefill = (
        message.prefill_base_ns + message.prefill_token_ns + message.prefill_context_ns > 0
    )
    has_decode = message.decode_base_ns + message.decode_sequence_ns > 0
    prefill = message if has_prefill else DEFAULT_COST_MODEL
    decode = message if has_decode else DEFAULT_COST_MODEL
    return CostModel(
        prefill_base_ns=prefill.prefill_base_ns,
        prefill_token_ns=prefill.prefill_token_ns,
        prefill_context_ns=prefill.prefill_context_ns,
        decode_base_ns=decode.decode_base_ns,
        decode_sequence_ns=decode.decode_sequence_ns,
        decode_context_ns=decode.decode_context_ns,
    )


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def _duration(seconds: float) -> Duration:
    return Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))
