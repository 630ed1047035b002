"""Prometheus metrics of a worker, read when they are asked for from what the engine last said."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.worker.replica import Replica
from services.worker.step_totals import STEP_BOUNDS_S, StepTotals

_PREFIX = "rhizome_worker"


class WorkerCollector(Collector):
    """The replica's numbers as they are now. Units: tokens, pages, sequences, seconds."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    def collect(self) -> Iterator[Metric]:
        replica, load, totals = self._replica, self._replica.load, self._replica.totals
        ready = replica.ready
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
            ("pages", "Pages of the key/value cache.", 0 if ready is None else ready.num_pages),
            ("free_pages", "Pages that hold nothing.", load.num_free_pages),
            (
                "evictable_pages",
                "Cached pages that no running sequence uses.",
                load.num_evictable_pages,
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
        )
        for name, documentation, value in counters:
            yield CounterMetricFamily(f"{_PREFIX}_{name}", documentation, value)
        ended = CounterMetricFamily(
            f"{_PREFIX}_ended_sequences", "Sequences that ended, by reason.", labels=["reason"]
        )
        for reason, count in dict(totals.num_ended).items():
            ended.add_metric((reason,), count)
        yield ended
        yield _step_seconds(totals)


def _step_seconds(totals: StepTotals) -> HistogramMetricFamily:
    bounds = (*(str(bound) for bound in STEP_BOUNDS_S), "+Inf")
    counts = accumulate(totals.num_steps_by_time)
    return HistogramMetricFamily(
        f"{_PREFIX}_step_seconds",
        "Time of a step, from the result before to its own.",
        buckets=list(zip(bounds, map(float, counts), strict=True)),
        sum_value=totals.step_ns / 1e9,
    )
