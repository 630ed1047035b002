"""How a worker is chosen: filters, then scorers, then a picker, over one immutable snapshot.

Scores are predicted nanoseconds, less is better: times add up, so prefix match and load are
weighed in one unit, whatever the prompt's length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from services.scheduler.views import WorkerView

# A worker may die of anything; the same request twice is hardly chance.
_SUSPECT_LOSSES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementRequest:
    """What `Schedule` was asked, in the scheduler's words."""

    request_id: str
    model: str
    num_prompt_tokens: int
    attempt: int = 0
    # Hashes of the prompt's full pages, first page first.
    prefix_hashes: Sequence[int] = ()
    max_new_tokens: int = 0
    num_choices: int = 1
    # Whose request it is; empty where nobody says.
    tenant: str = ""
    # Higher goes first, whatever waits below it.
    priority: int = 0
    # Workers that died under it.
    num_losses: int = 0
    excluded_worker_ids: frozenset[str] = frozenset()
    # Tenant and session; None outside a session.
    session: tuple[str, str] | None = None
    # What histograms keep of it, to lead to its trace; None for one that is not recorded.
    exemplar: dict[str, str] | None = None

    @property
    def is_suspect(self) -> bool:
        """Whether it may be what killed the workers that it lost."""
        return self.num_losses >= _SUSPECT_LOSSES

    @property
    def key(self) -> tuple[str, int]:
        return self.request_id, self.attempt


@dataclass(frozen=True, slots=True)
class Query:
    """A request with what is predicted about it at the moment of choice."""

    request: PlacementRequest
    # Prompt tokens expected in a worker's cache; workers without any are left out.
    cached_tokens: Mapping[str, int]
    # Output tokens that a choice probably will have.
    num_output_tokens: int = 0
    # The worker that served the request's session last.
    home_worker_id: str | None = None
    # The scheduler's time, and how long the request has waited in its queue.
    now_s: float = 0.0
    waited_s: float = 0.0
    # Of the cached tokens, those that requests placed there lately share: rows that decode
    # together read a common prefix about once (bench/results/shared_prefix_gpu.md).
    shared_tokens: Mapping[str, int] = field(default_factory=dict)

    def num_read_tokens(self, worker_id: str) -> int:
        """Context that a choice's decode steps read there beside what others read."""
        return self.request.num_prompt_tokens - self.shared_tokens.get(worker_id, 0)


class Filter(Protocol):
    """Keeps the workers that may have the request."""

    def __call__(
        self, request: PlacementRequest, workers: Sequence[WorkerView]
    ) -> list[WorkerView]: ...


class Scorer(Protocol):
    """Predicted nanoseconds, one a worker; None where all are alike to it."""

    def __call__(self, query: Query, workers: Sequence[WorkerView]) -> list[float] | None: ...


class Picker(Protocol):
    """Index of the worker to take; `costs` are the weighted sums of the scores."""

    def __call__(
        self, query: Query, workers: Sequence[WorkerView], costs: Sequence[float]
    ) -> int: ...


@dataclass(frozen=True, slots=True)
class Policy:
    """A named choice. `scorers` come with their weights."""

    name: str
    scorers: Sequence[tuple[Scorer, float]]
    picker: Picker
    # It may choose a worker without room; the request then waits for that one.
    waits: bool = False
    # What `branch` says, for policies with rules of their own.
    rule: Callable[[Query, WorkerView], str] | None = None

    def choose(self, query: Query, workers: Sequence[WorkerView]) -> WorkerView:
        """One of `workers`, which must not be empty."""
        costs = [0.0] * len(workers)
        for scorer, weight in self.scorers:
            scores = scorer(query, workers)
            if scores is not None:
                costs = [cost + weight * score for cost, score in zip(costs, scores)]  # noqa: B905
        return workers[self.picker(query, workers, costs)]

    def branch(self, query: Query, chosen: WorkerView) -> str:
        """Why, for traces: `policy/affinity`, `/spread` (a better match lost) or `/cold`."""
        if self.rule is not None:
            return f"{self.name}/{self.rule(query, chosen)}"
        if not query.cached_tokens:
            return f"{self.name}/cold"
        best = max(query.cached_tokens.values())
        matched = query.cached_tokens.get(chosen.worker_id, 0)
        return f"{self.name}/{'affinity' if matched == best else 'spread'}"
