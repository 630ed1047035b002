import pytest

from services.common.tenants import TenantPolicy, TenantSet
from services.scheduler.fairness import Account, Bills, ServiceLedger, service_of

A, B, C = Account(0, "a"), Account(0, "b"), Account(0, "c")


@pytest.fixture
def ledger() -> ServiceLedger:
    return ServiceLedger(TenantSet({"b": TenantPolicy(weight=4.0)}).weight)


def test_output_counts_twice_and_nothing_is_free() -> None:
    assert service_of(100, 10) == 120.0
    assert service_of(0, 0) == 1.0


def test_charges_are_divided_by_the_weight(ledger: ServiceLedger) -> None:
    ledger.charge(A, 100.0)
    ledger.charge(B, 100.0)
    assert (ledger.counter(A), ledger.counter(B)) == (100.0, 25.0)


def test_a_return_lifts_to_the_least_active_but_never_lowers(ledger: ServiceLedger) -> None:
    ledger.charge(A, 100.0)
    ledger.charge(B, 160.0)
    ledger.activate(C, (A, B))
    assert ledger.counter(C) == 40.0
    ledger.activate(A, (B, C))
    assert ledger.counter(A) == 100.0


def test_the_counter_changed_longest_ago_is_forgotten_first() -> None:
    ledger = ServiceLedger(lambda tenant: 1.0, max_counters=2)
    for account in (A, B, A, C):
        ledger.charge(account, 10.0)
    assert len(ledger) == 2
    assert [ledger.counter(account) for account in (A, B, C)] == [20.0, 0.0, 10.0]


def test_a_bill_is_settled_once_for_what_was_really_served(ledger: ServiceLedger) -> None:
    bills = Bills()
    bills.open(7, ledger, A, 500.0)
    assert ledger.counter(A) == 500.0
    assert bills.settle(7, 120.0) == A
    assert bills.settle(7, 120.0) is None
    assert ledger.counter(A) == 120.0


def test_bills_that_never_settle_are_bounded_and_stand(ledger: ServiceLedger) -> None:
    bills = Bills(max_open=2)
    for number in range(3):
        bills.open(number, ledger, A, 10.0)
    assert bills.settle(0, 0.0) is None
    assert bills.settle(2, 0.0) == A
    assert ledger.counter(A) == 20.0
