"""Prometheus metrics of the gateway. Labels are bounded: endpoints, statuses, models, workers."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder

_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 30, 60, 120, 400)
_TPOT_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 8)
_E2E_BUCKETS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40, 80, 160, 320, 640, 1200, 2400)


class GatewayMetrics:
    """The counters of one gateway, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter(
            "rhizome_gateway_requests_total",
            "Requests answered, by endpoint and status.",
            ("endpoint", "status"),
            registry=registry,
        )
        self.inflight = Gauge(
            "rhizome_gateway_inflight_prompts", "Prompts being served.", registry=registry
        )
        self.prompt_tokens = Counter(
            "rhizome_gateway_prompt_tokens_total", "Prompt tokens.", ("model",), registry=registry
        )
        self.cached_tokens = Counter(
            "rhizome_gateway_cached_tokens_total",
            "Prompt tokens that a worker's cache held.",
            ("model",),
            registry=registry,
        )
        self.output_tokens = Counter(
            "rhizome_gateway_output_tokens_total", "Output tokens.", ("model",), registry=registry
        )
        self.time_to_first_token = Histogram(
            "rhizome_gateway_time_to_first_token_seconds",
            "From the request's arrival to its first token.",
            ("model",),
            buckets=_TTFT_BUCKETS,
            registry=registry,
        )
        self.time_per_output_token = Histogram(
            "rhizome_gateway_time_per_output_token_seconds",
            "Mean time between a choice's tokens after the first.",
            ("model",),
            buckets=_TPOT_BUCKETS,
            registry=registry,
        )
        self.request_latency = Histogram(
            "rhizome_gateway_request_latency_seconds",
            "From the request's arrival to its end.",
            ("model",),
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

    def observe_times(
        self,
        model: str,
        *,
        latency_s: float,
        first_token_s: float | None,
        decode_s: float,
        num_decoded: int,
        exemplar: dict[str, str] | None,
    ) -> None:
        """A prompt has ended; `num_decoded` tokens of its longest choice came after the first."""
        self.request_latency.labels(model).observe(latency_s, exemplar)
        if first_token_s is None:
            return
        self.time_to_first_token.labels(model).observe(first_token_s, exemplar)
        if num_decoded > 0:
            self.time_per_output_token.labels(model).observe(decode_s / num_decoded, exemplar)

    def render(self, accept: str) -> tuple[bytes, str]:
        """Everything, and its content type, in the form that an Accept header asks for."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type
