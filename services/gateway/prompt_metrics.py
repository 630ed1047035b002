"""Prometheus metrics of prompts, by whose they are. They are counted when a prompt ends."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

# Of whom a prompt's metrics are: its model, and its tenant where the operator listed it.
_WHOSE = ("model", "tenant")

_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 30, 60, 120, 400)
_TPOT_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 8)
_QUEUE_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
_E2E_BUCKETS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40, 80, 160, 320, 640, 1200, 2400)


class PromptMetrics:
    """How prompts ended, what tokens they took, and their times in seconds."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.prompts = Counter(
            "rhizome_gateway_prompts_total",
            "Prompts by how they ended: ok, refused, overloaded, cancelled or failed.",
            ("model", "tenant", "outcome"),
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "rhizome_gateway_prompt_tokens_total",
            "Prompt tokens.",
            _WHOSE,
            registry=registry,
        )
        self.cached_tokens = Counter(
            "rhizome_gateway_cached_tokens_total",
            "Prompt tokens that a worker's cache held.",
            _WHOSE,
            registry=registry,
        )
        self.output_tokens = Counter(
            "rhizome_gateway_output_tokens_total", "Output tokens.", _WHOSE, registry=registry
        )
        self.queue_time = Histogram(
            "rhizome_gateway_queue_seconds",
            "From asking for a worker until one was named, over all of a prompt's attempts.",
            _WHOSE,
            buckets=_QUEUE_BUCKETS,
            registry=registry,
        )
        self.time_to_first_token = Histogram(
            "rhizome_gateway_time_to_first_token_seconds",
            "From the request's arrival to its first token.",
            _WHOSE,
            buckets=_TTFT_BUCKETS,
            registry=registry,
        )
        self.time_per_output_token = Histogram(
            "rhizome_gateway_time_per_output_token_seconds",
            "Mean time between a choice's tokens after the first.",
            _WHOSE,
            buckets=_TPOT_BUCKETS,
            registry=registry,
        )
        self.request_latency = Histogram(
            "rhizome_gateway_request_latency_seconds",
            "From the request's arrival to its end.",
            _WHOSE,
            buckets=_E2E_BUCKETS,
            registry=registry,
        )
