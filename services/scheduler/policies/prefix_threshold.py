"""The longest match above a threshold, else the least used cache; the shortest queue where loads
are far apart.

The rule and the constants of the "cache_aware" policy of SGLang's model gateway.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.scheduler.pickers import Rotation
from services.scheduler.policy import Query
from services.scheduler.views import WorkerView

MATCH_THRESHOLD = 0.3
BALANCE_ABSOLUTE = 64
BALANCE_RELATIVE = 1.5


class PrefixThreshold:
    """Invariant: what decides is one of the three rules, in the order of the module's words."""

    def __init__(self) -> None:
        self._rotation = Rotation()

    def __call__(self, query: Query, workers: Sequence[WorkerView], costs: Sequence[float]) -> int:
        loads = [view.num_active for view in workers]
        lowest, highest = min(loads), max(loads)
        if highest - lowest > BALANCE_ABSOLUTE and highest > BALANCE_RELATIVE * lowest:
            return self._least(workers, loads)
        matched = [query.cached_tokens.get(view.worker_id, 0) for view in workers]
        longest = max(matched)
        if longest > MATCH_THRESHOLD * query.request.num_prompt_tokens:
            return self._least(
                workers,
                [
                    load if pages == longest else highest + 1
                    for load, pages in zip(loads, matched, strict=True)
                ],
            )
        used = [view.worker.num_pages - view.load.num_free_pages for view in workers]
        promised = [view.charge.num_pages for view in workers]
        return self._least(workers, [sum(pages) for pages in zip(used, promised, strict=True)])

    def _least(self, workers: Sequence[WorkerView], keys: Sequence[int]) -> int:
        least = min(keys)
        return self._rotation.next_of(
            workers, [index for index, key in enumerate(keys) if key == least]
        )
