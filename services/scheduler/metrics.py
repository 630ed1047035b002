"""What the scheduler counts."""

from __future__ import annotations

import functools
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_PREFIX = "rhizome_scheduler_"
# Any 32-bit number is a priority; metrics tell these apart.
PRIORITY_LABELS = ("high", "normal", "low")


def priority_label(priority: int) -> str:
    """The class of a priority in metrics."""
    return "normal" if priority == 0 else "high" if priority > 0 else "low"


class SchedulerMetrics:
    """One registry and its metrics; gauges read their owners when scraped."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.placements = self._counter(
            "placements", "Placements by policy and the branch it took", "policy"
        )
        self.failures = self._counter(
            "schedule_failures", "Schedule calls that ended without a placement", "code"
        )
        self.refusals = self._counter(
            "registrations_refused", "Refused registrations by the field that differed", "field"
        )
        self.expired = self._counter(
            "reservations_expired", "Reservations that no worker admitted in time"
        )
        self.predicted_cached_tokens = self._counter(
            "predicted_cached_tokens", "Cached prompt tokens predicted, of reported requests"
        )
        self.actual_cached_tokens = self._counter(
            "actual_cached_tokens", "Cached prompt tokens found, of reported requests"
        )
        self.overpredicted_tokens = self._counter(
            "overpredicted_cached_tokens", "Predicted tokens that were not cached"
        )
        self.reported_prompt_tokens = self._counter(
            "reported_prompt_tokens", "Prompt tokens of reported requests"
        )
        self.index_failures = self._counter(
            "index_failures", "Questions the cache index did not answer in time"
        )
        self.index_skipped = self._counter(
            "index_skipped", "Requests placed without asking the silent cache index"
        )
        self.sheds = self._counter(
            "sheds",
            "Requests refused or pushed out for lack of room, by reason and priority class",
            "reason",
            "priority",
        )
        self.tenant_service = self._counter(
            "tenant_service",
            "Service of ended requests in weighted tokens; tenants that the operator listed",
            "tenant",
        )
        self.worker_failures = self._counter(
            "worker_failures", "Failures of workers that breakers counted"
        )
        self.queue_seconds = Histogram(
            f"{_PREFIX}queue_seconds",
            "Time from arrival to placement, by priority class",
            ("priority",),
            buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
            registry=self.registry,
        )

    def gauge(self, name: str, documentation: str, read: Callable[[], float]) -> None:
        """A gauge whose value is read when somebody asks."""
        Gauge(f"{_PREFIX}{name}", documentation, registry=self.registry).set_function(read)

    def gauge_by_priority(
        self, name: str, documentation: str, read: Callable[[str], float]
    ) -> None:
        """As `gauge`, one a priority class."""
        gauge = Gauge(f"{_PREFIX}{name}", documentation, ("priority",), registry=self.registry)
        for label in PRIORITY_LABELS:
            gauge.labels(label).set_function(functools.partial(read, label))

    def value(self, name: str, **labels: str) -> float:
        """The current value of a sample, without the common prefix; 0 where there is none."""
        return self.registry.get_sample_value(f"{_PREFIX}{name}", labels) or 0.0

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(f"{_PREFIX}{name}", documentation, labels, registry=self.registry)
