"""What placement sees of workers: immutable records, replaced whole when something changes."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

from services.scheduler.costs import DEFAULT_COST_MODEL, CostModel


class WorkerState(enum.Enum):
    """Whether a worker may get new requests.

    A suspect is silent, stuck in a step, or failed again and again: it may be back any moment. One
    that is hung has been stuck for so long that nobody waits for it.
    """

    READY = 1
    DRAINING = 2
    SUSPECT = 3
    HUNG = 4


class WorkerRole(enum.Enum):
    """Which part of a request a worker serves."""

    MIXED = 1
    PREFILL = 2
    DECODE = 3


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Worker:
    """Who a worker is; one object a registration, compared by identity."""

    worker_id: str
    address: str
    epoch: int
    role: WorkerRole
    num_pages: int
    max_running_sequences: int
    context_length: int
    vocab_size: int
    page_size: int


class Load(NamedTuple):
    """What a worker last said about itself."""

    num_free_pages: int
    num_evictable_pages: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_waiting_uncached_tokens: int = 0
    num_running_context_tokens: int = 0
    draining: bool = False
    # Whether the engine has work, the steps it has made, and how long one may take.
    engine_busy: bool = False
    engine_step_number: int = 0
    predicted_step_ns: int = 0
    # Prefill time x request share of its next 2^k pages to be evicted, k = 0, 1, 2 ...
    eviction_cost_ns: tuple[float, ...] = ()
    # The worker's own fit; None until there is one.
    cost_model: CostModel | None = None


class Charge(NamedTuple):
    """What placed requests will add to a worker's load, until its reports include them.

    Whole numbers, so that charging and giving back in any order ends at exactly zero.
    """

    num_sequences: int = 0
    num_pages: int = 0
    num_context_tokens: int = 0
    prefill_ns: int = 0

    def plus(self, other: Charge) -> Charge:
        return Charge(
            self.num_sequences + other.num_sequences,
            self.num_pages + other.num_pages,
            self.num_context_tokens + other.num_context_tokens,
            self.prefill_ns + other.prefill_ns,
        )

    def minus(self, other: Charge) -> Charge:
        return Charge(
            self.num_sequences - other.num_sequences,
            self.num_pages - other.num_pages,
            self.num_context_tokens - other.num_context_tokens,
            self.prefill_ns - other.prefill_ns,
        )


NO_CHARGE = Charge()


class WorkerView(NamedTuple):
    """One worker as policies see it: its last report plus what is charged on top.

    Made twice a request and read for every worker a request, so what policies need is worked out
    here. (A named tuple is made three times as fast as a frozen dataclass.)
    """

    worker: Worker
    worker_id: str
    state: WorkerState
    # Ready, and its role is to prefill.
    takes_prompts: bool
    load: Load
    cost_model: CostModel
    charge: Charge
    # Sequences it runs, keeps waiting, or is about to get; and how many more it can run.
    num_active: int
    num_free_sequences: int
    # Predicted time until a request that arrives now starts its prefill.
    queued_prefill_ns: float
    # Predicted decode step of all active sequences.
    decode_step_ns: float
    # Tokens a newcomer could have pages for; below zero when more is promised than there is.
    num_available_tokens: int


def view_of(
    worker: Worker,
    state: WorkerState,
    load: Load,
    cost_model: CostModel = DEFAULT_COST_MODEL,
    charge: Charge = NO_CHARGE,
) -> WorkerView:
    """The view in which `charge` counts as if the worker had reported it.

    What no step has computed yet has no pages, and will take those of its uncached tokens.
    """
    num_waiting_tokens = load.num_waiting_uncached_tokens
    num_active = load.num_running + load.num_waiting + charge.num_sequences
    num_context_tokens = (
        load.num_running_context_tokens + num_waiting_tokens + charge.num_context_tokens
    )
    num_available_pages = (
        load.num_free_pages
        + load.num_evictable_pages
        - -(-num_waiting_tokens // worker.page_size)
        - charge.num_pages
    )
    return WorkerView(
        worker,
        worker.worker_id,
        state,
        state is WorkerState.READY and worker.role is not WorkerRole.DECODE,
        load,
        cost_model,
        charge,
        num_active,
        worker.max_running_sequences - num_active,
        num_waiting_tokens * cost_model.prefill_token_ns + charge.prefill_ns,
        cost_model.decode_step_ns(num_active, num_context_tokens),
        num_available_pages * worker.page_size,
    )
