"""Records of the scheduler with defaults, for tests."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.common.errors import RhizomeError
from services.scheduler.costs import DEFAULT_COST_MODEL, CostModel
from services.scheduler.endpoints import Registration
from services.scheduler.policy import PlacementRequest, Query
from services.scheduler.pools import Pool, PoolIdentity
from services.scheduler.views import (
    NO_CHARGE,
    Charge,
    Load,
    Worker,
    WorkerRole,
    WorkerState,
    WorkerView,
    view_of,
)

PAGE_SIZE = 16


@dataclass
class Clock:
    """A clock that stands still until it is moved."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Orders:
    """Collects what a registration was told."""

    def __init__(self) -> None:
        self.drains: list[str] = []
        self.errors: list[RhizomeError] = []


def make_identity(**changes: Any) -> PoolIdentity:
    fields: dict[str, Any] = {
        "served_model_name": "model",
        "model_revision": "r1",
        "tokenizer_digest": "t1",
        "template_digest": "c1",
        "page_size": PAGE_SIZE,
        "hash_version": 1,
    }
    return PoolIdentity(**{**fields, **changes})


def make_worker(worker_id: str = "w0", **changes: Any) -> Worker:
    fields: dict[str, Any] = {
        "worker_id": worker_id,
        "address": f"localhost:{worker_id}",
        "epoch": 1,
        "role": WorkerRole.MIXED,
        "num_pages": 10_000,
        "max_running_sequences": 64,
        "context_length": 100_000,
        "vocab_size": 1000,
        "page_size": PAGE_SIZE,
    }
    return Worker(**{**fields, **changes})


def make_view(
    worker_id: str = "w0",
    *,
    state: WorkerState = WorkerState.READY,
    charge: Charge = NO_CHARGE,
    cost_model: CostModel = DEFAULT_COST_MODEL,
    worker: Mapping[str, Any] | None = None,
    **load: Any,
) -> WorkerView:
    fields: dict[str, Any] = {"num_free_pages": 10_000, **load}
    made = make_worker(worker_id, **(worker or {}))
    return view_of(made, state, Load(**fields), cost_model, charge)


def make_request(request_id: str = "r", **changes: Any) -> PlacementRequest:
    fields: dict[str, Any] = {"model": "model", "num_prompt_tokens": 1000, "max_new_tokens": 100}
    return PlacementRequest(request_id=request_id, **{**fields, **changes})


def make_query(
    request: PlacementRequest | None = None,
    cached_tokens: Mapping[str, int] | None = None,
    num_output_tokens: int = 100,
    home_worker_id: str | None = None,
    shared_tokens: Mapping[str, int] | None = None,
) -> Query:
    return Query(
        request or make_request(),
        cached_tokens or {},
        num_output_tokens,
        home_worker_id,
        shared_tokens=shared_tokens or {},
    )


def make_registration(
    worker: Worker | None = None, pool: Pool | None = None, orders: Orders | None = None
) -> Registration:
    orders = orders or Orders()
    return Registration(
        worker or make_worker(), pool or Pool({}), orders.drains.append, orders.errors.append
    )


def chain(name: int, num_pages: int) -> list[int]:
    """Hashes of a prompt that shares nothing with other names' prompts."""
    return [name * 1_000_000 + page + 1 for page in range(num_pages)]
