"""Prometheus metrics of a worker, read when they are asked for from what the engine last said."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.worker.replica import Replica
from services.worker.sglang_metrics import sglang_metrics
from services.worker.step_totals import StepTotals

_PREFIX = "rhizome_worker"


class WorkerCollector(Collector):
    """The replica's numbers as they are now. Units: tokens, pages, sequences, seconds.

    With `engine_pid`, also what the system says of that process.
    """

    def __init__(self, replica: Replica, engine_pid: int | None = None) -> None:
        self._replica = replica
        self._engine: Collector | None = None
        if engine_pid is not None:
            self._engine = ProcessCollector(
                namespace=f"{_PREFIX}_engine", pid=lambda: engine_pid, registry=None
            )

    def collect(self) -> Iterator[Metric]:
        yield from self._info()
        yield from self._gauges()
        yield from self._counters()
        yield from _distributions(self._replica.totals)
        yield from sglang_metrics(self._replica)
        if self._engine is not None:
            yield from self._engine.collect()

    def _info(self) -> Iterator[Metric]:
        """What it is, once the engine has said so."""
        identity, ready = self._replica.identity, self._replica.ready
        if ready is not None:
            info = GaugeMetricFamily(
                f"{_PREFIX}_info",
                "What the worker is; always 1.",
                labels=("worker", "model", "device", "dtype", "attention_backend", "tp_size"),
            )
            kinds = (ready.device, ready.dtype, ready.attention_backend, str(ready.tp_size))
            info.add_metric((identity.worker_id, identity.pool.served_model_name, *kinds), 1)
            yield info

    def _gauges(self) -> Iterator[Metric]:
        replica, load = self._replica, self._replica.load
        ready = replica.ready
        num_pages = 0 if ready is None else ready.num_pages
        gauges = (
            ("serving", "1 while new requests may come.", replica.serving),
            ("running_sequences", "Sequences that run.", load.num_running),
            ("waiting_sequences", "Sequences that wait to run.", load.num_waiting),
            (
                "waiting_uncached_tokens",
                "Known tokens that are still to be computed.",
                load.num_waiting_uncached_tokens,
            ),
            (
                "running_context_tokens",
                "Tokens in place, over all running sequences.",
                load.num_running_context_tokens,
            ),
            ("pages", "Pages of the key/value cache.", num_pages),
            ("free_pages", "Pages that hold nothing.", load.num_free_pages),
            (
                "evictable_pages",
                "Cached pages that no running sequence uses.",
                load.num_evictable_pages,
            ),
            (
                "used_pages",
                "Pages that running sequences use.",
                max(0, num_pages - load.num_free_pages - load.num_evictable_pages),
            ),
            (
                "max_running_sequences",
                "Most sequences that run at once.",
                0 if ready is None else ready.max_running_sequences,
            ),
            ("predicted_step_seconds", "Moving mean of step times.", load.predicted_step_ns / 1e9),
        )
        for name, documentation, value in gauges:
            yield GaugeMetricFamily(f"{_PREFIX}_{name}", documentation, value)

    def _counters(self) -> Iterator[Metric]:
        load, totals = self._replica.load, self._replica.totals
        counters = (
            (
                "prompt_tokens",
                "Prompt tokens of sequences that began to run.",
                load.num_prompt_tokens,
            ),
            ("cached_prompt_tokens", "Those of them found in the cache.", load.num_cached_tokens),
            ("computed_prefill_tokens", "Tokens computed in prefill rows.", totals.prefill_tokens),
            ("output_tokens", "Tokens sampled.", load.num_output_tokens),
            ("preemptions", "Times that a sequence gave way to others.", load.num_preemptions),
            ("evicted_pages", "Cached pages that gave way to others.", load.num_evicted_pages),
        )
        for name, documentation, value in counters:
            yield CounterMetricFamily(f"{_PREFIX}_{name}", documentation, value)
        ended = CounterMetricFamily(
            f"{_PREFIX}_ended_sequences", "Sequences that ended, by reason.", labels=["reason"]
        )
        for reason, count in dict(totals.num_ended).items():
            ended.add_metric((reason,), count)
        yield ended


def _distributions(totals: StepTotals) -> Iterator[Metric]:
    histograms = (
        (
            "step_seconds",
            "Time of a step on the device; its sum is the time that the device was busy.",
            totals.step_seconds,
        ),
        (
            "token_seconds",
            "From a sequence's token to its next, as the worker's front sees them come.",
            totals.token_seconds,
        ),
        (
            "queue_seconds",
            "From a sequence's arrival at the engine until it began to run.",
            totals.queue_seconds,
        ),
        ("step_sequences", "Sequences in a step.", totals.step_sequences),
        ("step_tokens", "Tokens that a step computed.", totals.step_tokens),
    )
    for name, documentation, distribution in histograms:
        yield HistogramMetricFamily(
            f"{_PREFIX}_{name}",
            documentation,
            buckets=distribution.buckets(),
            sum_value=distribution.total,
        )
