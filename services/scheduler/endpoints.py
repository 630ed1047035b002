"""The live worker table: who is registered, in which state, with which load."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from services.common.errors import (
    NotFoundError,
    PreconditionError,
    RhizomeError,
    UnavailableError,
)
from services.scheduler.costs import DEFAULT_COST_MODEL, CostModel
from services.scheduler.pools import Pool
from services.scheduler.views import (
    NO_CHARGE,
    Charge,
    Load,
    Worker,
    WorkerState,
    WorkerView,
    view_of,
)

logger = logging.getLogger(__name__)

# Workers report at least every 500 ms: after two reports are missing, no new requests.
SUSPECT_AFTER_S = 1.0
# Nor for a worker whose engine is in one step for so much longer than predicted, or longer than
# that; after a while nobody waits for it any more.
_SUSPECT_STEPS = 5
_HUNG_AFTER_S = 30.0


class Registration:
    """One worker's standing, as long as its stream.

    `on_drain` is called once when the worker shall leave, `on_end` when somebody else than the
    worker itself ends the registration.
    """

    def __init__(
        self,
        worker: Worker,
        pool: Pool,
        on_drain: Callable[[str], None],
        on_end: Callable[[RhizomeError], None],
    ) -> None:
        self.worker = worker
        self.pool = pool
        self.on_drain = on_drain
        self.on_end = on_end


class PoolLimits(NamedTuple):
    """Of a pool's workers: what all of them take, and the longest context one takes."""

    context_length: int
    vocab_size: int
    longest_context: int


@dataclass(slots=True)
class _Entry:
    registration: Registration
    load: Load
    cost_model: CostModel
    last_seen: float
    charge: Charge = NO_CHARGE
    # When its engine's step number grew last, or it had nothing to do.
    stepped_at: float = 0.0
    silent: bool = False
    stuck: bool = False
    hung: bool = False
    # Its breaker is open.
    broken: bool = False
    drain_asked: bool = False

    @property
    def state(self) -> WorkerState:
        if self.hung:
            return WorkerState.HUNG
        if self.silent or self.stuck or self.broken:
            return WorkerState.SUSPECT
        draining = self.drain_asked or self.load.draining
        return WorkerState.DRAINING if draining else WorkerState.READY


