"""How many prompts the gateway serves at a time, and how many of one tenant."""

from __future__ import annotations

from collections import Counter

from services.common.errors import OverloadedError
from services.gateway.metrics import GatewayMetrics

# A tenant may hold so many times what is free: all that one can take leaves a ninth to others.
_SHARE_OF_FREE = 8


class InflightPrompts:
    """Counts prompts in and out.

    One tenant's bound is a multiple of the room that is left, so a flood fills the gateway up to
    8/9 and no further, and whoever comes then finds room (A. Choudhury, E. Hahne, "Dynamic Queue
    Length Thresholds for Shared-Memory Packet Switches", IEEE/ACM ToN 6(2), 1998).
    """

    def __init__(self, max_prompts: int, metrics: GatewayMetrics) -> None:
        self.num_prompts = 0
        self._max_prompts = max_prompts
        self._metrics = metrics
        self._by_tenant: Counter[str] = Counter()

    def admit(self, num_prompts: int, tenant: str) -> None:
        """Each leaves when its generation's run ends. Raises OverloadedError."""
        free = self._max_prompts - self.num_prompts
        if num_prompts > free:
            raise OverloadedError("the gateway is serving as many requests as it may")
        if self._by_tenant[tenant] >= _SHARE_OF_FREE * free:
            raise OverloadedError("the gateway is serving as many requests of one tenant as it may")
        self.num_prompts += num_prompts
        self._by_tenant[tenant] += num_prompts
        self._metrics.inflight.set(self.num_prompts)

    def leave(self, num_prompts: int, tenant: str) -> None:
        """As many as were admitted."""
        self.num_prompts -= num_prompts
        self._by_tenant[tenant] -= num_prompts
        if not self._by_tenant[tenant]:
            del self._by_tenant[tenant]
        self._metrics.inflight.set(self.num_prompts)
