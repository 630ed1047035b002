"""Prometheus metrics of the tokenizer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.common.errors import OverloadedError, RhizomeError

_SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)


class TokenizerMetrics:
    """Owns them and their registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._calls = Counter(
            "rhizome_tokenizer_calls_total",
            "Tokenize and Detokenize calls by how they ended: ok, refused, overloaded or failed.",
            ("method", "outcome"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "rhizome_tokenizer_seconds",
            "Time of a call in this service, waiting for a thread included.",
            ("method",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "rhizome_tokenizer_prompt_tokens_total",
            "Tokens that prompts were encoded to.",
            registry=self.registry,
        )
        self.waiting = Gauge(
            "rhizome_tokenizer_waiting_calls",
            "Calls that wait for a thread or are in one.",
            registry=self.registry,
        )
        self.text_streams = Gauge(
            "rhizome_tokenizer_text_streams",
            "Open streams that turn output ids into text, one a gateway.",
            registry=self.registry,
        )

    @contextlib.contextmanager
    def call(self, method: str) -> Iterator[None]:
        """Count and time the block as one call."""
        began = time.perf_counter()
        outcome = "failed"
        try:
            yield
            outcome = "ok"
        except OverloadedError:
            outcome = "overloaded"
            raise
        except RhizomeError:
            outcome = "refused"
            raise
        finally:
            self._calls.labels(method, outcome).inc()
            self._seconds.labels(method).observe(time.perf_counter() - began)
