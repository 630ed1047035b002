"""Prometheus metrics of the gateway. Labels are bounded: endpoints, statuses, models, the tenants
that the operator listed.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder

from services.gateway.sglang_metrics import SglangCollector, SglangSources

# Of whom a prompt's metrics are: its model, and its tenant where the operator listed it.
_WHOSE = ("model", "tenant")

_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 30, 60, 120, 400)
_TPOT_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 8)
_QUEUE_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
_E2E_BUCKETS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40, 80, 160, 320, 640, 1200, 2400)


class GatewayMetrics:
    """The counters of one gateway, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter(
            "rhizome_gateway_requests_total",
            "Requests answered, by endpoint and the status they ended with.",
            ("endpoint", "status"),
            registry=registry,
        )
        self.prompts = Counter(
            "rhizome_gateway_prompts_total",
            "Prompts by how they ended: ok, refused, overloaded, cancelled or failed.",
            ("model", "tenant", "outcome"),
            registry=registry,
        )
        self.inflight = Gauge(
            "rhizome_gateway_inflight_prompts", "Prompts being served.", registry=registry
        )
        self.queued = Gauge(
            "rhizome_gateway_queued_prompts",
            "Prompts that wait for a worker to be named.",
            registry=registry,
        )
        self.running = Gauge(
            "rhizome_gateway_running_prompts",
            "Prompts that a worker has.",
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
        self.migrations = Counter(
            "rhizome_gateway_migrations_total",
            "Choices that went on after their worker lost them.",
            registry=registry,
        )
        self.rate_limited = Counter(
            "rhizome_gateway_rate_limited_total",
            "Requests refused because their tenant reached a limit per minute.",
            ("tenant", "limit"),
            registry=registry,
        )
        self.refused_keys = Counter(
            "rhizome_gateway_refused_keys_total",
            "Calls refused for their API key: missing, unknown, not_admin or other_tenant.",
            ("reason",),
            registry=registry,
        )
        self.schedulers_answering = Gauge(
            "rhizome_gateway_schedulers_answering",
            "Schedulers whose worker table is followed now.",
            registry=registry,
        )
        self.placed_without_scheduler = Counter(
            "rhizome_gateway_placed_without_scheduler_total",
            "Prompts placed by power of two choices because no scheduler answered.",
            registry=registry,
        )
        self.slow_readers = Counter(
            "rhizome_gateway_slow_readers_total",
            "Requests cancelled because their client did not read.",
            registry=registry,
        )
        registry.register(SglangCollector(self.sources()))

    def sources(self) -> SglangSources:
        """What SGLang's names stand for here."""
        return SglangSources(
            prompts=self.prompts,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            output_tokens=self.output_tokens,
            time_to_first_token=self.time_to_first_token,
            request_latency=self.request_latency,
        )

    def render(self, accept: str) -> tuple[bytes, str]:
        """Everything, and its content type, in the form that an Accept header asks for."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type
