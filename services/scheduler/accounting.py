"""What placed requests were expected to take, against what they took."""

from __future__ import annotations

from typing import NamedTuple

from services.common.tenants import TenantSet
from services.scheduler.fairness import Account, Bills, ServiceLedger, service_of
from services.scheduler.metrics import SchedulerMetrics
from services.scheduler.policy import PlacementRequest

# What outputs are taken to be before any was reported, and the weight of each report.
_FIRST_MEAN_OUTPUT = 128.0
_OUTPUT_WEIGHT = 0.02


class Outcome(NamedTuple):
    """What really happened to a placed request."""

    reservation_id: int
    num_prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    ended_well: bool
    # The worker broke off or refused it, rather than the request or its caller.
    worker_failed: bool = False
    # The worker had no room for it.
    was_refused: bool = False
    worker_id: str = ""


class Accounting:
    """Predicts outputs from the mean of those reported; charges tenants, first what a placement
    will probably take, then the difference to what it took."""

    def __init__(self, tenants: TenantSet, metrics: SchedulerMetrics) -> None:
        self._tenants = tenants
        self._metrics = metrics
        self._mean_output = _FIRST_MEAN_OUTPUT
        self._bills = Bills()

    def output_tokens(self, request: PlacementRequest) -> int:
        """That one choice of it will probably have."""
        return min(request.max_new_tokens, int(self._mean_output))

    def service(self, request: PlacementRequest, cached_tokens: int = 0) -> float:
        """That it will probably take, in weighted tokens."""
        num_output = request.num_choices * self.output_tokens(request)
        return service_of(request.num_prompt_tokens - cached_tokens, num_output)

    def charge(
        self, reservation_id: int, ledger: ServiceLedger, account: Account, service: float
    ) -> None:
        """A request was placed."""
        self._bills.open(reservation_id, ledger, account, service)

    def refund(self, reservation_id: int) -> None:
        """A placement never came to anything."""
        self._bills.settle(reservation_id, 0.0)

    def settle(self, outcome: Outcome) -> None:
        """A placement ended. What a worker that failed did for it is not its tenant's cost."""
        service = 0.0
        if not outcome.worker_failed:
            num_computed = outcome.num_prompt_tokens - outcome.cached_tokens
            service = service_of(num_computed, outcome.output_tokens)
        account = self._bills.settle(outcome.reservation_id, service)
        if account is not None:
            label = self._tenants.label(account.tenant)
            self._metrics.tenant_service.labels(label).inc(service)

    def learn(self, outcome: Outcome, predicted_cached: int) -> None:
        """A request ended well, once for each."""
        self._mean_output += _OUTPUT_WEIGHT * (outcome.output_tokens - self._mean_output)
        self._metrics.reported_prompt_tokens.inc(outcome.num_prompt_tokens)
        self._metrics.predicted_cached_tokens.inc(predicted_cached)
        self._metrics.actual_cached_tokens.inc(outcome.cached_tokens)
        self._metrics.overpredicted_tokens.inc(max(0, predicted_cached - outcome.cached_tokens))
