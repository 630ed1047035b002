"""Which scheduler a gateway asks first."""

from __future__ import annotations

import pytest

from rhizome.common.v1.pool_identity_pb2 import PoolIdentity
from rhizome.scheduler.v1.scheduler_service_pb2 import Pool, WatchWorkersResponse
from services.gateway.schedulers import SchedulerPeer, SchedulerSet

# Peers open channels, which need a loop.
pytestmark = pytest.mark.asyncio


class Watched:
    """A set of three, and the model names of each table that it gave on."""

    def __init__(self) -> None:
        self.tables: list[str] = []
        self.set = SchedulerSet(("a", "b", "c"), self._take)

    def hear(self, address: str, *, term: int = 0, seconds: float = 10.0) -> None:
        """A whole table of a scheduler that answers for so long."""
        peer = self._peer(address)
        pool = Pool(identity=PoolIdentity(served_model_name=address))
        peer._hear(WatchWorkersResponse(leader_term=term, pools=[pool]))
        assert peer.answers_since is not None
        peer.answers_since -= seconds

    def lose(self, address: str) -> None:
        self._peer(address)._note_silent()

    @property
    def order(self) -> str:
        return "".join(peer.address for peer in self.set.in_order())

    def _peer(self, address: str) -> SchedulerPeer:
        return next(peer for peer in self.set.peers if peer.address == address)

    def _take(self, table: WatchWorkersResponse) -> None:
        self.tables += [pool.identity.served_model_name for pool in table.pools]


async def test_without_a_leader_the_order_is_the_configurations() -> None:
    watched = Watched()
    assert watched.order == "abc"
    for address in "cba":
        watched.hear(address)
    assert watched.order == "abc"


async def test_the_highest_term_comes_first() -> None:
    watched = Watched()
    for address, term in (("a", 0), ("b", 7), ("c", 8)):
        watched.hear(address, term=term)
    assert watched.order == "cba"
    watched.hear("c", term=0)
    assert watched.order == "bac"


async def test_a_silent_one_is_not_asked_until_it_is_heard_again() -> None:
    watched = Watched()
    for address in "abc":
        watched.hear(address)
    watched.lose("a")
    assert watched.order == "bc"
    assert watched.set.num_answering == 2
    watched.hear("a")
    assert watched.order == "abc"


async def test_one_that_came_back_just_now_waits_for_its_workers() -> None:
    watched = Watched()
    for address in "abc":
        watched.hear(address)
    watched.lose("a")
    watched.hear("a", seconds=0.0)
    assert watched.order == "bca"
    # A leader has waited for them before it led.
    watched.lose("a")
    watched.hear("a", term=1, seconds=0.0)
    assert watched.order == "abc"


async def test_one_never_heard_of_comes_after_all_that_answer() -> None:
    watched = Watched()
    watched.hear("c", seconds=0.0)
    assert watched.order == "cab"


async def test_the_table_is_the_preferred_ones() -> None:
    watched = Watched()
    watched.hear("b")
    watched.hear("c")
    watched.hear("b")
    watched.hear("c", term=3)
    watched.lose("c")
    assert watched.tables == ["b", "b", "c", "b"]
