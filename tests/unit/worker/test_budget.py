import numpy as np
import pytest

from services.worker.engine.batching.budget import GrowthEstimate, TokenBudget


@pytest.mark.parametrize(
    ("num_left", "start", "stop", "expected"),
    [
        pytest.param(16, 0, 10, 10, id="all that is left of the prompt"),
        pytest.param(10, 0, 30, 8, id="ends where a page ends"),
        pytest.param(10, 6, 30, 10, id="ends where a page ends, from inside a page"),
        pytest.param(3, 0, 30, 3, id="less than a page, as nothing better fits"),
        pytest.param(1, 6, 30, 1, id="one token of a page"),
        pytest.param(10, 20, 30, 10, id="exactly the rest"),
    ],
)
def test_a_chunk_ends_with_a_page_where_it_can(num_left, start, stop, expected):
    assert TokenBudget(num_left, page_size=4).chunk_len(start, stop) == expected


def test_a_budget_cannot_be_overdrawn():
    budget = TokenBudget(4, page_size=4)
    budget.take(3)
    assert budget.num_left == 1
    with pytest.raises(AssertionError, match="more tokens"):
        budget.take(2)


def test_the_expected_growth_rises_with_preemptions_and_falls_with_time():
    estimate = GrowthEstimate()
    remaining = np.array([100, 0, 300], np.int32)
    first = estimate.expected_tokens(remaining)
    estimate.on_preemption()
    assert estimate.expected_tokens(remaining) > first
    for _ in range(2000):
        estimate.on_step()
    assert 0 < estimate.expected_tokens(remaining) < first
    for _ in range(100):
        estimate.on_preemption()
    assert estimate.expected_tokens(remaining) == 400


def test_a_sequence_without_end_is_expected_to_end():
    estimate = GrowthEstimate()
    endless = estimate.expected_tokens(np.array([1_000_000], np.int32))
    assert endless == estimate.expected_tokens(np.array([4096], np.int32))
