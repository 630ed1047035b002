"""Tenants' limits per minute, as one gateway alone keeps them."""

from __future__ import annotations

import pytest

from services.common.errors import OverloadedError
from services.common.tenants import TenantPolicy, TenantSet
from services.gateway.metrics import GatewayMetrics
from services.gateway.rate_limits import RateLimits


class Clock:
    """Wall time, at the start of a minute."""

    now = 6000.0

    def __call__(self) -> float:
        return self.now


def limits(clock: Clock, **policy: int) -> tuple[RateLimits, GatewayMetrics]:
    metrics = GatewayMetrics()
    tenants = TenantSet({"bounded": TenantPolicy(**policy), "other": TenantPolicy()})
    return RateLimits(tenants, metrics, clock), metrics


def admitted(rates: RateLimits, attempts: int, num_tokens: int = 0) -> int:
    """How many of so many requests pass."""
    for count in range(attempts):
        try:
            rates.require("bounded")
        except OverloadedError:
            return count
        rates.charge("bounded", num_requests=1, num_tokens=num_tokens)
    return attempts


def test_a_tenant_without_a_limit_is_not_counted() -> None:
    rates, _ = limits(Clock(), requests_per_minute=1)
    for _ in range(100):
        rates.require("other")
        rates.charge("other", num_requests=1, num_tokens=1000)


def test_requests_pass_up_to_the_limit_and_the_refusal_is_counted() -> None:
    rates, metrics = limits(Clock(), requests_per_minute=5)
    assert admitted(rates, 10) == 5
    labels = {"tenant": "bounded", "limit": "requests"}
    name = "rhizome_gateway_rate_limited_total"
    assert metrics.registry.get_sample_value(name, labels) == 1


def test_tokens_count_and_the_one_that_exceeds_is_paid_by_the_next() -> None:
    rates, _ = limits(Clock(), tokens_per_minute=100)
    assert admitted(rates, 10, num_tokens=40) == 3


def test_output_counts_when_it_is_known() -> None:
    rates, _ = limits(Clock(), tokens_per_minute=100)
    rates.charge("bounded", num_tokens=99)
    rates.require("bounded")
    rates.charge("bounded", num_tokens=1)
    with pytest.raises(OverloadedError):
        rates.require("bounded")


@pytest.mark.parametrize("spent_at_s", [0.0, 30.0, 59.0])
def test_the_hint_is_when_a_request_passes_again(spent_at_s: float) -> None:
    clock = Clock()
    clock.now += spent_at_s
    rates, _ = limits(clock, requests_per_minute=6)
    assert admitted(rates, 10) == 6
    with pytest.raises(OverloadedError) as caught:
        rates.require("bounded")
    started = clock.now
    clock.now = started + caught.value.retry_after_s
    rates.require("bounded")
    clock.now = started + caught.value.retry_after_s - 2.0
    with pytest.raises(OverloadedError):
        rates.require("bounded")


def test_the_last_minute_counts_for_the_part_of_it_that_is_near() -> None:
    clock = Clock()
    rates, _ = limits(clock, requests_per_minute=60)
    assert admitted(rates, 60) == 60
    clock.now += 90.0
    assert admitted(rates, 60) == 30
    clock.now += 120.0
    assert admitted(rates, 100) == 60
