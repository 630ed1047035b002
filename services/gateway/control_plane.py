"""What the gateway knows of the schedulers: the last worker table, placements, outcomes.

A scheduler that says nothing for a second is left for the next one (`schedulers.py` has the order);
when none answers, requests are placed by power of two choices over the last table. So the control
plane's absence costs affinity, never requests.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import grpc
from google.protobuf.duration_pb2 import Duration

from rhizome.common.v1.pool_identity_pb2 import PoolIdentity
from rhizome.common.v1.worker_role_pb2 import WORKER_ROLE_DECODE
from rhizome.scheduler.v1.scheduler_service_pb2 import (
    WORKER_STATE_READY,
    Placement,
    Pool,
    RequestOutcome,
    ScheduleRequest,
    WorkerEntry,
)
from services.common.errors import (
    InvalidRequestError,
    NotFoundError,
    RhizomeError,
    UnavailableError,
)
from services.common.peer_tls import PeerTls
from services.gateway.metrics import GatewayMetrics
from services.gateway.schedulers import SchedulerSet

logger = logging.getLogger(__name__)

# Statuses that say something about the scheduler and not about the request.
_NOT_A_VERDICT = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNIMPLEMENTED,
)
FALLBACK_POLICY = "gateway/power_of_two"


@dataclass(slots=True, frozen=True)
class ServedModel:
    """One pool, as clients know it."""

    name: str
    identity: PoolIdentity
    context_length: int
    vocab_size: int


class WorkerTable:
    """The last worker table a scheduler sent; kept when the schedulers are gone or new.

    Invariant: a model that was served stays until a scheduler sends a table without it that does
    not await it either. So one that has just started takes no model away.
    """

    def __init__(self) -> None:
        self._pools: list[Pool] = []
        self._models: dict[str, ServedModel] = {}
        # Declared models that the scheduler has not seen a worker of.
        self._awaited: frozenset[str] = frozenset()

    def update(self, pools: Iterable[Pool], awaited_models: Iterable[str] = ()) -> None:
        """Take a scheduler's table. An empty one says only that nobody registered yet."""
        newest = list(pools)
        self._awaited = frozenset(awaited_models)
        if not newest and not self._awaited:
            return
        kept = [p for p in self._pools if p.identity.served_model_name in self._awaited]
        self._pools = newest + kept
        self._models = {
            pool.identity.served_model_name: ServedModel(
                pool.identity.served_model_name,
                pool.identity,
                pool.context_length,
                pool.vocab_size,
            )
            for pool in self._pools
        }

    @property
    def models(self) -> list[ServedModel]:
        return list(self._models.values())

    @property
    def identity(self) -> PoolIdentity | None:
        """Of the first pool; the pools of one deployment share a tokenizer."""
        return self._pools[0].identity if self._pools else None

    def model(self, name: str) -> ServedModel:
        """The pool that serves `name`; empty and "default" mean the only one.

        Raises NotFoundError, InvalidRequestError, and UnavailableError while no worker of the
        model was ever seen.
        """
        if name in self._models:
            return self._models[name]
        if name in self._awaited:
            raise UnavailableError(f"no worker of the model `{name}` has registered yet")
        if not self._models:
            raise UnavailableError("no model is served yet")
        names = [*self._models, *sorted(self._awaited.difference(self._models))]
        if name in ("", "default"):
            if len(names) == 1:
                return self._models[names[0]]
            raise InvalidRequestError(
                f"several models are served; name one of {', '.join(names)}", "model"
            )
        raise NotFoundError(f"The model `{name}` does not exist; served: {', '.join(names)}")

    def workers(self, model: str | None = None) -> list[WorkerEntry]:
        return [
            worker
            for pool in self._pools
            if model is None or pool.identity.served_model_name == model
            for worker in pool.workers
        ]

    def has_ready_worker(self) -> bool:
        return any(worker.state == WORKER_STATE_READY for worker in self.workers())

    def has_ready_worker_beside(self, worker_id: str) -> bool:
        """Whether another worker of its pool could go on with what it runs."""
        return any(
            worker.state == WORKER_STATE_READY and worker.worker_id != worker_id
            for pool in self._pools
            if any(worker.worker_id == worker_id for worker in pool.workers)
            for worker in pool.workers
        )


class ControlPlane:
    """Placements from whichever scheduler answers, and the table for when none does."""

    def __init__(
        self,
        schedulers: Iterable[str],
        metrics: GatewayMetrics,
        num_choices_on: Callable[[str], int] = lambda _: 0,
        tls: PeerTls | None = None,
    ) -> None:
        self.table = WorkerTable()
        self.addresses = tuple(schedulers)
        self._schedulers = SchedulerSet(
            self.addresses,
            lambda last: self.table.update(last.pools, last.awaited_models),
            tls=tls,
        )
        self._metrics = metrics
        self._num_choices_on = num_choices_on
        metrics.schedulers_answering.set_function(lambda: self._schedulers.num_answering)

    def following(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Keep the table and send outcomes until the block ends."""
        return self._schedulers.following()

    def report(self, outcome: RequestOutcome) -> None:
        """Tell the schedulers, soon and at most once, how a placement went."""
        self._schedulers.report(outcome)

    async def schedule(self, request: ScheduleRequest) -> Placement:
        """Place one attempt; waits in the scheduler's queue. Raises its verdict."""
        failure: RhizomeError | None = None
        for scheduler in self._schedulers.in_order():
            try:
                return await scheduler.place(request)
            except RhizomeError as error:
                if error.status not in _NOT_A_VERDICT:
                    raise
                failure = error
        placement = self._place_without_scheduler(request)
        if placement is None:
            raise UnavailableError(
                f"no worker can serve the model `{request.model}` now"
            ) from failure
        self._metrics.placed_without_scheduler.inc()
        logger.warning(
            "event=placed_without_scheduler request_id=%s worker=%s",
            request.request_id,
            placement.worker_id,
        )
        return placement

    def _place_without_scheduler(self, request: ScheduleRequest) -> Placement | None:
        candidates = [
            worker
            for worker in self.table.workers(request.model)
            if worker.state == WORKER_STATE_READY
            and worker.role != WORKER_ROLE_DECODE
            and worker.worker_id not in request.excluded_worker_ids
        ]
        if not candidates:
            return None
        pair = random.sample(candidates, min(2, len(candidates)))
        chosen = min(pair, key=self._load)
        return Placement(
            worker_id=chosen.worker_id,
            address=chosen.address,
            epoch=chosen.epoch,
            policy=FALLBACK_POLICY,
        )

    def _load(self, worker: WorkerEntry) -> float:
        """Relative to its size; our own choices stand in when the table is older than they are."""
        running = max(
            worker.num_running + worker.num_waiting, self._num_choices_on(worker.worker_id)
        )
        return running / max(1, worker.max_running_sequences)


def duration(seconds: float) -> Duration:
    message = Duration()
    message.FromNanoseconds(max(0, round(seconds * 1e9)))
    return message
