"""Which of several controllers acts, and for how long it is sure of that."""

from __future__ import annotations

from services.common.lease import LeaseUnknownError
from services.controller.candidacy import Candidacy


class ScriptedLease:
    """Answers what the test says."""

    duration_s = 10.0
    renew_interval_s = 2.0

    def __init__(self) -> None:
        self.term = 1
        self.is_unknown = False
        self.took_s = 0.0
        self.clock = 100.0

    async def claim(self) -> int:
        self.clock += self.took_s
        if self.is_unknown:
            raise LeaseUnknownError("nobody answers")
        return self.term

    async def release(self) -> None:
        if self.is_unknown:
            raise LeaseUnknownError("nobody answers")

    async def check(self) -> None:
        pass


def make() -> tuple[ScriptedLease, Candidacy]:
    lease = ScriptedLease()
    return lease, Candidacy(lease, lambda: lease.clock)


async def test_only_the_holder_acts() -> None:
    lease, candidacy = make()
    assert not candidacy.leads
    await candidacy.stand()
    assert candidacy.leads
    lease.term = 0
    await candidacy.stand()
    assert not candidacy.leads


async def test_a_holder_that_cannot_renew_acts_until_its_lease_ends_and_no_longer() -> None:
    lease, candidacy = make()
    await candidacy.stand()
    lease.is_unknown = True
    lease.clock += 9.0
    await candidacy.stand()
    assert candidacy.leads
    lease.clock += 1.0
    assert not candidacy.leads
    lease.is_unknown = False
    await candidacy.stand()
    assert candidacy.leads


async def test_a_lease_counts_from_when_it_was_asked_for() -> None:
    lease, candidacy = make()
    lease.took_s = 4.0
    await candidacy.stand()
    lease.clock += 5.9
    assert candidacy.leads
    lease.clock += 0.2
    assert not candidacy.leads
