"""What holds for every policy, whatever the snapshot."""

import random
from typing import get_args

import pytest
from hypothesis import given, settings, strategies as st

from services.common.policies import PolicyName
from services.scheduler.filters import eligible
from services.scheduler.policies import make_policy
from services.scheduler.policy import Query
from services.scheduler.views import Charge, WorkerRole, WorkerState, WorkerView
from tests.unit.scheduler.build import chain, make_request, make_view
from tests.unit.scheduler.scheduler import make_scheduler, worker_of

NAMES = [f"w{index}" for index in range(6)]


@st.composite
def views(draw: st.DrawFn, name: str) -> WorkerView:
    small = st.integers(0, 80)
    return make_view(
        name,
        state=draw(st.sampled_from(WorkerState)),
        charge=Charge(draw(small), draw(small), draw(small), draw(st.integers(0, 10**9))),
        worker={"role": draw(st.sampled_from(WorkerRole))},
        num_running=draw(small),
        num_waiting=draw(small),
        num_waiting_uncached_tokens=draw(st.integers(0, 50_000)),
        num_free_pages=draw(st.integers(0, 10_000)),
        eviction_cost_ns=tuple(draw(st.lists(st.floats(0, 1e9), max_size=12))),
    )


@st.composite
def asked(draw: st.DrawFn, number: int) -> Query:
    num_tokens = draw(st.integers(1, 4000))
    request = make_request(
        f"r{number}",
        num_prompt_tokens=num_tokens,
        prefix_hashes=chain(draw(st.integers(1, 3)), num_tokens // 16),
        excluded_worker_ids=frozenset(draw(st.sets(st.sampled_from(NAMES)))),
    )
    pages = st.integers(1, max(1, num_tokens // 16))
    # A prompt without a full page has nothing to be found by.
    cached = draw(st.dictionaries(st.sampled_from(NAMES), pages)) if num_tokens >= 16 else {}
    tokens = {name: min(count * 16, num_tokens - 1) for name, count in cached.items()}
    home = draw(st.none() | st.sampled_from(NAMES))
    return Query(request, tokens, draw(st.integers(0, 300)), home, number * draw(st.floats(0, 100)))


@pytest.mark.parametrize("name", get_args(PolicyName))
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_no_policy_chooses_an_excluded_or_draining_worker(
    name: PolicyName, data: st.DataObject
) -> None:
    policy = make_policy(name, random.Random(1))
    for number in range(2):
        query = data.draw(asked(number))
        workers = [data.draw(views(worker_name)) for worker_name in NAMES]
        allowed = eligible(query.request, workers)
        if not allowed:
            continue
        chosen = policy.choose(query, allowed)
        assert chosen in allowed
        assert chosen.worker_id not in query.request.excluded_worker_ids
        assert chosen.state is WorkerState.READY
        assert policy.branch(query, chosen).startswith(f"{name}/")


@pytest.mark.parametrize("name", get_args(PolicyName))
def test_a_worker_that_drains_gets_nothing_that_waited_for_it(name: PolicyName) -> None:
    scheduler = make_scheduler(policy=make_policy(name, random.Random(1)))
    for worker in ("owner", "other"):
        scheduler.register(worker, max_running_sequences=1)
    hashes = chain(1, 60)
    first = scheduler.schedule("r0", prefix_hashes=hashes)
    held = [scheduler.schedule(f"r{number}", prefix_hashes=hashes) for number in (1, 2)]
    owner = worker_of(first)
    scheduler.table.drain(owner, "test")
    scheduler.clock.advance(0.1)
    scheduler.placer.sweep()
    placed = [ticket for ticket in held if ticket.reservation is not None]
    assert [worker_of(ticket) for ticket in placed] == ["other" if owner == "owner" else "owner"]
