"""What the controller counts. Groups are those of one release's chart: a bounded set."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge

_PREFIX = "rhizome_controller_"


class ControllerMetrics:
    """One registry and its metrics."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.gang_restarts = self._counter(
            "gang_restarts", "Units of which all pods were replaced because one was lost", "group"
        )
        self.rollouts = self._counter(
            "rollouts", "Units of which all pods were replaced for a new revision", "group"
        )
        self.scalings = self._counter(
            "scalings", "Changes of a group's number of workers", "group", "direction"
        )
        self.drains = self._counter("drains", "Workers that a scheduler was told to drain")
        self.forced_deletions = self._counter(
            "forced_deletions", "Pods removed that a dead node did not give back"
        )
        self.kubernetes_failures = self._counter(
            "kubernetes_failures", "Changes that the API server refused or did not answer"
        )
        self.scheduler_failures = self._counter(
            "scheduler_failures", "Calls that a scheduler did not answer"
        )
        self.workers = self._gauge("workers", "Workers that a group is asked to have", "group")
        self.wanted_workers = self._gauge(
            "wanted_workers", "Workers that the load asks for, windows aside", "group"
        )
        self.signals_missing = self._gauge(
            "signals_missing", "Whether a value that a group is scaled by is unknown", "group"
        )

    def show_leading(self, read: Callable[[], float]) -> None:
        """`leads`: whether this replica acts."""
        self._gauge("leads", "Whether this replica acts").set_function(read)

    def forget_groups(self) -> None:
        """What was said of groups is not this replica's to say any more, or they are gone."""
        for gauge in (self.workers, self.wanted_workers, self.signals_missing):
            gauge.clear()

    def value(self, name: str, **labels: str) -> float:
        """The current value of a sample, without the common prefix; 0 where there is none."""
        return self.registry.get_sample_value(f"{_PREFIX}{name}", labels) or 0.0

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(f"{_PREFIX}{name}", documentation, labels, registry=self.registry)

    def _gauge(self, name: str, documentation: str, *labels: str) -> Gauge:
        return Gauge(f"{_PREFIX}{name}", documentation, labels, registry=self.registry)
