"""The first tokens of a prompt name its worker, unless that one has more than its share.

Rendezvous hashing (D. Thaler, C. Ravishankar, IEEE/ACM ToN 6(1), 1998), so that few prompts move
when workers come and go, with bounded loads (V. Mirrokni et al., arXiv 1608.01350). It needs no
knowledge of caches. The constants are those of "prefix_hash" of SGLang's model gateway.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from xxhash import xxh3_64_intdigest

from services.scheduler.policies.least_outstanding import LeastOutstanding
from services.scheduler.policy import Query
from services.scheduler.views import WorkerView

PREFIX_TOKENS = 256
LOAD_FACTOR = 1.25


class PrefixHash:
    """Prompts without a full page go to the fewest requests."""

    def __init__(self) -> None:
        self._short = LeastOutstanding()

    def __call__(self, query: Query, workers: Sequence[WorkerView], costs: Sequence[float]) -> int:
        hashes = query.request.prefix_hashes
        if not hashes:
            return self._short(query, workers, costs)
        last = max(0, min(len(hashes), PREFIX_TOKENS // workers[0].worker.page_size) - 1)
        key = hashes[last]
        total = sum(view.num_active for view in workers) + 1
        bound = math.ceil(LOAD_FACTOR * total / len(workers))
        below = [index for index, view in enumerate(workers) if view.num_active < bound]
        return max(below, key=lambda index: _rank(workers[index].worker_id, key))


def _rank(worker_id: str, key: int) -> int:
    return int(xxh3_64_intdigest(worker_id.encode(), key))
