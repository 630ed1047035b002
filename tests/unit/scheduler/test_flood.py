"""A flooding tenant against calm ones, through the real placer, in virtual time.

One pool serves NUM_SLOTS requests at once, each for SERVICE_S. With N tenants of equal weight that
have something waiting, one that sends less than its share waits for at most its turn among N, once
for a request of each (the VTC paper's bound: one request's service between any two), while slots
come free every SERVICE_S / NUM_SLOTS.
"""

import heapq
import random
from collections import Counter

import pytest

from services.scheduler.queue import Ticket
from services.scheduler.views import Load
from tests.unit.scheduler.scheduler import Scheduler, make_scheduler

NUM_SLOTS = 8
SERVICE_S = 1.0
OUTPUT_TOKENS = 100
CALM = ("calm0", "calm1", "calm2")


class Replay:
    """Plays arrivals of (time, tenant, priority) against one worker that runs NUM_SLOTS."""

    def __init__(self, seed: int) -> None:
        self.scheduler: Scheduler = make_scheduler(max_queued=10_000)
        self.registration = self.scheduler.register("w", max_running_sequences=NUM_SLOTS)
        self.waits: dict[str, list[float]] = {}
        self._rng = random.Random(seed)
        self._running: list[tuple[float, int, Ticket]] = []
        self._open: list[Ticket] = []
        self._start = self.scheduler.clock.now

    def play(self, arrivals: list[tuple[float, str, int]]) -> None:
        pending = sorted(arrivals, reverse=True)
        while pending or self._running:
            ends_at = self._running[0][0] if self._running else float("inf")
            if pending and pending[-1][0] <= ends_at:
                time, tenant, priority = pending.pop()
                self._advance(time)
                name = f"{tenant}-{len(pending)}"
                made = self.scheduler.schedule(
                    name, tenant=tenant, priority=priority, max_new_tokens=OUTPUT_TOKENS
                )
                self._open.append(made)
            else:
                _, _, ticket = heapq.heappop(self._running)
                self._advance(ends_at)
                self.scheduler.finish(ticket, OUTPUT_TOKENS)
                self._report([])
            self._start_placed()

    def _advance(self, time: float) -> None:
        self.scheduler.clock.now = self._start + time

    def _start_placed(self) -> None:
        """Requests that were placed run from now on, and the worker says so."""
        while placed := [ticket for ticket in self._open if ticket.reservation]:
            self._open = [ticket for ticket in self._open if not ticket.reservation]
            now = self.scheduler.clock.now - self._start
            admitted = []
            for ticket in placed:
                assert ticket.reservation is not None
                admitted.append(ticket.reservation.reservation_id)
                self.waits.setdefault(ticket.request.tenant, []).append(
                    ticket.reservation.queued_for_s
                )
                took = SERVICE_S * self._rng.uniform(0.8, 1.2)
                entry = now + took, ticket.reservation.reservation_id, ticket
                heapq.heappush(self._running, entry)
            self._report(admitted)

    def _report(self, admitted: list[int]) -> None:
        load = Load(num_free_pages=10_000, num_running=len(self._running))
        self.scheduler.placer.report_load(self.registration, load, admitted)


def _calm_arrivals(duration_s: float) -> list[tuple[float, str, int]]:
    """Each sends 1 request a second: an eighth of what there is, half of its share among four."""
    return [
        (index + offset / len(CALM), name, 0)
        for offset, name in enumerate(CALM)
        for index in range(int(duration_s))
    ]


def _flood(duration_s: float, per_second: int, priority: int = 0) -> list[tuple[float, str, int]]:
    count = int(duration_s * per_second)
    return [(index / per_second, "flood", priority) for index in range(count)]


@pytest.mark.parametrize("seed", range(3))
def test_a_flood_leaves_others_waiting_within_a_turn_of_each_tenant(seed: int) -> None:
    replay = Replay(seed)
    replay.play(_calm_arrivals(60) + _flood(60, per_second=80))
    # A slot comes free every 1/8 s on average. A newcomer's counter is lifted to the least, so at
    # most one request of each of the four tenants goes before it, and the slot it gets itself.
    bound_s = (len(CALM) + 2) * 1.2 * SERVICE_S / NUM_SLOTS
    worst = max(max(replay.waits[name]) for name in CALM)
    assert worst <= bound_s
    assert max(replay.waits["flood"]) > 100 * bound_s
    # Nothing is held back for the calm ones: the flood has all they leave.
    assert len(replay.waits["flood"]) == 60 * 80


def test_a_flood_in_a_lower_class_is_not_noticed_but_for_its_trickle() -> None:
    replay = Replay(1)
    replay.play(_calm_arrivals(30) + _flood(30, per_second=80, priority=-1))
    # Slots are all taken when one of the higher class comes; one is free within a service time.
    assert max(max(replay.waits[name]) for name in CALM) <= 1.2 * SERVICE_S


def test_tenants_that_all_flood_get_equal_service() -> None:
    replay = Replay(2)
    replay.play([(index * 1e-6, f"t{index % 4}", 0) for index in range(400)])
    # By the time that half are served, each tenant has had a quarter, up to one request each.
    starts = sorted((wait, name) for name, waits in replay.waits.items() for wait in waits)
    served = Counter(name for _, name in starts[:200])
    assert max(served.values()) - min(served.values()) <= 1