class WorkerTable:
    """Registered workers, by id and by pool.

    Invariant: exactly one entry a worker id, owned by its newest registration; what an older
    registration says or its end does not touch it. Views are immutable: whoever holds a snapshot
    sees one moment. `on_change(membership)` runs after every change others can see: membership
    and state (True), or load alone (False).
    """

    def __init__(self, lease_s: float) -> None:
        self.version = 1
        self.on_change: Callable[[bool], None] = lambda membership: None
        self._lease_s = lease_s
        self._entries: dict[str, _Entry] = {}
        self._views: dict[Pool, dict[str, WorkerView]] = {}
        self._limits: dict[Pool, PoolLimits] = {}
        # A pool's last fit stands in for workers that have none yet.
        self._pool_costs: dict[Pool, CostModel] = {}

    def snapshot(self, pool: Pool) -> tuple[WorkerView, ...]:
        """The pool's workers now, in order of registration."""
        return tuple(self._views.get(pool, {}).values())

    def get(self, worker_id: str) -> WorkerView | None:
        entry = self._entries.get(worker_id)
        return None if entry is None else self._views[entry.registration.pool][worker_id]

    def views(self) -> list[WorkerView]:
        """Every registered worker."""
        return [view for views in list(self._views.values()) for view in list(views.values())]

    def has_workers(self, pool: Pool) -> bool:
        return bool(self._views.get(pool))

    def num_workers(self, pool: Pool) -> int:
        return len(self._views.get(pool, ()))

    def num_ready(self, pool: Pool) -> int:
        """Workers that may get new requests."""
        return sum(view.takes_prompts for view in self._views.get(pool, {}).values())

    def limits(self, pool: Pool) -> PoolLimits:
        """Of its last workers while it is empty."""
        return self._limits.get(pool, PoolLimits(0, 0, 0))

    def register(self, registration: Registration, now: float) -> None:
        """Take a worker in; an older registration of the same id ends."""
        worker = registration.worker
        old = self._entries.get(worker.worker_id)
        if old is not None:
            self._remove(old)
            replaced = f"worker {worker.worker_id} registered again, epoch {worker.epoch:x}"
            old.registration.on_end(PreconditionError(replaced))
        costs = self._pool_costs.get(registration.pool, DEFAULT_COST_MODEL)
        entry = _Entry(registration, Load(num_free_pages=worker.num_pages), costs, now, NO_CHARGE)
        entry.stepped_at = now
        self._entries[worker.worker_id] = entry
        self._refresh(entry)
        self._note_limits(registration.pool)
        self._changed(True)

    def report(
        self,
        registration: Registration,
        load: Load,
        now: float,
        admitted: Charge = NO_CHARGE,
    ) -> None:
        """Take a worker's report over; `admitted` is the charge it now includes itself."""
        entry = self._owned(registration)
        if entry is None:
            return
        before = entry.state, entry.load.num_running, entry.load.num_waiting
        last, entry.load, entry.last_seen, entry.silent = entry.load, load, now, False
        if (
            not (load.engine_busy and last.engine_busy)
            or load.engine_step_number != last.engine_step_number
        ):
            if entry.stuck:
                logger.info("event=worker_steps_again worker=%s", registration.worker.worker_id)
            entry.stepped_at, entry.stuck, entry.hung = now, False, False
        if load.cost_model is not None:
            self._take_fit(entry, load.cost_model)
        if admitted is not NO_CHARGE:
            entry.charge = entry.charge.minus(admitted)
        self._refresh(entry)
        if before != (entry.state, load.num_running, load.num_waiting):
            self._changed(before[0] is not entry.state)

    def add_charge(self, worker: Worker, charge: Charge) -> None:
        """Count `charge` on the worker; without effect once its epoch is gone."""
        entry = self._entries.get(worker.worker_id)
        if entry is not None and entry.registration.worker is worker:
            entry.charge = entry.charge.plus(charge)
            self._refresh(entry)

    def remove_charge(self, worker: Worker, charge: Charge) -> None:
        """The reverse of `add_charge`."""
        entry = self._entries.get(worker.worker_id)
        if entry is not None and entry.registration.worker is worker:
            entry.charge = entry.charge.minus(charge)
            self._refresh(entry)

    def drain(self, worker_id: str, reason: str) -> None:
        """No new placements; the worker is asked once to leave. Raises NotFoundError."""
        entry = self._entries.get(worker_id)
        if entry is None:
            raise NotFoundError(f"no worker {worker_id} is registered")
        if entry.drain_asked:
            return
        entry.drain_asked = True
        self._refresh(entry)
        self._changed(True)
        entry.registration.on_drain(reason)

    def remove(self, registration: Registration) -> bool:
        """The worker's stream ended; False when a newer registration owns its entry."""
        entry = self._owned(registration)
        if entry is None:
            return False
        self._remove(entry)
        self._changed(True)
        return True

    def sweep(self, now: float) -> list[Worker]:
        """Suspect the silent, remove those whose lease ran out; returns the removed."""
        removed = []
        for entry in list(self._entries.values()):
            silence = now - entry.last_seen
            worker = entry.registration.worker
            if silence > self._lease_s:
                self._remove(entry)
                removed.append(worker)
                self._changed(True)
                error = UnavailableError(f"no load report for {silence:.1f} s: the lease ended")
                entry.registration.on_end(error)
                continue
            before = entry.state
            entry.silent = silence > SUSPECT_AFTER_S
            self._judge_step(entry, now)
            if entry.state is not before:
                logger.warning(
                    "event=worker_suspect worker=%s silent=%s stuck=%s hung=%s",
                    *(worker.worker_id, entry.silent, entry.stuck, entry.hung),
                )
                self._refresh(entry)
                self._changed(True)
        return removed

    def set_broken(self, worker_id: str, broken: bool) -> None:
        """Its breaker opened, or lets a request through."""
        entry = self._entries.get(worker_id)
        if entry is not None and entry.broken is not broken:
            entry.broken = broken
            self._refresh(entry)
            self._changed(True)

    def _judge_step(self, entry: _Entry, now: float) -> None:
        """Whether its engine is in one step for too long."""
        stepping_s = now - entry.stepped_at
        patience_s = max(SUSPECT_AFTER_S, _SUSPECT_STEPS * entry.load.predicted_step_ns / 1e9)
        entry.stuck = entry.load.engine_busy and stepping_s > patience_s
        entry.hung = entry.stuck and stepping_s > max(_HUNG_AFTER_S, 2 * patience_s)

    def _owned(self, registration: Registration) -> _Entry | None:
        entry = self._entries.get(registration.worker.worker_id)
        return entry if entry is not None and entry.registration is registration else None

    def _take_fit(self, entry: _Entry, fitted: CostModel) -> None:
        """The pool's first fit is that of all its workers, until they have their own.

        Beside fitted ones, a worker with the defaults could seem faster by orders of magnitude.
        """
        pool = entry.registration.pool
        if pool not in self._pool_costs:
            for worker_id in self._views[pool]:
                self._entries[worker_id].cost_model = fitted
                self._refresh(self._entries[worker_id])
        entry.cost_model = self._pool_costs[pool] = fitted

    def _remove(self, entry: _Entry) -> None:
        worker_id = entry.registration.worker.worker_id
        del self._entries[worker_id]
        del self._views[entry.registration.pool][worker_id]
        self._note_limits(entry.registration.pool)

    def _note_limits(self, pool: Pool) -> None:
        workers = [view.worker for view in self._views[pool].values()]
        if workers:
            self._limits[pool] = PoolLimits(
                min(worker.context_length for worker in workers),
                min(worker.vocab_size for worker in workers),
                max(worker.context_length for worker in workers),
            )

    def _refresh(self, entry: _Entry) -> None:
        worker = entry.registration.worker
        self._views.setdefault(entry.registration.pool, {})[worker.worker_id] = view_of(
            worker, entry.state, entry.load, entry.cost_model, entry.charge
        )

    def _changed(self, membership: bool) -> None:
        self.version += 1
        self.on_change(membership)
