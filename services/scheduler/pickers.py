"""Pickers: from costs to one worker."""

from __future__ import annotations

import random
from collections.abc import Sequence

from services.scheduler.policy import Query
from services.scheduler.views import WorkerView

# Predictions closer than this share of the cheapest are the same.
TIE_SHARE = 0.02


class Rotation:
    """Takes workers in turn, by name, so that coming and going of others does not disturb it."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, query: Query, workers: Sequence[WorkerView], costs: Sequence[float]) -> int:
        return self.next_of(workers, range(len(workers)))

    def next_of(self, workers: Sequence[WorkerView], indices: Sequence[int]) -> int:
        """The one of `indices` whose name follows the last one taken."""
        following = [index for index in indices if workers[index].worker_id > self._last]
        chosen = min(following or indices, key=lambda index: workers[index].worker_id)
        self._last = workers[chosen].worker_id
        return chosen


class LowestCost:
    """Takes the cheapest worker.

    Ties within TIE_SHARE go to the longest match, then to the session's worker, then to the
    fewest active sequences, then in turn: equal predictions (short prompts, idle workers) never
    all go to one worker.
    """

    def __init__(self) -> None:
        self._rotation = Rotation()

    def __call__(self, query: Query, workers: Sequence[WorkerView], costs: Sequence[float]) -> int:
        limit = min(costs) * (1 + TIE_SHARE)
        tied = [index for index, cost in enumerate(costs) if cost <= limit]
        if len(tied) == 1:
            return tied[0]
        cached = query.cached_tokens
        keys = [
            (
                -cached.get(workers[index].worker_id, 0),
                workers[index].worker_id != query.home_worker_id,
                workers[index].num_active,
            )
            for index in tied
        ]
        best = min(keys)
        return self._rotation.next_of(
            workers, [index for index, key in zip(tied, keys, strict=True) if key == best]
        )


class RandomChoice:
    """Takes any worker."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def __call__(self, query: Query, workers: Sequence[WorkerView], costs: Sequence[float]) -> int:
        return self._rng.randrange(len(workers))


class PowerOfTwo:
    """Takes the cheaper of two random workers (M. Mitzenmacher, "The Power of Two Choices in
    Randomized Load Balancing", IEEE TPDS 12(10), 2001)."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def __call__(self, query: Query, workers: Sequence[WorkerView], costs: Sequence[float]) -> int:
        pair = self._rng.sample(range(len(workers)), min(2, len(workers)))
        return min(pair, key=lambda index: costs[index])
