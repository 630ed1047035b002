"""Prometheus metrics of the gateway. Labels are bounded: endpoints, statuses, models, the tenants
that the operator listed.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.exposition import choose_encoder

from services.gateway.prompt_metrics import PromptMetrics
from services.gateway.sglang_metrics import SglangCollector


class GatewayMetrics:
    """The counters of one gateway, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.of_prompts = PromptMetrics(registry)
        self.requests = Counter(
            "rhizome_gateway_requests_total",
            "Requests answered, by endpoint and the status they ended with.",
            ("endpoint", "status"),
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
        registry.register(SglangCollector(self.of_prompts))

    def render(self, accept: str) -> tuple[bytes, str]:
        """Everything, and its content type, in the form that an Accept header asks for."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type
