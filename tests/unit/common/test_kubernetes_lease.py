"""Who holds a lease that Kubernetes keeps, by clocks of the test's own.

What a real API server makes of it is tested in tests/cluster.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from services.common.kubernetes_api import open_kubernetes
from services.common.kubernetes_lease import KubernetesLease
from services.common.lease import LeaseUnknownError
from tests.fakes.fake_kubernetes import FakeKubernetes

DURATION_S = 10.0


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Replica:
    """One that claims, with clocks that nobody else sees."""

    def __init__(self, api: FakeKubernetes, wall: float = 1_800_000_000.0) -> None:
        self.clock, self.wall = Clock(0.0), Clock(wall)
        self.lease = KubernetesLease(
            api, "leader", duration_s=DURATION_S, clock=self.clock, wall_clock=self.wall
        )

    async def claim(self) -> int:
        return await self.lease.claim()

    def passes(self, seconds: float) -> None:
        self.clock.now += seconds
        self.wall.now += seconds


async def test_the_first_takes_it_and_keeps_its_term() -> None:
    api = FakeKubernetes()
    first, second = Replica(api), Replica(api)
    term = await first.claim()
    assert term > 0
    assert await second.claim() == 0
    first.passes(2.0)
    assert await first.claim() == term


async def test_a_holder_that_says_nothing_loses_it_after_its_duration() -> None:
    api = FakeKubernetes()
    first, second = Replica(api), Replica(api)
    term = await first.claim()
    assert await second.claim() == 0
    second.passes(DURATION_S)
    assert await second.claim() == 0
    second.passes(0.1)
    assert await second.claim() > term
    assert await first.claim() == 0


async def test_a_holder_that_renews_keeps_it_however_late_its_clock_is() -> None:
    api = FakeKubernetes()
    first, second = Replica(api, wall=1000.0), Replica(api)
    await first.claim()
    for _ in range(5):
        assert await second.claim() == 0
        second.passes(DURATION_S - 1)
        first.passes(1.0)
        assert await first.claim() > 0


async def test_a_lease_that_was_given_back_is_taken_at_once() -> None:
    api = FakeKubernetes()
    first, second = Replica(api), Replica(api, wall=1000.0)
    term = await first.claim()
    await first.lease.release()
    # Its clock is behind by decades: the new term is above the old all the same.
    assert await second.claim() > term
    await first.lease.release()
    assert await first.claim() == 0


async def test_a_lease_that_somebody_deleted_is_taken_anew_with_a_higher_term() -> None:
    api = FakeKubernetes()
    first = Replica(api)
    term = await first.claim()
    api.objects.clear()
    first.passes(1.0)
    assert await first.claim() > term


@pytest.mark.parametrize("is_new", [True, False])
async def test_of_two_that_see_it_free_one_gets_it(is_new: bool) -> None:
    api = FakeKubernetes()
    first, second = Replica(api), Replica(api)
    if not is_new:
        await first.claim()
        await first.lease.release()
    api.meanwhile = second.claim
    assert await first.claim() == 0
    assert await second.claim() > 0


async def test_while_nobody_answers_nobody_knows() -> None:
    api = FakeKubernetes()
    first = Replica(api)
    term = await first.claim()
    api.is_down = True
    for call in (first.lease.claim, first.lease.release):
        with pytest.raises(LeaseUnknownError):
            await call()
    api.is_down = False
    assert await first.claim() == term


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.floats(0.0, 25.0), st.sampled_from(["claim", "release"])),
        max_size=40,
    )
)
async def test_terms_only_grow_and_two_never_hold_it_at_once(
    steps: list[tuple[int, float, str]],
) -> None:
    api = FakeKubernetes()
    replicas = [Replica(api, wall) for wall in (2_000.0, 1_000_000.0, 5_000.0)]
    holder, highest = None, 0
    for index, seconds, action in steps:
        for replica in replicas:
            replica.passes(seconds)
        replica = replicas[index]
        if action == "release":
            await replica.lease.release()
            holder = None if holder == index else holder
            continue
        term = await replica.claim()
        if term and holder == index:
            assert term == highest
        elif term:
            assert term > highest
            holder, highest = index, term


@pytest.mark.parametrize("text", ["", "not: [yaml", "clusters: 1", "apiVersion: v1\nkind: Config"])
async def test_a_kubeconfig_that_says_nothing_useful_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(text)
    with pytest.raises(ValueError, match="kubeconfig"):
        await open_kubernetes(path)


async def test_a_kubeconfig_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent"):
        await open_kubernetes(tmp_path / "absent")


async def test_outside_a_pod_the_service_account_is_missed() -> None:
    with pytest.raises(ValueError, match="service account"):
        await open_kubernetes(None)
