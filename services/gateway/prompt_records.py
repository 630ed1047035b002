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
from services.gateway.prompt_metrics import PromptMetrics
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


class _Series:
    """The metrics of one model and tenant; looking them up costs more than counting."""

    def __init__(self, metrics: PromptMetrics, model: str, tenant: str) -> None:
        self.prompt_tokens = metrics.prompt_tokens.labels(model, tenant)
        self.cached_tokens = metrics.cached_tokens.labels(model, tenant)
        self.output_tokens = metrics.output_tokens.labels(model, tenant)
        self.queue_time = metrics.queue_time.labels(model, tenant)
        self.request_latency = metrics.request_latency.labels(model, tenant)
        self.time_to_first_token = metrics.time_to_first_token.labels(model, tenant)
        self.time_per_output_token = metrics.time_per_output_token.labels(model, tenant)


class PromptRecords:
    """Writes a prompt's end into metrics and its tenant's counts."""

    def __init__(self, metrics: PromptMetrics, tenants: TenantSet, rates: RateLimits) -> None:
        self._metrics = metrics
        self._tenants = tenants
        self._rates = rates
        # By model and the tenant's label: as many as there are series.
        self._series: dict[tuple[str, str], _Series] = {}

    def count(self, prompt: Prompt, error: BaseException | None) -> None:
        """A prompt ended, by `error` where there is one."""
        tenant = self._tenants.label(prompt.spec.tenant)
        self._metrics.prompts.labels(prompt.model, tenant, _outcome(error)).inc()

    def ended(self, ended: EndedPrompt, error: BaseException | None) -> None:
        """As `count`, and what it took."""
        prompt = ended.prompt
        self.count(prompt, error)
        series = self._of(prompt)
        series.prompt_tokens.inc(len(prompt.token_ids))
        series.cached_tokens.inc(ended.cached_tokens)
        series.output_tokens.inc(ended.num_output_tokens)
        self._rates.charge(prompt.spec.tenant, num_tokens=ended.num_output_tokens)
        exemplar = prompt.spec.span.exemplar
        series.queue_time.observe(ended.queued_s, exemplar)
        series.request_latency.observe(ended.end_s - ended.arrival_s, exemplar)
        if first := ended.first_token_s:
            series.time_to_first_token.observe(first - ended.arrival_s, exemplar)
            longest = max(len(choice.output_ids) for choice in ended.choices)
            if longest > 1:
                mean = (ended.end_s - first) / (longest - 1)
                series.time_per_output_token.observe(mean, exemplar)

    def _of(self, prompt: Prompt) -> _Series:
        whose = (prompt.model, self._tenants.label(prompt.spec.tenant))
        series = self._series.get(whose)
        if series is None:
            series = self._series[whose] = _Series(self._metrics, *whose)
        return series


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
