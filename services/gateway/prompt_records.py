"""What is counted of every prompt when it ends: metrics, and its tenant's tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from services.common.errors import (
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    UnimplementedError,
)
from services.common.tenants import TenantSet
from services.gateway.generation import Choice, Prompt
from services.gateway.metrics import GatewayMetrics
from services.gateway.rate_limits import RateLimits


class EndedPrompt(Protocol):
    """A prompt whose choices have ended. Times are monotonic seconds."""

    prompt: Prompt
    arrival_s: float
    end_s: float

    @property
    def choices(self) -> Sequence[Choice]:
        """All of them."""

    @property
    def queued_s(self) -> float:
        """Spent until workers were named."""

    @property
    def first_token_s(self) -> float:
        """0 where there was none."""

    @property
    def cached_tokens(self) -> int:
        """Of the prompt."""

    @property
    def num_output_tokens(self) -> int:
        """Of all choices."""


class PromptRecords:
    """Writes a prompt's end into metrics and its tenant's counts; keeps nothing."""

    def __init__(self, metrics: GatewayMetrics, tenants: TenantSet, rates: RateLimits) -> None:
        self._metrics = metrics
        self._tenants = tenants
        self._rates = rates

    def count(self, prompt: Prompt, error: BaseException | None) -> None:
        """A prompt ended, by `error` where there is one."""
        tenant = self._tenants.label(prompt.spec.tenant)
        self._metrics.prompts.labels(prompt.model, tenant, _outcome(error)).inc()

    def ended(self, ended: EndedPrompt, error: BaseException | None) -> None:
        """As `count`, and what it took."""
        metrics, prompt = self._metrics, ended.prompt
        self.count(prompt, error)
        whose = (prompt.model, self._tenants.label(prompt.spec.tenant))
        metrics.prompt_tokens.labels(*whose).inc(len(prompt.token_ids))
        metrics.cached_tokens.labels(*whose).inc(ended.cached_tokens)
        metrics.output_tokens.labels(*whose).inc(ended.num_output_tokens)
        self._rates.charge(prompt.spec.tenant, num_tokens=ended.num_output_tokens)
        metrics.queue_time.labels(*whose).observe(ended.queued_s)
        metrics.request_latency.labels(*whose).observe(ended.end_s - ended.arrival_s)
        if first := ended.first_token_s:
            metrics.time_to_first_token.labels(*whose).observe(first - ended.arrival_s)
            longest = max(len(choice.output_ids) for choice in ended.choices)
            if longest > 1:
                metrics.time_per_output_token.labels(*whose).observe(
                    (ended.end_s - first) / (longest - 1)
                )


def _outcome(error: BaseException | None) -> str:
    """How a prompt ended: whose fault it was, if anybody's."""
    match error:
        case None:
            return "ok"
        case asyncio.CancelledError():
            return "cancelled"
        case OverloadedError():
            return "overloaded"
        case InvalidRequestError() | NotFoundError() | UnimplementedError():
            return "refused"
    return "failed"
