"""Requests under SGLang's names, for dashboards that know those: views of our own metrics.

They are made when somebody scrapes, so a request is counted once. What engines do is under the same
prefix at the workers (`services/worker/sglang_metrics.py`); no name is at both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from prometheus_client import Counter, Histogram
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.gateway.prompt_metrics import PromptMetrics

_PREFIX = "sglang:"
_MODEL = ("model_name",)


class SglangCollector(Collector):
    """By model alone: SGLang knows no tenants."""

    def __init__(self, metrics: PromptMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        metrics = self._metrics
        yield _counter("num_requests", "Prompts that ended.", metrics.prompts)
        yield _counter(
            "num_aborted_requests", "Prompts given up.", metrics.prompts, outcome="cancelled"
        )
        yield _counter("prompt_tokens", "Prompt tokens.", metrics.prompt_tokens)
        yield _counter("generation_tokens", "Output tokens.", metrics.output_tokens)
        cached = CounterMetricFamily(
            f"{_PREFIX}cached_tokens",
            "Prompt tokens that a worker's cache held.",
            labels=(*_MODEL, "cache_source"),
        )
        for model, value in _sums(metrics.cached_tokens).items():
            cached.add_metric((model, "device"), value)
        yield cached
        yield _histogram(
            "time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            metrics.time_to_first_token,
        )
        yield _histogram(
            "e2e_request_latency_seconds",
            "From a request's arrival to its end.",
            metrics.request_latency,
        )


def _sums(counter: Counter, **labels: str) -> dict[str, float]:
    """By model, of the samples with these labels."""
    sums: defaultdict[str, float] = defaultdict(float)
    for metric in counter.collect():
        for sample in metric.samples:
            if sample.name.endswith("_total"):
                wanted = all(sample.labels[name] == value for name, value in labels.items())
                sums[sample.labels["model"]] += sample.value if wanted else 0.0
    return sums


def _counter(name: str, documentation: str, counter: Counter, **labels: str) -> Metric:
    family = CounterMetricFamily(f"{_PREFIX}{name}", documentation, labels=_MODEL)
    for model, value in _sums(counter, **labels).items():
        family.add_metric((model,), value)
    return family


def _histogram(name: str, documentation: str, histogram: Histogram) -> Metric:
    buckets: defaultdict[str, dict[str, float]] = defaultdict(dict)
    sums: defaultdict[str, float] = defaultdict(float)
    for metric in histogram.collect():
        for sample in metric.samples:
            model = sample.labels["model"]
            if (bound := sample.labels.get("le")) is not None:
                counts = buckets[model]
                counts[bound] = counts.get(bound, 0.0) + sample.value
            elif sample.name.endswith("_sum"):
                sums[model] += sample.value
    family = HistogramMetricFamily(f"{_PREFIX}{name}", documentation, labels=_MODEL)
    for model, counts in buckets.items():
        family.add_metric((model,), buckets=list(counts.items()), sum_value=sums[model])
    return family
