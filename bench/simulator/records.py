"""What a simulated run is told and what it tells."""

from __future__ import annotations

from dataclasses import dataclass

from bench.simulator.worker import Report
from services.scheduler.costs import DEFAULT_COST_MODEL, CostModel
from services.scheduler.views import Load
from services.worker.cost_model import CostCoefficients


@dataclass(frozen=True, kw_only=True, slots=True)
class Delays:
    """Nanoseconds from sending to arrival; each lane keeps its order."""

    schedule: int = 400_000
    match: int = 500_000
    submit: int = 400_000
    output: int = 300_000
    report: int = 1_000_000
    events: int = 2_000_000
    outcome: int = 2_000_000
    # From a worker's death to its callers knowing.
    death: int = 5_000_000


@dataclass(frozen=True, slots=True)
class Loss:
    """A worker dies, and comes back empty `back_after_s` later (never: None)."""

    at_s: float
    worker: int
    back_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """One request from its arrival to its last token, in seconds."""

    arrived_s: float
    first_token_s: float
    latency_s: float
    queued_s: float
    prompt_tokens: int
    cached_tokens: int
    predicted_tokens: int
    output_tokens: int
    num_attempts: int
    worker_id: str


def reported_load(report: Report) -> Load:
    """As `services/scheduler/wire.py` reads a report."""
    load, fitted = report.load, report.coefficients
    costs = None if fitted is None else _cost_model(fitted)
    return Load(
        num_free_pages=load.num_free_pages,
        num_evictable_pages=load.num_evictable_pages,
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        num_waiting_uncached_tokens=load.num_waiting_uncached_tokens,
        num_running_context_tokens=load.num_running_context_tokens,
        eviction_cost_ns=tuple(report.eviction_cost_ns),
        cost_model=costs,
    )


def _cost_model(fitted: CostCoefficients) -> CostModel:
    """A fit that has not seen one kind of step yet takes the defaults for it."""
    has_prefill = fitted.prefill_base_ns + fitted.prefill_token_ns + fitted.prefill_context_ns > 0
    has_decode = fitted.decode_base_ns + fitted.decode_sequence_ns > 0
    prefill = fitted if has_prefill else DEFAULT_COST_MODEL
    decode = fitted if has_decode else DEFAULT_COST_MODEL
    return CostModel(
        prefill_base_ns=prefill.prefill_base_ns,
        prefill_token_ns=prefill.prefill_token_ns,
        prefill_context_ns=prefill.prefill_context_ns,
        decode_base_ns=decode.decode_base_ns,
        decode_sequence_ns=decode.decode_sequence_ns,
        decode_context_ns=decode.decode_context_ns,
    )
