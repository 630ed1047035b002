import pytest

from services.common.errors import OverloadedError
from services.gateway.inflight import InflightPrompts
from services.gateway.metrics import GatewayMetrics


def _fill(inflight: InflightPrompts, tenant: str) -> int:
    """Prompts that the tenant gets in."""
    for count in range(10_000):
        try:
            inflight.admit(1, tenant)
        except OverloadedError:
            return count
    raise AssertionError("there is no bound")


def test_one_tenant_leaves_a_ninth_to_others() -> None:
    inflight = InflightPrompts(900, GatewayMetrics())
    assert _fill(inflight, "flood") == 800
    assert _fill(inflight, "calm") == 89
    inflight.admit(1, "third")


def test_what_leaves_makes_room() -> None:
    inflight = InflightPrompts(9, GatewayMetrics())
    assert _fill(inflight, "") == 8
    inflight.leave(3, "")
    assert _fill(inflight, "") == 3
    assert inflight.num_prompts == 8


def test_a_batch_goes_in_whole_or_not_at_all() -> None:
    inflight = InflightPrompts(10, GatewayMetrics())
    inflight.admit(6, "a")
    with pytest.raises(OverloadedError):
        inflight.admit(5, "b")
    inflight.admit(4, "b")
    assert inflight.num_prompts == 10


def test_a_gateway_of_one_prompt_serves_one() -> None:
    inflight = InflightPrompts(1, GatewayMetrics())
    assert _fill(inflight, "a") == 1
