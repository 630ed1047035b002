"""How much service each tenant had: virtual token counters.

Y. Sheng et al., "Fairness in Serving Large Language Models" (arXiv 2401.00588), with predicted
output lengths: a request is charged when it is placed, and the difference when it has ended.
Prompt tokens that a cache held cost nothing, as in S. Cao et al., "Locality-aware Fair Scheduling
in LLM Serving" (arXiv 2501.14312).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import NamedTuple

# Service of one token: the paper's w_p and w_q.
INPUT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0
_MAX_COUNTERS = 65_536


class Account(NamedTuple):
    """Who is charged: counters of different priority classes do not meet."""

    priority: int
    tenant: str


def service_of(num_computed_tokens: int, num_output_tokens: int) -> float:
    """The service of a request, in weighted tokens; never nothing."""
    return max(1.0, INPUT_WEIGHT * num_computed_tokens + OUTPUT_WEIGHT * num_output_tokens)


class ServiceLedger:
    """The counters, in weighted tokens over the tenant's weight.

    Among tenants of one class that all have requests waiting, the one with the lowest counter goes
    next; so their counters stay within about one request of each other, whatever they send. Who
    was away is lifted on its return (`activate`): service that was not asked for is not saved up.
    At most `max_counters` are kept; the one that changed longest ago is forgotten first, which its
    tenant's next request finds lifted like any other.
    """

    def __init__(
        self, weight_of: Callable[[str], float], max_counters: int = _MAX_COUNTERS
    ) -> None:
        self._weight_of = weight_of
        self._max_counters = max_counters
        self._counters: OrderedDict[Account, float] = OrderedDict()
        # By class: who was the last to have something waiting.
        self._last_left: OrderedDict[int, Account] = OrderedDict()

    def __len__(self) -> int:
        return len(self._counters)

    def counter(self, account: Account) -> float:
        return self._counters.get(account, 0.0)

    def weight(self, account: Account) -> float:
        return self._weight_of(account.tenant)

    def charge(self, account: Account, service: float) -> None:
        """It had so much service; a negative amount was charged too much before."""
        self._set(account, self.counter(account) + service / self.weight(account))

    def lifted(self, account: Account, active: Iterable[Account]) -> float:
        """Its counter if it became active now beside `active`."""
        floor = min(map(self.counter, active), default=None)
        if floor is None:
            last = self._last_left.get(account.priority)
            floor = 0.0 if last is None else self.counter(last)
        return max(self.counter(account), floor)

    def activate(self, account: Account, active: Iterable[Account]) -> None:
        """It has something waiting again; `active` are the others of its class that do."""
        self._set(account, self.lifted(account, active))

    def deactivate(self, account: Account) -> None:
        """Nothing of it waits any more."""
        self._last_left[account.priority] = account
        self._last_left.move_to_end(account.priority)
        if len(self._last_left) > self._max_counters:
            self._last_left.popitem(last=False)

    def _set(self, account: Account, counter: float) -> None:
        self._counters[account] = counter
        self._counters.move_to_end(account)
        if len(self._counters) > self._max_counters:
            self._counters.popitem(last=False)


class _Bill(NamedTuple):
    ledger: ServiceLedger
    account: Account
    service: float


class Bills:
    """What placed requests were charged, until what they really took is known.

    The oldest of more than `max_open` stands as it was charged.
    """

    def __init__(self, max_open: int = _MAX_COUNTERS) -> None:
        self._max_open = max_open
        self._open: OrderedDict[int, _Bill] = OrderedDict()

    def open(
        self, reservation_id: int, ledger: ServiceLedger, account: Account, service: float
    ) -> None:
        """Charge the predicted service of a placement."""
        ledger.charge(account, service)
        self._open[reservation_id] = _Bill(ledger, account, service)
        if len(self._open) > self._max_open:
            self._open.popitem(last=False)

    def settle(self, reservation_id: int, service: float) -> Account | None:
        """Charge what is missing to the real service; returns who pays, once a placement."""
        bill = self._open.pop(reservation_id, None)
        if bill is None:
            return None
        bill.ledger.charge(bill.account, service - bill.service)
        return bill.account
